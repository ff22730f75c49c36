"""Fixtures shared by all tests: tiny checkpoints and pictures."""

from __future__ import annotations

import os
from pathlib import Path

# Nothing in a test may reach for the network, and two threads are enough for models this small.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from PIL import Image

try:
    import hypothesis
except ImportError:  # in the Triton server's environment, whose tests do without
    pass
else:
    # The same examples in every run, and none is too slow: neither chance nor other work on the
    # machine may turn a run red. `pytest --hypothesis-profile=default` searches at random.
    hypothesis.settings.register_profile(
        "trio",
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("trio")


WAIT_S = 120.0  # until what must come is given up; generous, other work may have the machine


@pytest.fixture(scope="session")
def llava_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5 with grouped queries (4 heads, 2 key/value heads), 16 visual tokens, fp32."""
    from tests.support.checkpoints import make_llava

    return make_llava(tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.fixture(scope="session")
def llava_next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT, tiles of 32 pixels, up to 88 visual tokens with newlines, fp32."""
    from tests.support.checkpoints import make_llava_next

    return make_llava_next(tmp_path_factory.mktemp("checkpoints") / "llava_next")


@pytest.fixture(scope="session")
def llava_mistral_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT on Mistral, hub layout and old configuration style, three shards, fp32."""
    from tests.support.checkpoints import make_llava_next

    return make_llava_next(
        tmp_path_factory.mktemp("checkpoints") / "mistral", mistral=True, layout="hub", shards=3
    )


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


@pytest.fixture
def picture() -> Image.Image:
    """A 100 x 60 RGB picture."""
    return make_picture()
