"""The forms of quantised checkpoints that can be read, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from trio_deploy.quant import awq, compressed_tensors, gptq
from trio_deploy.quant.matrix import QuantisedMatrix
from trio_deploy.quant.words import Blocks, matrix_of


@dataclass(frozen=True)
class CheckpointForm:
    """How a checkpoint holds a quantised matrix.

    Attributes:
        source: who wrote it, as a bundle records it.
        codes: last part of the name of the tensor of codes; the part before is the module's name.
        scales: last part of the name of the tensor of scales, the one of floats.
        needed, optional: last parts of the names of a matrix's tensors.
        blocks: reads all but the codes, given their tensor's shape, and a name for messages.
        unpack: takes the codes apart, uint8 [N, K].
    """

    source: str
    codes: str
    scales: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    blocks: Callable[[tuple[int, ...], Mapping[str, np.ndarray], str], Blocks]
    unpack: Callable[[np.ndarray, Blocks], np.ndarray]

    def read(self, tensors: Mapping[str, np.ndarray], what: str) -> QuantisedMatrix:
        """Read a matrix of its tensors, by the last part of their names.

        Raises:
            TrioError: they contradict each other; names the matrix as `what`.
        """
        blocks = self.blocks(tensors[self.codes].shape, tensors, what)
        return matrix_of(self.unpack(tensors[self.codes], blocks), blocks)


_GPTQ = CheckpointForm(
    "gptq",
    gptq.CODES,
    "scales",
    gptq.NEEDED,
    gptq.OPTIONAL,
    gptq.blocks_of_gptq,
    gptq.codes_of_gptq,
)

FORMS: dict[str, CheckpointForm] = {
    "compressed-tensors": CheckpointForm(
        "compressed-tensors",
        compressed_tensors.CODES,
        "weight_scale",
        compressed_tensors.NEEDED,
        compressed_tensors.OPTIONAL,
        compressed_tensors.blocks_of_compressed_tensors,
        compressed_tensors.codes_of_compressed_tensors,
    ),
    "awq": CheckpointForm(
        "awq", awq.CODES, "scales", awq.NEEDED, (), awq.blocks_of_awq, awq.codes_of_awq
    ),
    "gptq": _GPTQ,
    "gptq_v2": replace(_GPTQ, blocks=partial(gptq.blocks_of_gptq, less=0)),
}
