"""A matrix in whole numbers of few bits, with a scale per block: what every scheme starts from.

Matrices are [N, K] = [out, in] as in checkpoints; blocks run along K, the last axis. Rounding to
nearest and readers of quantised checkpoints make a `QuantisedMatrix`; `packing.py` brings it into
the bytes that graphs read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trio_deploy.errors import TrioError

#: The smallest scale, so that none is 0 in float16.
LEAST_SCALE = 2.0**-24


@dataclass(frozen=True)
class QuantisedMatrix:
    """W ≈ (codes - zero) · scale, by blocks of K.

    Attributes:
        codes: uint8 [N, K], one code per entry, 0…2^bits - 1.
        scale: float32 [N, ⌈K/block⌉], above 0.
        zero: uint8 [N, ⌈K/block⌉], the code of 0; None: 2^(bits-1) everywhere (symmetric).
        bits: 4 or 8.
        block: entries along K that share a scale; the last block may be short. K or more: a scale
            per row.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    block: int

    def __post_init__(self) -> None:
        """Raise TrioError where shapes, types or values contradict each other."""
        if self.bits not in (4, 8) or self.block < 1:
            raise TrioError(f"a matrix cannot have {self.bits} bits in blocks of {self.block}")
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise TrioError(f"codes are uint8 [N, K], not {self.codes.dtype} {self.codes.shape}")
        rows, columns = self.codes.shape
        blocks = (rows, block_count(columns, self.block))
        if self.scale.shape != blocks or self.scale.dtype != np.float32:
            raise TrioError(
                f"scales must be float32 {list(blocks)}, not {self.scale.dtype} "
                f"{list(self.scale.shape)}"
            )
        if self.zero is not None and (self.zero.shape != blocks or self.zero.dtype != np.uint8):
            raise TrioError(
                f"zero points must be uint8 {list(blocks)}, not {self.zero.dtype} "
                f"{list(self.zero.shape)}"
            )
        if not bool(np.all((self.scale > 0) & np.isfinite(self.scale))):
            raise TrioError("a scale is not above 0: the checkpoint is damaged")

    @property
    def offset(self) -> int:
        """The code of 0 where there are no zero points."""
        return 1 << (self.bits - 1)


def block_count(columns: int, block: int) -> int:
    """Number of blocks of a row of K entries."""
    return -(-columns // block)


def round_to_nearest(
    array: np.ndarray, bits: int, block: int, scale_dtype: np.typing.DTypeLike = np.float32
) -> QuantisedMatrix:
    """Round a matrix symmetrically: scale = max|w| / 7 or 127 per block, codes -8…7 or -127…127.

    Rows are independent, so a matrix may be rounded a few rows at a time. A block of zeros has
    scale 1.

    Args:
        array: floats [N, K].
        bits: 4 or 8.
        block: entries per scale.
        scale_dtype: float type that scales are stored in; codes belong to the scales after they
            were rounded to it.

    Raises:
        TrioError: a value is not finite.
    """
    rows, columns = array.shape
    wide = array.astype(np.float32, copy=False)
    blocks = _in_blocks(wide, block)
    most = np.abs(blocks).max(axis=2)  # [N, blocks]
    if not bool(np.isfinite(most).all()):
        raise TrioError("a value is not finite, so the matrix cannot be quantised")
    top = (1 << (bits - 1)) - 1
    scale = np.where(most > 0, np.maximum(most / np.float32(top), LEAST_SCALE), 1.0)
    scale = scale.astype(scale_dtype).astype(np.float32)
    low = -top if bits == 8 else -top - 1
    codes = np.clip(np.rint(blocks / scale[:, :, None]), low, top) + (top + 1)
    codes = codes.astype(np.uint8).reshape(rows, -1)[:, :columns]
    return QuantisedMatrix(np.ascontiguousarray(codes), scale, None, bits, block)


def dequantised(matrix: QuantisedMatrix) -> np.ndarray:
    """The values that a matrix stands for, float32 [N, K]."""
    rows, columns = matrix.codes.shape
    blocks = _in_blocks(matrix.codes.astype(np.float32), matrix.block)
    zero = np.float32(matrix.offset) if matrix.zero is None else matrix.zero[:, :, None]
    values = (blocks - zero) * matrix.scale[:, :, None]
    return np.ascontiguousarray(values.astype(np.float32).reshape(rows, -1)[:, :columns])


def in_8_bit(matrix: QuantisedMatrix) -> QuantisedMatrix:
    """A matrix of 4 bit in 8 bit, to the same values and without zero points."""
    columns = matrix.codes.shape[1]
    zero: int | np.ndarray = matrix.offset
    if matrix.zero is not None:
        zero = np.repeat(matrix.zero.astype(np.int16), matrix.block, axis=1)[:, :columns]
    codes = (matrix.codes.astype(np.int16) - zero + 128).astype(np.uint8)
    return QuantisedMatrix(codes, matrix.scale, None, 8, matrix.block)


def in_blocks(matrix: QuantisedMatrix, block: int) -> QuantisedMatrix:
    """A matrix in smaller blocks, to the same values.

    Args:
        block: divides the matrix's; of any size where that has a scale per row.
    """
    columns = matrix.codes.shape[1]
    of = np.arange(block_count(columns, block)) * block // matrix.block  # old block of each
    scale = np.ascontiguousarray(matrix.scale[:, of])
    zero = None if matrix.zero is None else np.ascontiguousarray(matrix.zero[:, of])
    return QuantisedMatrix(matrix.codes, scale, zero, matrix.bits, block)


def _in_blocks(array: np.ndarray, block: int) -> np.ndarray:
    """Cut rows [N, K] into blocks [N, ⌈K/block⌉, block], a short last one filled with zeros."""
    rows, columns = array.shape
    missing = -columns % block
    if missing:
        array = np.pad(array, ((0, 0), (0, missing)))
    return array.reshape(rows, -1, block)
