"""Image preprocessing of a checkpoint: preprocessor_config.json, and images by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout, ModelConfig
from trio_deploy.families.patches import PatchSettings
from trio_deploy.families.pixels import header_size, open_image
from trio_deploy.families.registry import get_family
from trio_deploy.files import brief


def with_max_pixels(
    raw: Mapping[str, Any], config: ModelConfig, max_pixels: int | None
) -> dict[str, Any]:
    """Preprocessing settings in which a picture is resized to so many pixels at most.

    Args:
        raw: as of `Preprocessor`.
        max_pixels: None: as the settings say.

    Raises:
        TrioError: pictures of this model do not keep their sizes.
    """
    inside = raw.get("image_processor", raw)
    settings = dict(inside if isinstance(inside, Mapping) else raw)
    if max_pixels is None:
        return settings
    if config.pixels is None:
        raise TrioError(
            f"max_pixels has no meaning for a {config.family} model, which resizes every picture "
            "to the same size: leave it out"
        )
    return {**settings, "max_pixels": max_pixels}


class Preprocessor:
    """Image preprocessing of one checkpoint, equal to transformers' Pillow image processors.

    Attributes:
        config: of the model, with the sizes that these settings give pictures.

    Args:
        raw: preprocessor_config.json, or processor_config.json with an `image_processor` inside;
            missing keys get the defaults of the family's processor.
        config: of the model.

    Raises:
        TrioError: settings that are malformed or do not fit the vision tower.
    """

    def __init__(self, raw: Mapping[str, Any], config: ModelConfig) -> None:
        raw = raw.get("image_processor", raw)
        if not isinstance(raw, Mapping):
            raise TrioError(f"the image preprocessing settings must be an object, not {brief(raw)}")
        self._family = get_family(config.family)
        self._raw, self._settings = self._family.settings(raw, config)
        self.config = config
        if isinstance(self._settings, PatchSettings):
            self.config = replace(config, pixels=self._settings.pixels)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], config: ModelConfig) -> Preprocessor:
        """Same as the constructor; the inverse of `to_json`."""
        return cls(raw, config)

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults filled in, as preprocessor_config.json has them."""
        return dict(self._raw)

    @staticmethod
    def open_image(source: Any, name: str | None = None) -> Image.Image:
        """A path, bytes or Pillow image as upright RGB; see `pixels.open_image`."""
        return open_image(source, name)

    def least_tokens(self, source: Any) -> int:
        """Tokens in the prompt that an image surely brings, from its header alone.

        0 where the header does not tell: what is wrong with such an image shows when it is opened.
        """
        if (size := header_size(source)) is None:
            return 0
        # The picture may be stored lying on its side.
        sizes = (size, size[::-1])
        return min(self._family.counts(each, self.config).visual_tokens for each in sizes)

    def __call__(self, image: Any) -> Layout:
        """Preprocess one image: anything that `open_image` takes.

        Raises:
            TrioError: the image cannot be read, or is too long and narrow to be resized.
        """
        return self._family.arrange(open_image(image), self._settings, self.config)
