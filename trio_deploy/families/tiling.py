"""Any-resolution tiling: the canvas for an image, its scaled size, the patches that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_canvas(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) canvas with the most effective pixels for an image of `size`.

    Of equals the one with the fewest wasted pixels, then the earlier one.
    """
    height, width = size
    best, most_effective, least_waste = canvases[0], 0, math.inf
    for canvas_height, canvas_width in canvases:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_height * canvas_width - effective
        if effective > most_effective or (effective == most_effective and waste < least_waste):
            best, most_effective, least_waste = (canvas_height, canvas_width), effective, waste
    return best


def fit_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image once scaled to touch the canvas on one pair of sides."""
    (height, width), (canvas_height, canvas_width) = size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_height), canvas_width)


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a (height, width) patch grid that show the image rather than padding."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        visible = int(round(height * (columns / width), 7))
        padding = (rows - visible) // 2
        return slice(padding, rows - padding), slice(0, columns)
    visible = int(round(width * (rows / height), 7))
    padding = (columns - visible) // 2
    return slice(0, rows), slice(padding, columns - padding)
