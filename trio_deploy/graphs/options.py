"""What a caller chooses about the graphs of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trio_deploy.errors import TrioError
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.dialects.table import DIALECTS
from trio_deploy.graphs.values import FLOAT_TYPES


@dataclass(frozen=True)
class GraphOptions:
    """How the stages are written.

    Attributes:
        dialect: a name in `dialects/table.py`: `ort` (ONNX Runtime), `onnx` (opset 23 and 24) or
            `primitive` (opset 17).
        dtype: float type of weights, hidden states and the KV cache.
        probe: the probe positions end at the last valid token (`last`) or one before (`shifted`).
        probes: how many positions are probed at most.
        positions: what a kept token's position is afterwards: its old one or its new index.
        threshold: cosine similarity from which a kept token suppresses another.
        separate_decode: write decode.onnx. The `onnx` dialect always has it: its prefill graphs
            take no past.
    """

    dialect: str = "ort"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    probe: Literal["last", "shifted"] = "last"
    probes: int = 4
    positions: Literal["original", "renumber"] = "renumber"
    threshold: float = 0.8
    separate_decode: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dialect", DIALECTS),
            ("dtype", FLOAT_TYPES),
            ("probe", ("last", "shifted")),
            ("positions", ("original", "renumber")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise TrioError(f"Unknown {name} {value!r}: choose one of {', '.join(allowed)}.")
        if self.probes < 1:
            raise TrioError(f"probes must be at least 1, not {self.probes}.")
        if DIALECTS[self.dialect].always_decodes_apart and not self.separate_decode:
            object.__setattr__(self, "separate_decode", True)

    def make_dialect(self, *, decode: bool = False) -> Dialect:
        """The dialect of one graph; `decode`: it is decode.onnx."""
        return DIALECTS[self.dialect](FLOAT_TYPES[self.dtype], decode=decode)
