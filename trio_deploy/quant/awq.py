"""AWQ, version `gemm`: 4 bit in blocks of g along K, with zero points.

For a matrix [N, K]:

* `qweight` int32 [K, N/8]: W transposed, eight columns per word. The field of 4 bit number i of a
  word, counted from the lowest bits, is column 8·c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
* `qzeros` int32 [K/g, N/8], in the same order.
* `scales` float16 [K/g, N].

W = (code - zero) · scale.

Source: `WQLinear_GEMM.from_linear` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import QuantisedMatrix
from trio_deploy.quant.words import block_of, codes_of, matrix_of

CODES = "qweight"
NEEDED = (CODES, "qzeros", "scales")
OPTIONAL: tuple[str, ...] = ()

BITS = 4
#: Column of each field of a word, from the lowest bits.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(tensors: Mapping[str, np.ndarray], what: str) -> QuantisedMatrix:
    """Read a matrix.

    Args:
        tensors: `NEEDED`, by name.
        what: name of the matrix, for messages.

    Raises:
        TrioError: the tensors contradict each other.
    """
    words, zeros, scales = (tensors[name] for name in NEEDED)
    if words.ndim != 2 or scales.ndim != 2 or zeros.shape != (len(scales), words.shape[1]):
        raise TrioError(
            f"{what}: qweight {list(words.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} do not belong together"
        )
    columns, rows = len(words), words.shape[1] * len(ORDER)
    if scales.shape[1] != rows:
        raise TrioError(f"{what}: scales {list(scales.shape)} do not suit {rows} rows")
    block = block_of(columns, len(scales), what)
    return matrix_of(_columns(words).T, scales.T, _columns(zeros).T, BITS, block)


def _columns(words: np.ndarray) -> np.ndarray:
    """Take words [n, N/8] apart into codes [n, N] in the order of columns."""
    fields = codes_of(words, BITS, 1).reshape(len(words), -1, len(ORDER))
    codes = np.empty_like(fields)
    codes[:, :, list(ORDER)] = fields
    return codes.reshape(len(words), -1)
