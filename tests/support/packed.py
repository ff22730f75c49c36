"""Quantised matrices in the words of checkpoints, packed code by code from each format's text.

Slow and plain on purpose: what reads them was written apart from this.
"""

from __future__ import annotations

import numpy as np

from trio_deploy.quant.matrix import QuantisedMatrix, block_count

#: AWQ: the column of each field of a word, from the lowest bits.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def random_matrix(
    rows: int, columns: int, bits: int, block: int, *, symmetric: bool = True, seed: int = 0
) -> QuantisedMatrix:
    """Random codes, scales and, unless symmetric, zero points between the outer codes."""
    rng, top = np.random.default_rng(seed), 1 << bits
    blocks = (rows, block_count(columns, block))
    codes = rng.integers(0, top, (rows, columns)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, blocks).astype(np.float16).astype(np.float32)
    zero = None if symmetric else rng.integers(1, top - 1, blocks).astype(np.uint8)
    return QuantisedMatrix(codes, scale, zero, bits, block)


def zeros_of(matrix: QuantisedMatrix) -> np.ndarray:
    """Zero points, also of a symmetric matrix."""
    return (
        np.full_like(matrix.scale, matrix.offset, np.uint8) if matrix.zero is None else matrix.zero
    )


def in_compressed_tensors(
    matrix: QuantisedMatrix, scale_type: np.typing.DTypeLike = np.float16
) -> dict[str, np.ndarray]:
    """`pack-quantized` of compressed-tensors."""
    arrays = {
        "weight_packed": _words_along_rows(matrix.codes, matrix.bits),
        "weight_scale": matrix.scale.astype(scale_type),
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if matrix.zero is not None:
        packed = _words_along_rows(np.ascontiguousarray(matrix.zero.T), matrix.bits)
        arrays["weight_zero_point"] = np.ascontiguousarray(packed.T)
    return arrays


def in_awq(matrix: QuantisedMatrix) -> dict[str, np.ndarray]:
    """AWQ `gemm`."""
    assert matrix.bits == 4

    def words(values: np.ndarray) -> np.ndarray:  # [n, N]
        shuffled = values.reshape(len(values), -1, 8)[:, :, list(_AWQ)]
        return _words_along_rows(shuffled.reshape(len(values), -1), 4)

    return {
        "qweight": words(matrix.codes.T),
        "qzeros": words(zeros_of(matrix).T),
        "scales": np.ascontiguousarray(matrix.scale.T.astype(np.float16)),
    }


def in_gptq(matrix: QuantisedMatrix, less: int = 1) -> dict[str, np.ndarray]:
    """GPTQ, `gptq` (`less` 1) or `gptq_v2` (0)."""
    stored = np.ascontiguousarray(zeros_of(matrix).T - np.uint8(less))
    columns = matrix.codes.shape[1]
    return {
        "qweight": np.ascontiguousarray(_words_along_rows(matrix.codes, matrix.bits).T),
        "qzeros": _words_along_rows(stored, matrix.bits),
        "scales": np.ascontiguousarray(matrix.scale.T.astype(np.float16)),
        "g_idx": (np.arange(columns) // matrix.block).astype(np.int32),
    }


def _words_along_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, ⌈K·bits/32⌉]; fields behind the end of a row are 0."""
    rows, columns = codes.shape
    count = 32 // bits
    words = np.zeros((rows, -(-columns // count)), np.uint32)
    for n in range(rows):
        for k in range(columns):
            words[n, k // count] |= np.uint32(int(codes[n, k]) << bits * (k % count))
    return words.view(np.int32)
