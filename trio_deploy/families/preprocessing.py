"""Image preprocessing of a checkpoint: preprocessor_config.json, and images by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout, ModelConfig
from trio_deploy.families.pixels import ImageSettings, open_image
from trio_deploy.families.registry import get_family

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


class Preprocessor:
    """Image preprocessing of one checkpoint, equal to transformers' Pillow image processors.

    Args:
        raw: preprocessor_config.json, or processor_config.json with an `image_processor` inside;
            missing keys get the defaults of the family's processor.
        config: of the model.

    Raises:
        TrioError: settings that are malformed or do not fit the vision tower.
    """

    def __init__(self, raw: Mapping[str, Any], config: ModelConfig) -> None:
        raw = raw.get("image_processor", raw)
        self._family = get_family(config.family)
        given = {key: raw[key] for key in KEYS if raw.get(key) is not None}
        # Of CLIP's and LLaVA's processors only LLaVA's own pads, and NeXT's `do_pad` is about
        # batches, so the key alone does not say it.
        if not str(raw.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
            given.pop("do_pad", None)
        self._raw = {**self._family.preprocessing, **given}
        if self._raw["do_pad"]:
            self._raw["image_processor_type"] = "LlavaImageProcessor"
        self._config = config
        self._settings = _settings(self._raw, config)
        canvases = raw.get("image_grid_pinpoints")
        if config.grid_pinpoints and canvases is not None:
            _check_canvases(canvases, config)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], config: ModelConfig) -> Preprocessor:
        """Same as the constructor; the inverse of `to_json`."""
        return cls(raw, config)

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults filled in, as preprocessor_config.json has them."""
        return dict(self._raw)

    @staticmethod
    def open_image(source: Any) -> Image.Image:
        """A path, bytes or Pillow image as upright RGB; see `pixels.open_image`."""
        return open_image(source)

    def __call__(self, image: Any) -> Layout:
        """Preprocess one image: anything that `open_image` takes.

        Raises:
            TrioError: the image cannot be read, or is too long and narrow to be resized.
        """
        return self._family.arrange(open_image(image), self._settings, self._config)


def _settings(raw: Mapping[str, Any], config: ModelConfig) -> ImageSettings:
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
