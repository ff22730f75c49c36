"""Rotary position embedding: frequencies and angles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.errors import TrioError
from trio_deploy.families.base import RopeConfig, TextConfig
from trio_deploy.graphs.dialects.base import Angles, Dialect
from trio_deploy.graphs.values import FLOAT, cast, constant


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
    """Compute the angles of int64 positions [B, S] in fp32; cast them to `dtype` (the graph's)."""
    frequency = constant(op, inverse_frequencies(text.rope, text.head_dim), "inv_freq")
    angle = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequency)
    dtype = dtype or d.dtype
    return Angles(cast(op, op.Cos(angle), dtype), cast(op, op.Sin(angle), dtype))
