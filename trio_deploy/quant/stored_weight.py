"""Weights as they are stored: named parts with a type each.

A float weight is one part, the tensor itself. A quantisation scheme stores a weight as several
parts, such as codes, scales and zero points, each of which is a tensor of the bundle and an
initializer of the graphs that use the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from trio_deploy.quant.packing import Form

#: Float types of weights and scales.
FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: Bits per element of the types that parts may have. Elements of 4 bit are two per byte, the first
#: in the low nibble; parts in blocks are bytes.
ITEM_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "uint8": 8,
    "int8": 8,
    "float8_e4m3fn": 8,
    "int4": 4,
    "float4_e2m1fn": 4,
}

Kind = Literal["int", "fp"]
"""Whole numbers, or floats of few bits."""

#: Kinds of codes: type of their parts where they are not in blocks of bytes.
LABELS = {"int4": "int4", "int8": "int8", "fp4": "float4_e2m1fn", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Part:
    """One stored tensor.

    Attributes:
        name: its name in graphs and in the bundle's table of tensors.
        shape: as graphs refer to it.
        dtype: a key of `ITEM_BITS`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (math.prod(self.shape) * ITEM_BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class Coding:
    """How a quantised matrix [N, K] is stored.

    Attributes:
        bits: 4 or 8.
        block: entries along K per scale; K or more: a scale per row.
        form: layout of the codes.
        scale_dtype: type of the scales.
        kind: whether codes are whole numbers or floats of few bits.
        asymmetric: whether a part says what 0 is, of a checkpoint that was quantised so: zero
            points in `blocks`, and in `signed`, which has none, what blocks have added to them.
    """

    bits: int
    block: int
    form: Form
    scale_dtype: str
    asymmetric: bool = False
    kind: Kind = "int"

    @property
    def label(self) -> str:
        """`int4`: by which parts are named, a key of `LABELS`."""
        return f"{self.kind}{self.bits}"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the checkpoint and the parts that stand for it in a bundle.

    Attributes:
        name: canonical name.
        shape: in the checkpoint.
        parts: in the order of the weight files.
        coding: how a quantised matrix is stored: its parts are codes and scales; None: a float
            weight, whose one part is the tensor.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts)


def float_weight(name: str, shape: Iterable[int], dtype: str) -> StoredWeight:
    """Store a tensor whole, in one float type and under its own name."""
    shape = tuple(shape)
    return StoredWeight(name, shape, (Part(name, shape, dtype),))


def parts_of(weights: Iterable[StoredWeight]) -> list[Part]:
    """List the parts of weights, in order."""
    return [part for weight in weights for part in weight.parts]
