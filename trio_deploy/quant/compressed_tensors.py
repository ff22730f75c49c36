"""compressed-tensors, format `pack-quantized`, as llm-compressor writes it.

For a matrix [N, K], b bits (4 or 8), blocks of g entries (g = K: one scale per row):

* `weight_packed` int32 [N, ⌈K·b/32⌉]: codes along K, the first in the lowest bits; a code is the
  signed number plus 2^(b-1).
* `weight_scale` float [N, K/g]; [1]: one for the matrix.
* `weight_shape` int64 [2]: N, K.
* `weight_zero_point`, where blocks are asymmetric: int32 [⌈N·b/32⌉, K/g], packed along N like
  codes; older releases wrote it int8 [N, K/g], signed and not packed.
* `weight_g_idx` int32 [K], the block of each column, where columns are ordered by activation.

W = (code - zero) · scale. The bytes of `weight_packed` are those that MatMulNBits reads.

Source: compressors/quantized_compressors/pack_quantized.py of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.words import Blocks, block_of, codes_of, refuse_other_order

CODES = "weight_packed"
NEEDED = (CODES, "weight_scale", "weight_shape")
OPTIONAL = ("weight_zero_point", "weight_g_idx")


def blocks_of_compressed_tensors(
    words: tuple[int, ...], tensors: Mapping[str, np.ndarray], what: str
) -> Blocks:
    """Read what the checkpoint says of a matrix beside its codes.

    Args:
        words: shape of `weight_packed`.
        tensors: the other ones of `NEEDED`, and any of `OPTIONAL`, by name.
        what: name of the matrix, for messages.

    Raises:
        TrioError: the tensors contradict each other, or the columns have another order.
    """
    scale, shape = tensors["weight_scale"], tensors["weight_shape"].reshape(-1)
    if len(shape) != 2 or shape.min() < 1:
        raise TrioError(f"{what}: weight_shape is not the shape of a matrix")
    rows, columns = (int(size) for size in shape)
    bits = next((b for b in (4, 8) if words == (rows, -(-columns * b // 32))), None)
    if bits is None:
        raise TrioError(
            f"{what}: words {list(words)} do not hold a matrix {[rows, columns]} in 4 or 8 bit"
        )
    if scale.size == 1:
        scale = np.broadcast_to(scale.reshape(1, 1), (rows, 1))
    if scale.ndim != 2 or scale.shape[0] != rows:
        raise TrioError(f"{what}: scales {list(scale.shape)} do not suit {rows} rows")
    block = block_of(columns, scale.shape[1], what)
    if (order := tensors.get("weight_g_idx")) is not None:
        refuse_other_order(order, block, what)
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = _zero_points(zero, bits, rows)
        if zero.shape != scale.shape:
            raise TrioError(f"{what}: zero points {list(zero.shape)}, scales {list(scale.shape)}")
    return Blocks(rows, columns, bits, block, scale, zero)


def codes_of_compressed_tensors(words: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Take `weight_packed` apart: uint8 [N, K]."""
    return codes_of(words, blocks.bits, 1)[:, : blocks.columns]


def _zero_points(zero: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Zero points as codes, uint8 [N, blocks]."""
    if zero.dtype == np.int8:
        return (zero.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return codes_of(zero, bits, 0)[:rows]
