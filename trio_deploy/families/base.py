"""What one model family differs in from another: the type that each family's file fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.families.model_config import ModelConfig
from trio_deploy.families.pixels import ImageSettings


@dataclass(frozen=True)
class Layout:
    """How one image becomes tiles and visual tokens.

    Attributes:
        tiles: uint8 [T, h, w, 3], one entry a run of the vision tower, before normalisation.
        rows: int64 [n], for each visual token, in order, its feature row among the T*p rows that
            the tower and projector yield for these tiles; -1 stands for the newline embedding.
        boxes: float64 [n, 4], x0, y0, x1, y1 in pixels of the image; nan where a token has no
            place (newline, class token).
    """

    tiles: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Family:
    """A model family, as data.

    Attributes:
        name: `model_type` in config.json, and the family's name in `ModelConfig.family`.
        architecture: the class in transformers that wrote the checkpoint.
        defaults: top-level keys of config.json that may be missing, with transformers' values.
        vision_defaults: the vision configuration where config.json has none at all.
        tie_from_text: whether `tie_word_embeddings` inside `text_config` counts as well.
        tiled: whether an image is cut into several tiles, so that `image_grid_pinpoints` count.
        newline: whether the checkpoint owns an `image_newline` embedding.
        prefixes: (prefix in a checkpoint, canonical prefix), applied one after another to each
            tensor name; between them they undo the three layouts that checkpoints come in.
        arrange: tiles and token order of an RGB image.
        preprocessing: preprocessor_config.json keys that may be missing, with the values that
            transformers' image processor of this family has.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    vision_defaults: Mapping[str, Any]
    tie_from_text: bool
    tiled: bool
    newline: bool
    prefixes: tuple[tuple[str, str], ...]
    arrange: Callable[[Image.Image, ImageSettings, ModelConfig], Layout]
    preprocessing: Mapping[str, Any]


#: The layouts of CLIP + Llama checkpoints: 4.52 and later put `model.` in front of all but the
#: head, older ones kept the language model as a model of its own, 5.x dropped `vision_model`.
CLIP_LLAMA_PREFIXES = (
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "language_model."),
)

#: CLIP ViT-L/14 at 336 pixels, which LLaVA takes where config.json has no `vision_config`.
CLIP_LARGE_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

#: What transformers' CLIP image processor does unless told otherwise.
CLIP_PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": False,
}
