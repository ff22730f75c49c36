"""GPTQ as AutoGPTQ and GPTQModel write it: 4 or 8 bit in blocks of g along K.

For a matrix [N, K] in b bits:

* `qweight` int32 [K·b/32, N]: W transposed, codes along K, the first in the lowest bits.
* `qzeros` int32 [K/g, N·b/32]: zero points along N. `checkpoint_format` `gptq` holds each less 1
  (so 7 for the middle of 4 bit), `gptq_v2` as it is.
* `scales` float16 [K/g, N].
* `g_idx` int32 [K]: block of each column; `desc_act` orders them otherwise than k // g.

W = (code - zero) · scale. Where blocks are symmetric all zero points are 2^(b-1).

Source: `QuantLinear.pack` of AutoGPTQ, `convert_gptq_v1_to_v2_format` of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.words import Blocks, block_of, codes_of, refuse_other_order

CODES = "qweight"
NEEDED = (CODES, "qzeros", "scales")
OPTIONAL = ("g_idx",)


def blocks_of_gptq(
    words: tuple[int, ...], tensors: Mapping[str, np.ndarray], what: str, less: int = 1
) -> Blocks:
    """Read what the checkpoint says of a matrix beside its codes.

    Args:
        words: shape of `qweight`.
        tensors: `qzeros`, `scales` and any of `OPTIONAL`, by name.
        what: name of the matrix, for messages.
        less: what was taken off zero points: 1 in `gptq`, 0 in `gptq_v2`.

    Raises:
        TrioError: the tensors contradict each other, the columns have another order, or a zero
            point is ambiguous.
    """
    zeros, scales = tensors["qzeros"], tensors["scales"]
    rows = scales.shape[-1] if scales.ndim == 2 else 0
    bits = next((b for b in (4, 8) if zeros.shape == (len(scales), -(-rows * b // 32))), None)
    if bits is None or len(words) != 2 or words[1] != rows or not rows:
        raise TrioError(
            f"{what}: qweight {list(words)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} do not belong together in 4 or 8 bit"
        )
    columns = words[0] * 32 // bits
    block = block_of(columns, len(scales), what)
    if (order := tensors.get("g_idx")) is not None:
        refuse_other_order(order, block, what)
    zero = codes_of(zeros, bits, 1)[:, :rows]
    top = (1 << bits) - 1
    if less and bool((zero == top).any()):  # 0 - 1 in unsigned, which readers take for 0 or 16
        raise TrioError(
            f"{what}: a zero point of {top} in the form gptq stands for 0 or for {top + 1}: use a "
            "checkpoint in the form gptq_v2, or one that is symmetric"
        )
    return Blocks(rows, columns, bits, block, scales.T, (zero + np.uint8(less)).T)


def codes_of_gptq(words: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Take `qweight` apart: uint8 [N, K]."""
    return codes_of(words, blocks.bits, 0).T
