"""Rotary position embedding: frequencies and angles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.errors import TrioError
from trio_deploy.families.base import RopeConfig, TextConfig
from trio_deploy.graphs.dialects.base import Angles, Dialect
from trio_deploy.graphs.values import FLOAT, cast, constant, dim, shape_of, typed

_GRID_THETA = 10000.0  # of patches; no model has another


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Compute the frequencies as transformers' `ROPE_INIT_FUNCTIONS` does, float32 [D/2].

    Raises:
        TrioError: a scaling other than `default`, `linear` and `llama3`.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # Powers are rounded to fp32 only once, as in torch: numpy's fp32 power is off by a last digit
    # for a tenth of them, and at position 2900 an angle is then off by 2e-4.
    powers = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / powers
    if rope.scaling == "default":
        return inverse
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor)
    if rope.scaling == "llama3":
        wavelength = 2.0 * np.pi / inverse
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blend = (1 - smooth) * inverse / rope.factor + smooth * inverse
        scaled = np.where(wavelength > low, inverse / rope.factor, inverse)
        scaled = np.where((wavelength >= high) & (wavelength <= low), blend, scaled)
        return scaled.astype(np.float32)
    raise TrioError(
        f"rotary scaling {rope.scaling!r} is not supported: use default, linear or llama3"
    )


def rotary_angles(
    op: Any, d: Dialect, text: TextConfig, positions: ir.Value, dtype: ir.DataType | None = None
) -> Angles:
    """Compute the angles of int64 positions in fp32; cast them to `dtype` (the graph's).

    Positions are [B, S], or [B, 3, S] where each frequency takes one of three (`RopeConfig.axes`).
    They are picked, not multiplied by a matrix: a GPU would round such a product.
    """
    frequency = constant(op, inverse_frequencies(text.rope, text.head_dim), "inv_freq")
    if len(shape_of(positions)) == 3:
        axes = constant(op, np.array(text.rope.axes, np.int64), "axes")
        places = op.Cast(op.Transpose(positions, perm=[0, 2, 1]), to=FLOAT)
        angle = op.Mul(op.Gather(places, axes, axis=2), frequency)
    else:
        angle = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequency)
    dtype = dtype or d.dtype
    return Angles(cast(op, op.Cos(angle), dtype), cast(op, op.Sin(angle), dtype))


def grid_angles(op: Any, d: Dialect, head_dim: int, position: ir.Value, like: ir.Value) -> Angles:
    """Compute the angles of patches by their places in the grid, in fp32; cast to the graph's type.

    The first half of the frequencies turns by the row, the second by the column.

    Args:
        position: row and column of each patch, int64 [L, 2].
        like: any value [T, ...]; the angles are the same for all T.
    """
    inverse = inverse_frequencies(RopeConfig(_GRID_THETA), head_dim // 2)
    frequency = constant(op, inverse, "inv_freq")
    angle = op.Mul(op.Unsqueeze(op.Cast(position, to=FLOAT), [2]), frequency)  # [L, 2, D/4]
    angle = op.Reshape(angle, [1, -1, head_dim // 2])
    # RotaryEmbedding does not broadcast.
    shape = op.Concat(dim(op, like, 0), dim(op, position, 0), [head_dim // 2], axis=0)
    cos, sin = (
        typed(op.Expand(cast(op, each, d.dtype), shape), d.dtype, [None, None, head_dim // 2])
        for each in (op.Cos(angle), op.Sin(angle))
    )
    return Angles(cos, sin)


def position_shape(text: TextConfig) -> list[int | str]:
    """Shape of the positions of B rows of S tokens: [B, S], or [B, 3, S]."""
    return ["B", "S"] if text.rope.axes is None else ["B", 3, "S"]


def positions_at(op: Any, positions: ir.Value, index: ir.Value) -> ir.Value:
    """Pick the positions of the tokens int64 [B, P] of each row: [B, P], or [B, 3, P]."""
    if len(shape_of(positions)) == 2:
        return op.GatherElements(positions, index, axis=1)
    return op.GatherElements(positions, op.Expand(op.Unsqueeze(index, [1]), [1, 3, 1]), axis=2)
