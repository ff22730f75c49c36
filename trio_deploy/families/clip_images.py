"""CLIP's image processor: settings from preprocessor_config.json, defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.pixels import ImageSettings

#: Keys of preprocessor_config.json that are read; `to_json` keeps these.
KEYS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
)

#: Defaults of transformers' CLIP image processor.
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


def clip_settings(
    raw: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], ImageSettings]:
    """Read preprocessor_config.json of CLIP's processor or of LLaVA's.

    Returns:
        The keys that are read, defaults filled in; and the settings.

    Raises:
        TrioError: settings that are malformed or do not fit the vision tower.
    """
    given = {key: raw[key] for key in KEYS if raw.get(key) is not None}
    # Of CLIP's and LLaVA's processors only LLaVA's own pads, and NeXT's `do_pad` is about batches,
    # so the key alone does not say it.
    if not str(raw.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
        given.pop("do_pad", None)
    filled = {**CLIP_PREPROCESSING, **given}
    if filled["do_pad"]:
        filled["image_processor_type"] = "LlavaImageProcessor"
    settings = _parse(filled, config)
    canvases = raw.get("image_grid_pinpoints")
    if config.grid_pinpoints and canvases is not None:
        _check_canvases(canvases, config)
    return filled, settings


def clip_processor_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a model that comes without them."""
    side = config.vision.image_size
    return {
        "preprocessor_config.json": {
            **CLIP_PREPROCESSING,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "do_convert_rgb": True,
        },
        "processor_config.json": {
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "default" if config.vision.drop_cls else "full",
            "num_additional_image_tokens": 1,
        },
    }


def _parse(raw: Mapping[str, Any], config: ModelConfig) -> ImageSettings:
    side = config.vision.image_size
    try:
        settings = ImageSettings(
            size=_size(raw["size"]) if raw["do_resize"] else None,
            crop=_crop(raw["crop_size"]) if raw["do_center_crop"] else None,
            resample=int(Image.Resampling(raw["resample"])),
            scale=float(raw["rescale_factor"]) if raw["do_rescale"] else None,
            mean=_channels(raw["image_mean"]) if raw["do_normalize"] else None,
            std=_channels(raw["image_std"]) if raw["do_normalize"] else None,
            pad_to_square=bool(raw["do_pad"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrioError(f"the image preprocessing settings are malformed: {error}") from None
    yields = settings.crop
    if yields is None and not isinstance(settings.size, int):
        yields = settings.size
    if yields is None and settings.pad_to_square and isinstance(settings.size, int):
        yields = (settings.size, settings.size)
    if yields != (side, side):
        raise TrioError(
            f"the image preprocessing settings give images of {yields or 'no fixed size'}, but "
            f"the vision tower takes {side} x {side}"
        )
    return settings


def _check_canvases(raw: Any, config: ModelConfig) -> None:
    """Compare the processor's canvases with the model's, which orders its tiles by them."""
    if [list(pair) for pair in raw] != [list(pair) for pair in config.grid_pinpoints]:
        raise TrioError(
            "image_grid_pinpoints of the image preprocessing settings and of config.json differ: "
            "make them equal"
        )


def _size(raw: Any) -> int | tuple[int, int]:
    if isinstance(raw, int):
        return raw  # older files: the shortest side
    if raw.get("longest_edge") is not None:
        raise ValueError("a longest_edge is not supported")
    if raw.get("shortest_edge") is not None:
        return int(raw["shortest_edge"])
    return int(raw["height"]), int(raw["width"])


def _crop(raw: Any) -> tuple[int, int]:
    if isinstance(raw, int):
        return raw, raw
    return int(raw["height"]), int(raw["width"])


def _channels(raw: Any) -> tuple[float, ...]:
    values = tuple(float(x) for x in raw) if isinstance(raw, (list, tuple)) else (float(raw),) * 3
    if len(values) != 3:
        raise ValueError(f"image_mean and image_std need three values, not {len(values)}")
    return values
