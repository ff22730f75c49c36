"""Pictures with structure."""

from __future__ import annotations

import numpy as np
from PIL import Image


def make_picture(width: int = 100, height: int = 60, seed: int = 0) -> Image.Image:
    """A picture with structure: a gradient, noise and a few rectangles, RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), 128 + 0 * x], -1)
    pixels += rng.normal(0, 20, pixels.shape)
    for _ in range(4):
        x0, y0 = rng.integers(0, width), rng.integers(0, height)
        pixels[y0 : y0 + height // 4 + 1, x0 : x0 + width // 4 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")
