"""CLIP's image processor: settings from preprocessor_config.json, defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.bounds import IMAGE, WHOLE, canvases, flag, real, whole
from trio_deploy.families.pixels import MAX_PIXELS, ImageSettings

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
    side = config.clip.image_size
    return {
        "preprocessor_config.json": {
            **CLIP_PREPROCESSING,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "do_convert_rgb": True,
        },
        "processor_config.json": {
            "patch_size": config.clip.patch_size,
            "vision_feature_select_strategy": "default" if config.clip.drop_cls else "full",
            "num_additional_image_tokens": 1,
        },
    }


def _parse(raw: Mapping[str, Any], config: ModelConfig) -> ImageSettings:
    side = config.clip.image_size
    resize, crop = _flag(raw, "do_resize"), _flag(raw, "do_center_crop")
    rescale, normalise = _flag(raw, "do_rescale"), _flag(raw, "do_normalize")
    mean, std = _channels(raw, "image_mean"), _channels(raw, "image_std")
    settings = ImageSettings(
        size=_size(raw["size"]) if resize else None,
        crop=_pair(raw["crop_size"], "crop_size") if crop else None,
        resample=whole(raw["resample"], _of("resample"), (0, max(Image.Resampling))),
        scale=_number(raw, "rescale_factor") if rescale else None,
        mean=mean if normalise else None,
        std=std if normalise else None,
        pad_to_square=_flag(raw, "do_pad"),
    )
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
    if canvases(raw, _of("image_grid_pinpoints"), MAX_PIXELS) != config.grid_pinpoints:
        raise TrioError(
            "image_grid_pinpoints of the image preprocessing settings and of config.json differ: "
            "make them equal"
        )


def _of(key: str) -> str:
    """What messages call a key."""
    return f"the image preprocessing settings: {key}"


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    return flag(raw[key], _of(key))


def _number(raw: Mapping[str, Any], key: str) -> float:
    return real(raw[key], _of(key), IMAGE[key])


def _size(raw: Any) -> int | tuple[int, int]:
    if not isinstance(raw, Mapping):  # older files: the shortest side
        return whole(raw, _of("size"), WHOLE["image_size"])
    if raw.get("longest_edge") is not None:
        raise TrioError(f"{_of('size')} has a longest_edge, which is not supported")
    if raw.get("shortest_edge") is not None:
        return whole(raw["shortest_edge"], _of("size.shortest_edge"), WHOLE["image_size"])
    return _pair(raw, "size")


def _pair(raw: Any, key: str) -> tuple[int, int]:
    """(height, width); in older files one number for both."""
    if not isinstance(raw, Mapping):
        side = whole(raw, _of(key), WHOLE["image_size"])
        return side, side
    height = whole(raw.get("height"), _of(f"{key}.height"), WHOLE["image_size"])
    return height, whole(raw.get("width"), _of(f"{key}.width"), WHOLE["image_size"])


def _channels(raw: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A number per channel, or one for all three."""
    given = raw[key] if isinstance(raw[key], (list, tuple)) else [raw[key]] * 3
    if len(given) != 3:
        raise TrioError(f"{_of(key)} must have three values, not {len(given)}")
    return tuple(real(value, _of(key), IMAGE[key]) for value in given)
