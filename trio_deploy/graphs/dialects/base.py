"""Dialects: which operators a graph may use."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trio_deploy.graphs.options import GraphOptions

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
INT32 = ir.DataType.INT32
BOOL = ir.DataType.BOOL

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Dialect:
    """Which operators a graph may use, and its float type."""

    name: str
    dtype: ir.DataType
    opset: int

    @classmethod
    def of(cls, options: GraphOptions, *, decode: bool = False) -> Dialect:
        """The dialect of one graph; `decode`: it is decode.onnx."""
        opset = {"ort": 23, "onnx": 24 if decode else 23, "primitive": 17}[options.dialect]
        return cls(options.dialect, _DTYPES[options.dtype], opset)
