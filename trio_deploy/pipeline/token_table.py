"""Token embeddings looked up on the host, in a weight file that is mapped into memory.

The pages that hold looked-up rows are read when they are needed, and the system may drop them
again. Graphs then take the rows, `token_embeddings`, instead of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.quant.schemes import split_name, values_of
from trio_deploy.quant.stored_weight import FLOATS
from trio_deploy.runtimes.mapped_weights import WeightMap


class TokenTable:
    """A table of token embeddings in a mapped file, as floats or as codes.

    Attributes:
        size: entries of a row, d.
        dtype: of looked-up rows.
    """

    def __init__(
        self, parts: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype
    ) -> None:
        """Use `of`.

        Args:
            parts: by name; the float table [V, d], or codes, scales and what else there is, whose
                first axis is a multiple of V.
            shape: [V, d].
            dtype: of looked-up rows.
        """
        self._parts = parts
        self._count, self.size = shape
        self.dtype = dtype

    @classmethod
    def of(cls, bundle: Bundle) -> TokenTable | None:
        """The table of a bundle; None where its graphs hold it.

        Raises:
            TrioError: the file is too short, or it is not the model's table.
        """
        names = bundle.only("embed").looked_up
        if not names:
            return None
        shape = bundle.config.text.vocab_size, bundle.config.text.hidden_size
        places = {name: bundle.manifest.tensors[name] for name in names}
        stored = places[names[0]]
        if len(names) == 1:
            sound = stored.shape == shape and stored.dtype in FLOATS
        else:  # a short last block is filled up
            sound = stored.shape[0] % shape[0] == 0 and math.prod(stored.shape) >= math.prod(shape)
        if not sound:
            raise TrioError(
                f"the table of embeddings {names[0]} is {stored.dtype} {list(stored.shape)}, but "
                f"the model has {shape[0]} tokens of {shape[1]}: export the bundle again"
            )
        files = WeightMap()
        parts = {name: files.view(bundle.path, place) for name, place in places.items()}
        return cls(parts, shape, FLOATS[bundle.manifest.dtype])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of token ids, int64 [n] → [n, d] in the graphs' float type.

        Raises:
            TrioError: an id is beyond the table.
        """
        if ids.size and ids.max() >= self._count:
            raise TrioError(
                f"the token {ids.max()} has no embedding, since the model's table has "
                f"{self._count} rows: use the tokenizer that belongs to the model"
            )
        found = {name: _rows(part, ids, self._count) for name, part in self._parts.items()}
        first, *beside = found
        split = split_name(first)
        if split is None:
            return found[first]
        arrays = {"codes": found[first]}
        arrays |= {name.removeprefix(f"{first}."): found[name] for name in beside}
        return values_of(arrays, split[1], self.size).astype(self.dtype, copy=False)

    def rows_for_text(self, ids: np.ndarray, source: np.ndarray) -> np.ndarray:
        """The input `token_embeddings` of a batch, [B, S, d]; zeros where `source` picks an image.

        Args:
            ids: int64 [B, S]; those that no entry picks may be beyond the table.
            source: int64 [B, S], the input `source_index`.
        """
        is_text = source < ids.shape[1]
        picked = np.take_along_axis(ids, np.where(is_text, source, 0), axis=1)
        found = np.zeros((*ids.shape, self.size), self.dtype)
        found[is_text] = self.rows(picked[is_text])
        return found


def _rows(part: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """What some of `count` rows of a table have of a part, along its first axis."""
    each = part.reshape(count, -1, *part.shape[1:])
    return each[ids].reshape(-1, *part.shape[1:])
