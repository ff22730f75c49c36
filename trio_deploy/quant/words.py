"""Codes in words of 32 bit, as quantised checkpoints hold them, and what their scales may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import QuantisedMatrix, block_count

_WORD = 32


def codes_of(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Take words of 32 bit apart into codes, the first in the lowest bits.

    Args:
        words: int32 of any shape.
        bits: of a code, 4 or 8.
        axis: along which the codes of a word lie.

    Returns:
        uint8, 32/bits times as long along `axis`.
    """
    count, mask = _WORD // bits, np.uint32((1 << bits) - 1)
    whole = words.view(np.uint32)
    parts = [((whole >> np.uint32(bits * i)) & mask).astype(np.uint8) for i in range(count)]
    shape = list(words.shape)
    shape[axis] *= count
    return np.stack(parts, axis % words.ndim + 1).reshape(shape)


@dataclass(frozen=True)
class Blocks:
    """What a checkpoint says of a matrix beside its codes.

    Attributes:
        rows, columns: N and K.
        bits: of a code, 4 or 8.
        block: entries along K that share a scale.
        scale: floats [N, K/block], of any sign.
        zero: uint8 [N, K/block], the code of 0; None: 2^(bits-1).
    """

    rows: int
    columns: int
    bits: int
    block: int
    scale: np.ndarray
    zero: np.ndarray | None

    @property
    def centred(self) -> bool:
        """Whether all zero points are 2^(bits-1)."""
        return self.zero is None or bool((self.zero == 1 << (self.bits - 1)).all())

    @property
    def symmetric(self) -> bool:
        """Whether the matrix surely needs no zero points."""
        return self.centred and bool((self.scale >= 0).all())


def matrix_of(codes: np.ndarray, blocks: Blocks) -> QuantisedMatrix:
    """Make a matrix of what a checkpoint holds, to the same values.

    Scales may be 0 there, of blocks of zeros, and below 0, where the greatest entry of a block has
    the code 0: such codes count backwards here. Zero points that are all 2^(bits-1) are left out.

    Args:
        codes: uint8 [N, K].

    Raises:
        TrioError: the parts contradict each other, or a scale is not finite.
    """
    scale, zero = np.ascontiguousarray(blocks.scale.astype(np.float32)), blocks.zero
    codes = np.ascontiguousarray(codes)
    if not bool((scale > 0).all()):
        codes, scale, zero = _positive(codes, scale, zero, blocks.bits, blocks.block)
    if zero is not None:
        middle = 1 << (blocks.bits - 1)
        zero = None if bool((zero == middle).all()) else np.ascontiguousarray(zero)
    return QuantisedMatrix(codes, scale, zero, blocks.bits, blocks.block)


def _positive(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write blocks with scales of 0 and below with scales above 0, to the same values."""
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    columns = codes.shape[1]
    starts = np.arange(0, columns, block)
    least = np.minimum.reduceat(codes, starts, axis=1)  # [N, blocks]
    zero = np.full(scale.shape, middle, np.uint8) if zero is None else zero
    # (q - z)·s = ((t - q) - (t - z))·(-s), where t = 2^bits keeps z = 2^(bits-1) as it is.
    turn = np.where((least > 0) & (zero == middle), top + 1, top).astype(np.int16)

    def wide(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, block, axis=1)[:, :columns]

    below, none = scale < 0, scale == 0
    turned = np.where(wide(below), wide(turn) - codes, codes)
    new_zero = np.where(below, turn - zero, zero).astype(np.uint8)
    turned = np.where(wide(none), wide(new_zero), turned).astype(np.uint8)
    return turned, np.where(none, np.float32(1), np.abs(scale)), new_zero


def block_of(columns: int, blocks: int, what: str) -> int:
    """Entries per scale of rows of K entries that have so many scales.

    Raises:
        TrioError: blocks of one size do not make up the row; names `what`.
    """
    block = -(-columns // max(blocks, 1))
    if blocks < 1 or columns % block or block_count(columns, block) != blocks:
        raise TrioError(
            f"{what}: {blocks} scales per row do not divide rows of {columns}: the checkpoint is "
            "damaged"
        )
    return block


def refuse_other_order(order: np.ndarray, block: int, what: str) -> None:
    """Check that entry k of a row belongs to block k // block.

    Args:
        order: block of each entry, [K].

    Raises:
        TrioError: entries were put into another order (`desc_act`, `actorder`); names `what`.
    """
    if not np.array_equal(order, np.arange(len(order)) // block):
        raise TrioError(
            f"{what}: the columns are ordered by activation (desc_act or actorder 'group'), which "
            "cannot be read: use a checkpoint that was made without it, or the float checkpoint "
            "with --quantize int4"
        )
