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
from trio_deploy.quant.words import Blocks, block_of, codes_of

CODES = "qweight"
NEEDED = (CODES, "qzeros", "scales")

BITS = 4
#: Column of each field of a word, from the lowest bits.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def blocks_of_awq(words: tuple[int, ...], tensors: Mapping[str, np.ndarray], what: str) -> Blocks:
    """Read what the checkpoint says of a matrix beside its codes.

    Args:
        words: shape of `qweight`.
        tensors: `qzeros` and `scales`.
        what: name of the matrix, for messages.

    Raises:
        TrioError: the tensors contradict each other.
    """
    zeros, scales = tensors["qzeros"], tensors["scales"]
    rows = words[-1] * len(ORDER)
    if len(words) != 2 or scales.shape[1:] != (rows,) or zeros.shape != (len(scales), words[1]):
        raise TrioError(
            f"{what}: qweight {list(words)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} do not belong together"
        )
    block = block_of(words[0], len(scales), what)
    return Blocks(rows, words[0], BITS, block, scales.T, _columns(zeros).T)


def codes_of_awq(words: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Take `qweight` apart: uint8 [N, K]."""
    return _columns(words).T


def _columns(words: np.ndarray) -> np.ndarray:
    """Take words [n, N/8] apart into codes [n, N] in the order of columns."""
    fields = codes_of(words, BITS, 1).reshape(len(words), -1, len(ORDER))
    codes = np.empty_like(fields)
    codes[:, :, list(ORDER)] = fields
    return codes.reshape(len(words), -1)
