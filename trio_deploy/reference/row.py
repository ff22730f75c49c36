"""One prompt, as the oracle is given it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import Layout


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        input_ids: [S] int64, with one image token for every visual token.
        pixel_values: all images of the prompt as transformers' processor gives them: tiles
            [T, 3, h, w], or the patches of pictures of any size, [L, c]; None for text alone.
        image_sizes: (height, width) of each image before preprocessing, in pixels.
        seed: of `random` selections.
        grids: frames, rows and columns of the visual tokens of each image, where it has any size.
    """

    input_ids: NDArray[np.int64]
    pixel_values: NDArray[np.floating] | None = None
    image_sizes: Sequence[tuple[int, int]] = ()
    seed: int = 0
    grids: Sequence[tuple[int, int, int]] = ()

    @classmethod
    def of(cls, ids: NDArray[np.int64], pictures: Sequence[Layout]) -> Row:
        """A prompt's ids and its pictures as the runtime prepared them."""
        pixels = [picture.feeds["pixel_values"] for picture in pictures]
        pixels = [p.reshape(-1, p.shape[-1]) if p.ndim == 3 else p for p in pixels]  # patches
        return cls(
            ids,
            np.concatenate(pixels) if pixels else None,
            [(int(p.size[0]), int(p.size[1])) for p in pictures],
            grids=[grid for picture in pictures for grid in picture.grids],
        )
