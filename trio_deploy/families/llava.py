"""LLaVA-1.5: one tile per image, resized and cropped; its patches row by row are the tokens."""

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
from trio_deploy.families.pixels import ImageSettings, fit, grid_boxes, normalise

_NAME = "llava"
_ARCHITECTURE = "LlavaForConditionalGeneration"
_DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def arrange(image: Image.Image, settings: ImageSettings, config: ModelConfig) -> Layout:
    """Resize and crop as CLIP's processor does; tokens are the tower's rows in their order."""
    vision = config.clip
    tile, view = fit(image, settings)
    boxes = view.to_image(grid_boxes(vision.side, vision.side, vision.patch_size), image.size)
    if not vision.drop_cls:
        boxes = np.concatenate([np.full((1, 4), np.nan), boxes])
    count = vision.rows_per_tile
    return Layout(
        feeds={"pixel_values": normalise(tile[None], settings)},
        feature_rows=count,
        text=VISUAL_TOKEN * count,
        rows=np.arange(count, dtype=np.int64),
        boxes=boxes,
        size=(image.height, image.width),
    )


def counts(size: tuple[int, int], config: ModelConfig) -> ImageCounts:
    """The same for every image."""
    return config.clip.counts(1, config.clip.rows_per_tile)


def request_limits(config: ModelConfig) -> Limits:
    """One tile per image, whose rows are the visual tokens."""
    vision = config.clip
    return Limits(
        tiles=1,
        tile_rows=vision.rows_per_tile,
        tile_values=3 * vision.image_size**2,
        visual_tokens=vision.rows_per_tile,
        picture=(vision.image_size, vision.image_size),
        rows_at_once=TILES_AT_ONCE * vision.rows_per_tile,
    )


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json to sizes and options."""
    return read_clip_llama(raw, _NAME, _DEFAULTS, tie_from_text=True)


def _image_length(tower: TowerSizes) -> dict[str, Any]:
    return {"image_seq_length": (tower.image // tower.patch) ** 2}


def tiny() -> dict[str, Any]:
    """A config.json of small sizes."""
    return tiny_clip_llama(_ARCHITECTURE, model_type=_NAME)


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
    hub=clip_hub(_NAME, _ARCHITECTURE, _image_length),
)
