"""Small operations on values of a graph; types that shape inference cannot know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
INT32 = ir.DataType.INT32
BOOL = ir.DataType.BOOL

#: Float types of graphs by the names that users write.
FLOAT_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}

FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}

#: Types of parts of weights by name.
PART_TYPES = {
    **FLOAT_TYPES,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float4_e2m1fn": ir.DataType.FLOAT4E2M1,
}

_TINY = 1e-37  # below it a gradient counts as zero


def typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[Any] | None) -> ir.Value:
    """Declare the type and shape of a value that inference cannot know; return it."""
    value.type = ir.TensorType(dtype)
    if shape is not None:
        value.shape = ir.Shape(shape)
    return value


def dtype_of(value: ir.Value) -> ir.DataType:
    """Element type, which must be known."""
    if value.type is None:
        raise RuntimeError(f"the type of {value.name} is not known")
    return value.type.dtype


def shape_of(value: ir.Value) -> list[Any]:
    """Dimensions (ints, symbols or None), whose number must be known."""
    if value.shape is None:
        raise RuntimeError(f"the shape of {value.name} is not known")
    return list(value.shape)


def cast(op: Any, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast, unless the value has that type already."""
    return value if dtype_of(value) == dtype else op.Cast(value, to=dtype)


def constant(op: Any, array: np.ndarray, name: str) -> ir.Value:
    """Add a small array as the initializer `const.<name>`, once per name."""
    full = f"const.{name}"
    graph = op.builder.root.graph
    known = graph.initializers.get(full)
    if known is not None:
        if not np.array_equal(known.const_value.numpy(), array):
            raise RuntimeError(f"two different constants are called {full}")
        return known
    return op.builder.initializer(ir.tensor(array, name=full), name=full, qualify=False)


def reduce(
    op: Any, kind: str, value: ir.Value, axes: Sequence[int], *, keepdims: bool = True
) -> ir.Value:
    """Reduce by ReduceSum, ReduceMean, …: the axes became an input in opset 13 or 18."""
    if kind == "ReduceSum" or op.version >= 18:
        return getattr(op, kind)(value, list(axes), keepdims=int(keepdims))
    return getattr(op, kind)(value, axes=list(axes), keepdims=int(keepdims))


def filled(op: Any, shape: ir.Value, value: Any) -> ir.Value:
    """Make a tensor of `shape` int64 [rank] in which every entry is one numpy scalar."""
    return op.ConstantOfShape(shape, value=ir.tensor(np.array([value])))


def dim(op: Any, value: ir.Value, axis: int) -> ir.Value:
    """Size of one axis, int64 [1]."""
    return op.Shape(value, start=axis, end=axis + 1)


def split_heads(op: Any, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Split the last axis into heads: [B, S, N·D] → [B, N, S, D]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: Any, x: ir.Value) -> ir.Value:
    """Join heads: [B, N, S, D] → [B, S, N·D]."""
    _, heads, _, head_dim = shape_of(x)
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, int(heads) * int(head_dim)])


def last_two_swapped(rank: int) -> list[int]:
    """The `perm` of a Transpose that swaps the last two of `rank` axes."""
    return [*range(rank - 2), rank - 1, rank - 2]


def over_power_of_two(op: Any, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Divide x f32 [B, m, n] by a power of two per batch row; return also the power, [B, 1, 1].

    The sum of magnitudes comes to lie within 1…2, so nothing overflows or underflows in fp16.
    """
    total = op.Max(reduce(op, "ReduceSum", op.Abs(x), [1, 2]), _TINY)
    power = op.Pow(2.0, op.Floor(op.Mul(op.Log(total), 1.0 / math.log(2.0))))
    return op.Div(x, power), power


def scaled_product(
    op: Any, dtype: ir.DataType, g: ir.Value, product: Callable[[ir.Value], ir.Value]
) -> ir.Value:
    """Compute product(g) for a gradient g in fp32, the product itself in `dtype`."""
    if dtype == FLOAT:
        return product(g)
    total = op.Max(reduce(op, "ReduceSum", op.Abs(g), range(1, len(shape_of(g)))), _TINY)
    return op.Mul(cast(op, product(cast(op, op.Div(g, total), dtype)), FLOAT), total)
