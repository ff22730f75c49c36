"""Token embeddings looked up on the host, in a weight file that is mapped into memory.

The pages that hold looked-up rows are read when they are needed, and the system may drop them
again. Graphs then take the rows, `token_embeddings`, instead of token ids.
"""

from __future__ import annotations

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.quant.stored_weight import FLOATS
from trio_deploy.runtimes.mapped_weights import WeightMap


class TokenTable:
    """A table of token embeddings in a mapped file.

    Attributes:
        size: entries of a row, d.
        dtype: of looked-up rows.
    """

    def __init__(self, values: np.ndarray) -> None:
        """Use `of`; `values`: the table [V, d]."""
        self._values = values
        self.size, self.dtype = values.shape[1], values.dtype

    @classmethod
    def of(cls, bundle: Bundle) -> TokenTable | None:
        """The table of a bundle; None where its graphs hold it.

        Raises:
            TrioError: the file is too short, or it is not the model's table.
        """
        names = bundle.only("embed").looked_up
        if not names:
            return None
        text = bundle.config.text
        place = bundle.manifest.tensors[names[0]]
        if place.shape != (text.vocab_size, text.hidden_size) or place.dtype not in FLOATS:
            raise TrioError(
                f"the table of embeddings {names[0]} is {place.dtype} {list(place.shape)}, but the "
                f"model has {text.vocab_size} tokens of {text.hidden_size}: export the bundle again"
            )
        return cls(WeightMap().view(bundle.path, place))

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of token ids, int64 [...] → [..., d] in the table's float type.

        Raises:
            TrioError: an id is beyond the table.
        """
        if ids.size and ids.max() >= len(self._values):
            raise TrioError(
                f"the token {ids.max()} has no embedding, since the model's table has "
                f"{len(self._values)} rows: use the tokenizer that belongs to the model"
            )
        return self._values[ids]

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
