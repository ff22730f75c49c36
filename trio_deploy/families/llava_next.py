"""LLaVA-NeXT: the whole image as one tile, and the image on the best-fitting canvas cut into tiles.

The canvas' patches are read row by row across tiles, without rows and columns of padding only, and
a newline embedding ends each row. Rounding follows transformers' `select_best_resolution`,
`get_patch_output_size` and `unpad_image` exactly, since the number of visual tokens depends on
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.families.base import (
    TILES_AT_ONCE,
    VISUAL_TOKEN,
    Family,
    ImageCounts,
    Layout,
    Limits,
    ModelConfig,
    TowerSizes,
)
from trio_deploy.families.clip_hub import clip_hub
from trio_deploy.families.clip_images import clip_settings
from trio_deploy.families.hf_config import (
    CLIP_LLAMA_PREFIXES,
    read_clip_llama,
    tiny_clip_llama,
)
from trio_deploy.families.pixels import ImageSettings, View, fit, grid_boxes, normalise, resize
from trio_deploy.families.tiling import best_canvas, fit_size, unpadded

_NAME = "llava_next"
_ARCHITECTURE = "LlavaNextForConditionalGeneration"


def _pinpoints(tile: int) -> list[list[int]]:
    """The canvases of the published models, for tiles of another size."""
    return [
        [tile * down, tile * across] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ]


_DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "image_grid_pinpoints": _pinpoints(336),
}


def arrange(image: Image.Image, settings: ImageSettings, config: ModelConfig) -> Layout:
    """Base tile, then the canvas' tiles row by row; tokens as `pack_image_features` orders them."""
    vision = config.clip
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
    shown = _shown_patches(size, config)
    rows, boxes = rows[shown], boxes[shown]
    rows = np.concatenate([rows, np.full((len(rows), 1), -1, dtype=np.int64)], axis=1)
    boxes = View(top, left, scaled_size).to_image(boxes, image.size)
    boxes = np.concatenate([boxes, np.full((len(boxes), 1, 4), np.nan)], axis=1)

    base_view = View(0, 0, (tile_size, tile_size))
    base_boxes = base_view.to_image(grid_boxes(side, side, patch), image.size)
    rows = np.concatenate([np.arange(side * side, dtype=np.int64), rows.reshape(-1)])
    return Layout(
        feeds={"pixel_values": normalise(tiles, settings)},
        feature_rows=len(tiles) * side * side,
        text=VISUAL_TOKEN * len(rows),
        rows=rows,
        boxes=np.concatenate([base_boxes, boxes.reshape(-1, 4)]),
        size=size,
    )


def counts(size: tuple[int, int], config: ModelConfig) -> ImageCounts:
    """The overview's, and the patches of the canvas that show the image, with a newline per row."""
    vision = config.clip
    rows, columns = _shown_patches(size, config)
    shown = (rows.stop - rows.start) * (columns.stop - columns.start + 1)
    height, width = best_canvas(size, config.grid_pinpoints)
    tiles = 1 + (height // vision.image_size) * (width // vision.image_size)
    return vision.counts(tiles, vision.side**2 + shown)


def _shown_patches(size: tuple[int, int], config: ModelConfig) -> tuple[slice, slice]:
    """Rows and columns of the canvas' patches that show an image of (height, width) pixels."""
    canvas = best_canvas(size, config.grid_pinpoints)
    vision = config.clip
    down, across = (pixels // vision.image_size * vision.side for pixels in canvas)
    return unpadded(size, (down, across))


def request_limits(config: ModelConfig) -> Limits:
    """The overview and the tiles of the largest canvas; a newline ends each row of its patches."""
    vision = config.clip
    tile, patch, canvases = vision.image_size, vision.patch_size, config.grid_pinpoints
    height, width = max(canvases, key=lambda size: size[0] * size[1])
    return Limits(
        tiles=1 + max(h * w for h, w in canvases) // tile**2,
        tile_rows=vision.rows_per_tile,
        tile_values=3 * tile**2,
        visual_tokens=vision.rows_per_tile
        + max(h // patch * (w // patch + 1) for h, w in canvases),
        picture=(width, height),
        rows_at_once=TILES_AT_ONCE * vision.rows_per_tile,
    )


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json to sizes and options."""
    return read_clip_llama(raw, _NAME, _DEFAULTS, tiled=True)


def _canvases(tower: TowerSizes) -> dict[str, Any]:
    return {"image_grid_pinpoints": _pinpoints(tower.image)}


def tiny() -> dict[str, Any]:
    """A config.json of small sizes."""
    return tiny_clip_llama(_ARCHITECTURE, model_type=_NAME, image_grid_pinpoints=_pinpoints(32))


FAMILY = Family(
    name=_NAME,
    architecture=_ARCHITECTURE,
    prefixes=CLIP_LLAMA_PREFIXES,
    settings=clip_settings,
    read=read,
    arrange=arrange,
    counts=counts,
    request_limits=request_limits,
    reference="llava",
    tiny=tiny,
    hub=clip_hub(_NAME, _ARCHITECTURE, _canvases),
)
