"""Options of the graphs of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from trio_deploy.bundle.manifest import Kind
from trio_deploy.config.options import DEFAULT_THRESHOLD
from trio_deploy.config.target import SELECTIONS, TABLES, WEIGHTS
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.dialects.table import DIALECTS
from trio_deploy.graphs.values import FLOAT_TYPES
from trio_deploy.graphs.weights import stored_weights
from trio_deploy.quant.schemes import (
    WHOLE_NUMBERS,
    Scheme,
    StoredMatrix,
    scheme_named,
    scheme_of,
)
from trio_deploy.quant.stored_weight import StoredWeight


@dataclass(frozen=True)
class GraphOptions:
    """Dialect, float type, decode layout, and how select graphs choose tokens.

    Attributes:
        dialect: a name in `dialects/table.py`: `ort` (ONNX Runtime), `onnx` (opset 23 and 24) or
            `primitive` (opset 17).
        dtype: float type of weights, hidden states and the KV cache.
        probe: whether the probes end at the last text token (`last`) or one before (`shifted`).
        probes: number of probes per row at most.
        positions: position of a kept token: as before (`original`) or its new index (`renumber`).
        threshold: cosine similarity at and above which a kept token suppresses another.
        weights: whether matrices are `constants` of the graphs or their `inputs`, of which one copy
            serves all stages. Vectors are constants in either case.
        separate_decode: whether to write decode.onnx; always true for a dialect whose prefill
            graphs take no past.
        query_block: as of `Dialect`, for the vision tower over pictures of any size.
        quantize: scheme of `quant.schemes.SCHEMES` for decoder layers and the head; None: float.
        selections: what selections compute with beside quantised weights, `int8` or `float`.
        embeddings: whether graphs that look tokens up hold the table of embeddings (`device`), or
            take `token_embeddings`, which the host has looked up (`host`).
        stored: matrices that the checkpoint holds quantised, whose scheme `quantize` names; None:
            all are rounded.
        inputs: as of `Scheme`.
    """

    dialect: str = "ort"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    probe: Literal["last", "shifted"] = "last"
    probes: int = 4
    positions: Literal["original", "renumber"] = "renumber"
    threshold: float = DEFAULT_THRESHOLD
    weights: Literal["constants", "inputs"] = "constants"
    separate_decode: bool = False
    query_block: int | None = None
    quantize: str | None = None
    selections: Literal["int8", "float"] = "int8"
    embeddings: Literal["device", "host"] = "device"
    stored: Mapping[str, StoredMatrix] | None = None
    inputs: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dialect", DIALECTS),
            ("dtype", FLOAT_TYPES),
            ("probe", ("last", "shifted")),
            ("positions", ("original", "renumber")),
            ("weights", WEIGHTS),
            ("selections", SELECTIONS),
            ("embeddings", TABLES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise TrioError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
        if self.quantize is not None:
            scheme = scheme_named(self.quantize)
            if scheme.kind == "fp" and DIALECTS[self.dialect].form != "signed":
                able = [name for name, made in DIALECTS.items() if made.form == "signed"]
                raise TrioError(
                    f"{self.dialect} graphs are computed by ONNX Runtime, which has no products "
                    f"with weights in {self.quantize}: choose the dialect {' or '.join(able)}, or "
                    f"quantize {', '.join(WHOLE_NUMBERS)}"
                )
            if self.weights == "inputs":
                floats = "leave out quantize" if self.stored is None else "use a float checkpoint"
                raise TrioError(
                    "quantised weights are constants of their graphs, since an input's codes would "
                    f"be dequantised as a whole at every run: choose weights constants, or {floats}"
                )
        if self.probes < 1:
            raise TrioError(f"probes must be at least 1, not {self.probes}")
        if self.weights == "inputs" and not DIALECTS[self.dialect].takes_matrices_as_inputs:
            able = [name for name, made in DIALECTS.items() if made.takes_matrices_as_inputs]
            raise TrioError(
                f"{self.dialect} graphs cannot take their weights as inputs, since they would "
                f"transpose every matrix at every run: choose the dialect {' or '.join(able)}, or "
                "weights as constants"
            )
        if DIALECTS[self.dialect].always_decodes_apart and not self.separate_decode:
            object.__setattr__(self, "separate_decode", True)

    @property
    def scheme(self) -> Scheme | None:
        """How matrices are quantised; None: they are float."""
        if self.quantize is None:
            return None
        if self.stored is not None:
            return scheme_of(self.stored)
        return replace(scheme_named(self.quantize), inputs=self.inputs)

    def make_dialect(self, kind: Kind = "prefill") -> Dialect:
        """Make the dialect of the graph of one stage."""
        floats = ("vision", "select") if self.selections == "float" else ("vision",)
        return DIALECTS[self.dialect](
            FLOAT_TYPES[self.dtype],
            kind=kind,
            query_block=self.query_block,
            scheme=None if kind in floats else self.scheme,
        )

    def stored_weights(self, config: ModelConfig) -> list[StoredWeight]:
        """List how each tensor is stored that any stage of a model may use."""
        kinds: tuple[Kind, ...] = ("prefill",) if self.quantize is None else ("prefill", "select")
        return stored_weights(config, *(self.make_dialect(kind) for kind in kinds))
