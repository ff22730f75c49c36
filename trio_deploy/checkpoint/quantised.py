"""Quantised matrices of a checkpoint: which tensors make up each, and reading one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trio_deploy.checkpoint.safetensors import DTYPES, INTEGERS, TensorEntry
from trio_deploy.errors import TrioError
from trio_deploy.quant.forms import FORMS, CheckpointForm
from trio_deploy.quant.matrix import QuantisedMatrix
from trio_deploy.quant.quantization_config import QuantizationConfig
from trio_deploy.quant.words import Blocks


@dataclass(frozen=True)
class QuantisedEntry:
    """Where the tensors of a quantised matrix lie, and what they say of it.

    Attributes:
        module: its name in the checkpoint, without the last part of the tensors' names.
        form: how they hold it.
        tensors: by the last part of their names.
        shape: of the matrix, N and K.
        bits: 4 or 8.
        block: entries along K that share a scale.
        symmetric: whether it surely needs no zero points.
    """

    module: str
    form: CheckpointForm
    tensors: Mapping[str, TensorEntry]
    shape: tuple[int, ...]
    bits: int
    block: int
    symmetric: bool

    @property
    def file(self) -> Path:
        """The file that holds the codes."""
        return self.tensors[self.form.codes].file

    def read(self) -> QuantisedMatrix:
        """Read the matrix.

        Raises:
            TrioError: its tensors contradict each other.
        """
        arrays = {name: entry.read() for name, entry in self.tensors.items()}
        return self.form.read(arrays, f"{self.file}: {self.module}")


def weights_of(
    tensors: Mapping[str, TensorEntry], said: QuantizationConfig | None
) -> dict[str, TensorEntry | QuantisedEntry]:
    """Weights by name, the tensors of a quantised matrix as one: `q_proj.weight`.

    Which matrices are quantised, in how many bits and blocks, is what the tensors say: all but
    codes are read for that, some 60 MB of a model of 7B. What config.json says must not differ.

    Args:
        said: what config.json says; None: that nothing is quantised.

    Raises:
        TrioError: tensors are missing or contradict each other or `said`.
    """
    if said is None:
        _refuse_codes(tensors)
        return dict(tensors)
    form = FORMS[said.form]
    modules = [name[: -len(form.codes) - 1] for name in tensors if name.endswith(f".{form.codes}")]
    weights: dict[str, TensorEntry | QuantisedEntry] = dict(tensors)
    for module in modules:
        parts = _parts(tensors, module, form)
        for part in parts:
            del weights[f"{module}.{part}"]
        name = f"{module}.weight"
        if name in weights:
            raise TrioError(
                f"the checkpoint has {name!r} both as a float tensor and quantised: download it "
                "again"
            )
        weights[name] = _entry(module, form, parts, said)
    return weights


def _parts(
    tensors: Mapping[str, TensorEntry], module: str, form: CheckpointForm
) -> dict[str, TensorEntry]:
    """The tensors of a matrix, by the last part of their names."""
    names = (*form.needed, *form.optional)
    parts = {n: tensors[f"{module}.{n}"] for n in names if f"{module}.{n}" in tensors}
    for name in form.needed:
        if name not in parts:
            raise TrioError(
                f"{parts[form.codes].file} has the codes of {module!r}, but there is no tensor "
                f"{name}: download the checkpoint again"
            )
    for name, entry in parts.items():
        allowed = DTYPES if name == form.scales else INTEGERS
        if entry.dtype not in allowed or (name == form.codes and entry.dtype != "I32"):
            raise TrioError(
                f"{entry.file}: tensor {f'{module}.{name}'!r} is {entry.dtype}, which "
                f"{form.source} does not have there: use the checkpoint before quantisation"
            )
    return parts


def _entry(
    module: str, form: CheckpointForm, parts: Mapping[str, TensorEntry], said: QuantizationConfig
) -> QuantisedEntry:
    codes, what = parts[form.codes], f"{parts[form.codes].file}: {module}"
    others: dict[str, np.ndarray] = {n: e.read() for n, e in parts.items() if n != form.codes}
    blocks = form.blocks(codes.shape, others, what)
    _compare(blocks, said, module, what)
    shape = (blocks.rows, blocks.columns)
    return QuantisedEntry(module, form, parts, shape, blocks.bits, blocks.block, blocks.symmetric)


def _compare(blocks: Blocks, said: QuantizationConfig, module: str, what: str) -> None:
    """Raise TrioError where config.json says something else than the tensors of a matrix."""
    differs = None
    if blocks.bits not in said.bits:
        differs = f"has {blocks.bits} bit, not {' or '.join(map(str, sorted(said.bits)))}"
    elif said.symmetric and not blocks.centred:
        other = "; if its checkpoint_format is gptq_v2, say so there" if said.form == "gptq" else ""
        differs = f"has zero points, which a symmetric matrix has not{other}"
    elif said.leaves_out(module):
        differs = "is quantised, although it is among the modules that are not"
    if differs is not None:
        raise TrioError(
            f"{what} {differs}: the quantization_config of config.json and the weights do not "
            "belong together"
        )


def _refuse_codes(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise TrioError where tensors are codes although config.json does not say so."""
    for form in FORMS.values():
        for name, entry in tensors.items():
            if name.endswith(f".{form.codes}"):
                raise TrioError(
                    f"{entry.file} holds quantised weights ({name!r}), but config.json has no "
                    "quantization_config: download the checkpoint again"
                )
