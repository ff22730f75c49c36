"""The menu of schemes, and how one matrix is stored under each.

A scheme says how many bits the matrices of the decoder layers have. The output head has 8, since
4 move more tokens there than anywhere else; so have the copies of a layer's matrices that
selections compute with, since it is their rounding that decides which tokens are kept. Everything
else stays float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import block_count, dequantised, round_to_nearest
from trio_deploy.quant.packing import Form, pack, unpack
from trio_deploy.quant.stored_weight import FLOATS, Coding, Part, StoredWeight

#: Blocks of matrices in 8 bit, where they have any: the first that divides a row.
_BLOCKS_OF_8 = (128, 64)

#: How rounding to nearest computes codes: a bundle names it, so that a change can be told.
ROUNDING = 1


@dataclass(frozen=True)
class Scheme:
    """A line of the menu.

    Attributes:
        name: as users write it.
        bits: of the matrices of decoder layers, 4 or 8.
        blocks: entries that share a scale; the first that divides a row.
    """

    name: str
    bits: int
    blocks: tuple[int, ...]


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, _BLOCKS_OF_8),
        Scheme("int4", 4, (128, 64)),
        Scheme("int4-g32", 4, (32,)),
    )
}


NO_SCHEME = "none"
"""What users write to leave weights float where a recipe or target says otherwise."""


def scheme_named(name: str) -> Scheme:
    """A scheme of the menu.

    Raises:
        TrioError: there is none of that name.
    """
    if name not in SCHEMES:
        raise TrioError(f"unknown quantisation {name!r}: choose one of {', '.join(SCHEMES)}, none")
    return SCHEMES[name]


def quantised_weight(name: str, shape: Sequence[int], coding: Coding) -> StoredWeight:
    """A matrix [N, K] as the parts `<name>.int4`, its codes, and `<name>.int4.scale`."""
    rows, columns = shape
    blocks, codes = block_count(columns, coding.block), f"{name}.int{coding.bits}"
    if coding.form == "blocks":
        bytes_per_block = coding.block * coding.bits // 8
        first = Part(codes, (rows, blocks, bytes_per_block), "uint8")
    else:
        first = Part(codes, (rows, columns), f"int{coding.bits}")
    per_row = coding.form == "signed" and coding.bits == 8 and coding.block >= columns
    scales: tuple[int, ...] = (rows,) if per_row else (rows, blocks)
    parts = (first, Part(f"{codes}.scale", scales, coding.scale_dtype))
    return StoredWeight(name, (rows, columns), parts, coding)


def encode(rows: np.ndarray, coding: Coding) -> tuple[np.ndarray, np.ndarray]:
    """Round some rows of a matrix, floats [n, K]: its codes as bytes, and its scales.

    Raises:
        TrioError: a value is not finite.
    """
    kind = FLOATS[coding.scale_dtype]
    packed = pack(round_to_nearest(rows, coding.bits, coding.block, kind), coding.form)
    return packed["codes"], packed["scale"].astype(kind)


def decode(codes: np.ndarray, scale: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The values of a quantised matrix, float32 [N, K], from the arrays of its parts.

    Args:
        codes: as stored: bytes [N, ⌈K/b⌉, b·bits/8] in blocks, else [N, K] or [N, K/2].
        scale: in any float type.
        bits, columns: of the matrix, K columns.
    """
    form: Form = "blocks" if codes.ndim == 3 else "signed"
    return dequantised(unpack({"codes": codes, "scale": scale}, form, columns, bits))


def coding_of(scheme: Scheme, bits: int, columns: int, form: Form, dtype: str) -> Coding:
    """How a matrix with rows of K entries is stored under a scheme.

    In `signed` codes of 8 bit each row has a scale, in float32, the one type that DequantizeLinear
    takes before opset 19; a row of 4 bit that is no whole number of blocks has 8 bit instead. In
    `blocks` the last block may be short.

    Args:
        bits: of this matrix: the scheme's, or 8 for the head and selections.
        dtype: the graph's float type.
    """
    blocks = scheme.blocks if bits == scheme.bits else _BLOCKS_OF_8
    whole = next((block for block in blocks if columns % block == 0), None)
    if form == "blocks":
        return Coding(bits, whole or blocks[0], form, dtype)
    if bits == 8 or whole is None:
        return Coding(8, columns, form, "float32")
    return Coding(bits, whole, form, dtype)


def split_name(name: str) -> tuple[str, int] | None:
    """The weight and the bits that the name of a part with codes tells; None for other parts."""
    weight, _, label = name.rpartition(".")
    return (weight, int(label[3:])) if label in ("int4", "int8") else None


def coded_part(part: Part) -> tuple[str, tuple[int, ...]]:
    """How a part lies in a .safetensors file, which has no type of 4 bit: its type and shape."""
    if part.dtype == "int4":
        return "uint8", (*part.shape[:-1], math.ceil(part.shape[-1] / 2))
    return part.dtype, part.shape
