"""LLaVA-NeXT: the whole image as one tile, and the image on the best-fitting canvas cut into tiles.

The canvas' patches are read row by row across tiles, without the rows or columns that are padding
only, and a newline embedding ends each row. Rounding follows transformers'
`select_best_resolution`, `get_patch_output_size` and `unpad_image` to the letter, since the number
of visual tokens depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trio_deploy.models.config import ModelConfig
from trio_deploy.models.family import (
    CLIP_LARGE_336,
    CLIP_LLAMA_PREFIXES,
    CLIP_PREPROCESSING,
    Family,
    Layout,
)
from trio_deploy.models.images import ImageSettings, View, fit, grid_boxes, resize


def best_canvas(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) canvas that shows most of an image of (height, width) `size`.

    Most effective pixels first, fewest wasted ones second, the earlier canvas on a tie.
    """
    height, width = size
    best, most, least_waste = canvases[0], 0, math.inf
    for canvas_height, canvas_width in canvases:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_height * canvas_width - effective
        if effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (canvas_height, canvas_width), effective, waste
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


def arrange(image: Image.Image, settings: ImageSettings, config: ModelConfig) -> Layout:
    """Base tile, then the canvas' tiles row by row; tokens as `pack_image_features` orders them."""
    vision = config.vision
    tile_size, side, patch = vision.image_size, vision.side, vision.patch_size
    size = (image.height, image.width)
    canvas = best_canvas(size, config.grid_pinpoints)
    down, across = canvas[0] // tile_size, canvas[1] // tile_size

    overview = resize(image, settings.base_size, settings)
    scaled_size = fit_size(size, canvas)
    top, left = (canvas[0] - scaled_size[0]) // 2, (canvas[1] - scaled_size[1]) // 2
    padded = np.zeros((*canvas, 3), dtype=np.uint8)
    padded[top : top + scaled_size[0], left : left + scaled_size[1]] = np.asarray(
        resize(image, scaled_size, settings)
    )
    cut = [
        Image.fromarray(padded[y : y + tile_size, x : x + tile_size])
        for y in range(0, canvas[0], tile_size)
        for x in range(0, canvas[1], tile_size)
    ]
    tiles = np.stack([fit(tile, settings)[0] for tile in (overview, *cut)])

    # Feature row of each patch of the canvas: tile by tile in the tower, row by row in the prompt.
    grid = (down * side, across * side)
    order = np.arange(side * side, (1 + down * across) * side * side, dtype=np.int64)
    rows = order.reshape(down, across, side, side).swapaxes(1, 2).reshape(grid)
    boxes = grid_boxes(*grid, patch).reshape(*grid, 4)
    shown = unpadded(size, grid)
    rows, boxes = rows[shown], boxes[shown]
    rows = np.concatenate([rows, np.full((len(rows), 1), -1, dtype=np.int64)], axis=1)
    boxes = View(top, left, scaled_size).to_image(boxes, image.size)
    boxes = np.concatenate([boxes, np.full((len(boxes), 1, 4), np.nan)], axis=1)

    base_view = View(0, 0, (tile_size, tile_size))
    base_boxes = base_view.to_image(grid_boxes(side, side, patch), image.size)
    return Layout(
        tiles,
        np.concatenate([np.arange(side * side, dtype=np.int64), rows.reshape(-1)]),
        np.concatenate([base_boxes, boxes.reshape(-1, 4)]),
    )


FAMILY = Family(
    name="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    defaults={
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    vision_defaults=CLIP_LARGE_336,
    tie_from_text=False,
    tiled=True,
    newline=True,
    prefixes=CLIP_LLAMA_PREFIXES,
    arrange=arrange,
    preprocessing=CLIP_PREPROCESSING,
)
