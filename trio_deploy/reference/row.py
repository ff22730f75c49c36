"""One prompt, as the oracle is given it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
