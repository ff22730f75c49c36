"""Requests of a check: pictures that are not square, prompts of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Example:
    """A prompt and its pictures."""

    prompt: str
    pictures: tuple[Image.Image, ...] = ()


def default_examples() -> list[Example]:
    """A wide picture, text alone, and two pictures with a longer prompt; always the same."""
    return [
        Example("what color is the circle ?", (picture(480, 300, 0),)),
        Example("how many digit can you read ?"),
        Example(
            "is there a big red square in the first picture and a small one in the second ?",
            (picture(300, 450, 1), picture(336, 336, 2)),
        ),
    ]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """An RGB gradient with noise and shapes; no two patches are equal, some are similar."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], axis=-1)
    pixels += rng.normal(0, 12, pixels.shape)
    for shape in range(6):
        cx, cy = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
        size = rng.uniform(0.05, 0.15) * width
        if shape % 2:
            inside = (np.abs(x - cx) < size) & (np.abs(y - cy) < size)
        else:
            inside = (x - cx) ** 2 + (y - cy) ** 2 < size**2
        pixels[inside] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")
