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
from trio_deploy.quant.matrix import QuantisedMatrix
from trio_deploy.quant.words import block_of, codes_of, matrix_of, refuse_other_order

CODES = "weight_packed"
NEEDED = (CODES, "weight_scale", "weight_shape")
OPTIONAL = ("weight_zero_point", "weight_g_idx")


def read_compressed_tensors(tensors: Mapping[str, np.ndarray], what: str) -> QuantisedMatrix:
    """Read a matrix.

    Args:
        tensors: `NEEDED` and any of `OPTIONAL`, by name.
        what: name of the matrix, for messages.

    Raises:
        TrioError: the tensors contradict each other, or the columns have another order.
    """
    packed, scale = tensors[CODES], tensors["weight_scale"]
    rows, columns = (int(size) for size in tensors["weight_shape"].reshape(-1))
    bits = _bits(packed.shape, rows, columns, what)
    scale = np.broadcast_to(scale.reshape(1, 1), (rows, 1)) if scale.size == 1 else scale
    if scale.ndim != 2 or scale.shape[0] != rows:
        raise TrioError(f"{what}: scales {list(scale.shape)} do not suit {rows} rows")
    block = block_of(columns, scale.shape[1], what)
    if (order := tensors.get("weight_g_idx")) is not None:
        refuse_other_order(order, block, what)
    codes = codes_of(packed, bits, 1)[:, :columns]
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = _zero_points(zero, bits, rows)
    return matrix_of(codes, scale, zero, bits, block)


def _bits(packed: tuple[int, ...], rows: int, columns: int, what: str) -> int:
    for bits in (4, 8):
        if packed == (rows, -(-columns * bits // 32)):
            return bits
    raise TrioError(
        f"{what}: words {list(packed)} do not hold a matrix {[rows, columns]} in 4 or 8 bit"
    )


def _zero_points(zero: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Zero points as codes, uint8 [N, blocks]."""
    if zero.dtype == np.int8:
        return (zero.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return codes_of(zero, bits, 0)[:rows]
