"""The bytes of a quantised matrix, as graphs read them.

Matrices stay [N, K]. Codes of 4 bit are two per byte, the first in the low nibble. Two layouts:

* `blocks`, which com.microsoft.MatMulNBits reads: codes uint8 [N, ⌈K/b⌉, b·bits/8], unsigned, a
  short last block filled up with the code of 0; scales [N, ⌈K/b⌉]; zero points, if the matrix has
  any, uint8 [N, ⌈⌈K/b⌉·bits/8⌉].
* `signed`, which DequantizeLinear reads: codes less 2^(bits-1), int8 or int4 [N, K]; scales
  [N, K/b], or of 8 bit [N] if a row has one. It has no zero points and no short blocks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import QuantisedMatrix, block_count

Form = Literal["blocks", "signed"]
"""Layouts by name."""


def pack(matrix: QuantisedMatrix, form: Form) -> dict[str, np.ndarray]:
    """The stored arrays of a matrix: `codes`, `scale` and, if it has zero points, `zero`.

    Codes are uint8 arrays whatever their type in graphs: [N, ⌈K/b⌉, b·bits/8] in `blocks`, [N, K]
    or for 4 bit [N, K/2] in `signed`. Scales are float32.

    Raises:
        TrioError: the layout cannot hold the matrix.
    """
    rows, columns = matrix.codes.shape
    if form == "signed":
        if matrix.zero is not None:
            raise TrioError("signed codes have no zero points: quantise the matrix symmetrically")
        per_row = matrix.block >= columns
        if columns % matrix.block and not per_row:
            raise TrioError(f"rows of {columns} are no whole blocks of {matrix.block}")
        signed = matrix.codes ^ np.uint8(matrix.offset)  # less 2^(bits-1), in two's complement
        codes = signed if matrix.bits == 8 else nibbles(signed)
        alone = per_row and matrix.bits == 8  # types of 4 bit need blocks
        return {"codes": codes, "scale": matrix.scale[:, 0] if alone else matrix.scale}
    blocks = block_count(columns, matrix.block)
    full = np.empty((rows, blocks, matrix.block), np.uint8)
    full[:] = matrix.offset if matrix.zero is None else matrix.zero[:, :, None]
    full.reshape(rows, -1)[:, :columns] = matrix.codes
    codes = full if matrix.bits == 8 else nibbles(full)
    packed = {"codes": codes, "scale": matrix.scale}
    if matrix.zero is not None:
        even = np.pad(matrix.zero, ((0, 0), (0, blocks % 2)))
        packed["zero"] = matrix.zero if matrix.bits == 8 else nibbles(even)
    return packed


def unpack(arrays: dict[str, np.ndarray], form: Form, columns: int, bits: int) -> QuantisedMatrix:
    """The matrix that `pack` made `arrays` of.

    Args:
        arrays: as `pack` returns them; scales in any float type.
        columns: K.
    """
    codes, scale = arrays["codes"], np.asarray(arrays["scale"]).astype(np.float32)
    scale = scale.reshape(len(codes), -1)
    if form == "signed":
        whole = codes.view(np.uint8) if bits == 8 else apart(codes)
        block = columns // scale.shape[1]
        return QuantisedMatrix(whole ^ np.uint8(1 << (bits - 1)), scale, None, bits, block)
    whole = codes if bits == 8 else apart(codes)
    block = whole.shape[2]
    zero = arrays.get("zero")
    if zero is not None and bits == 4:
        zero = np.ascontiguousarray(apart(zero)[:, : scale.shape[1]])
    cut = np.ascontiguousarray(whole.reshape(len(codes), -1)[:, :columns])
    return QuantisedMatrix(cut, scale, zero, bits, block)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack codes of 4 bit [..., n], n even, into bytes [..., n/2]."""
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def apart(packed: np.ndarray) -> np.ndarray:
    """Unpack bytes [..., n/2] into codes of 4 bit [..., n]."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., ::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes
