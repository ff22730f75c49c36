"""Matrices in floats of 8 and 4 bit, which NVIDIA's GPUs compute with: E4M3 and E2M1.

`fp8` is E4M3 with a scale per row of [N, K]. `nvfp4` is E2M1 in blocks of 16 along K: each block
has a scale in E4M3, and the matrix one in float32, by which those of its blocks are multiplied.
Numbers are rounded to the nearest, ties to the even code. Codes of 4 bit are two per byte, the
first in the low nibble.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import LEAST_SCALE
from trio_deploy.quant.packing import apart, nibbles

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)

#: The greatest number of each, and the least of E4M3 above 0.
MOST_E4M3, MOST_E2M1, LEAST_E4M3 = 448.0, 6.0, 2.0**-9

#: Entries of a row that share a scale in E2M1.
BLOCK = 16


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Round floats to E4M3; what is beyond its range becomes its greatest number."""
    return np.clip(values, -MOST_E4M3, MOST_E4M3).astype(np.float32).astype(E4M3)


def greatest(rows: np.ndarray) -> float:
    """The greatest magnitude in some rows of a matrix.

    Raises:
        TrioError: a value is not finite.
    """
    most = np.abs(rows.astype(np.float32, copy=False)).max(initial=0.0)
    _require_finite(most)
    return float(most)


def input_scale(most: float) -> float:
    """The scale by which activations are rounded to E4M3.

    Args:
        most: their greatest magnitude.
    """
    return max(most / MOST_E4M3, LEAST_SCALE)


def round_to_e4m3(
    rows: np.ndarray, scale_dtype: np.typing.DTypeLike = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Round some rows of a matrix, floats [n, K]: codes uint8 [n, K] and scales [n].

    The scale of a row is max|w| / 448; a row of zeros has scale 1.

    Args:
        scale_dtype: float type that scales are stored in, to which codes belong.

    Raises:
        TrioError: a value is not finite.
    """
    wide = rows.astype(np.float32, copy=False)
    most = np.abs(wide).max(axis=1)
    _require_finite(most)
    scale = np.where(most > 0, np.maximum(most / np.float32(MOST_E4M3), LEAST_SCALE), 1.0)
    stored = scale.astype(scale_dtype)
    return to_e4m3(wide / stored.astype(np.float32)[:, None]).view(np.uint8), stored


def scale_of_matrix(most: float) -> np.ndarray:
    """The scale of a whole matrix in E2M1, float32 []: the greatest block's own is 448.

    Args:
        most: the greatest magnitude in the matrix.
    """
    least = np.finfo(np.float32).tiny  # below it a float32 may become 0
    return np.array(max(most / (MOST_E4M3 * MOST_E2M1), least) if most > 0 else 1.0, np.float32)


def round_to_e2m1(rows: np.ndarray, of_matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round some rows of a matrix, floats [n, K]: codes uint8 [n, K/2] and E4M3 scales [n, K/16].

    The scale of a block is max|w| / 6, in units of the matrix's scale and rounded to E4M3; at least
    its least number, so that none is 0.

    Args:
        of_matrix: the matrix's scale.
    """
    wide = rows.astype(np.float32, copy=False)
    blocks = wide.reshape(len(wide), -1, BLOCK)
    most = np.abs(blocks).max(axis=2)
    scale = to_e4m3(np.maximum(most / np.float32(MOST_E2M1) / of_matrix, LEAST_E4M3))
    inside = blocks / (scale.astype(np.float32) * of_matrix)[:, :, None]
    codes = np.clip(inside, -MOST_E2M1, MOST_E2M1).astype(E2M1).view(np.uint8)
    return nibbles(codes.reshape(wide.shape)), scale.view(np.uint8)


def _require_finite(most: np.ndarray) -> None:
    """Raise TrioError unless all magnitudes are finite."""
    if not np.isfinite(most).all():
        raise TrioError("a value is not finite, so the matrix cannot be quantised")


def from_e4m3(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The values of a matrix in E4M3, float32 [N, K].

    Args:
        codes: bytes [N, K].
        scale: [N], in any float type.
    """
    return codes.view(E4M3).astype(np.float32) * scale.astype(np.float32)[:, None]


def from_e2m1(codes: np.ndarray, scale: np.ndarray, of_matrix: np.ndarray) -> np.ndarray:
    """The values of a matrix in E2M1, float32 [N, K].

    Args:
        codes: bytes [N, K/2].
        scale: bytes [N, K/16], E4M3.
        of_matrix: the matrix's scale, float32 [].
    """
    scales = scale.view(E4M3).astype(np.float32) * of_matrix.astype(np.float32)
    values = apart(codes).view(E2M1).astype(np.float32)
    return values * np.repeat(scales, BLOCK, axis=1)
