"""Weights as they are stored: named parts with a type each.

A float weight is one part, the tensor itself. A quantisation scheme stores a weight as several
parts, such as codes, scales and zero points, each of which is a tensor of the bundle and an
initializer of the graphs that use the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

#: Bytes per element of the types that parts may have.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """One stored tensor.

    Attributes:
        name: its name in graphs and in the bundle's table of tensors.
        shape: as graphs refer to it.
        dtype: a key of `ITEM_BYTES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the checkpoint and the parts that stand for it in a bundle.

    Attributes:
        name: canonical name.
        shape: in the checkpoint.
        parts: in the order of the weight files.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

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
