"""What is asked while measuring: pictures that are new in every run, a prompt of a known length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import request_limits

_WORDS = "what is in the picture , and which of the things in it are most alike ? "


@dataclass(frozen=True)
class Workload:
    """One request, made anew with another seed for every run.

    Attributes:
        images: pictures in the prompt.
        width, height: of each, in pixels.
        prompt: the text behind them.
        new_tokens: generated in every run, the first one included.
    """

    images: int
    width: int
    height: int
    prompt: str
    new_tokens: int

    def pictures(self, seed: int) -> list[Image.Image]:
        """Coarse colours with noise on them: no two patches alike, neighbours resemble each other.

        New ones for every seed, so that no cache of an earlier run's picture can answer.
        """
        rng = np.random.default_rng(seed)
        result = []
        for _ in range(self.images):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
            smooth = coarse.resize((self.width, self.height), Image.Resampling.BICUBIC)
            noisy = np.asarray(smooth) + rng.normal(0, 12, (self.height, self.width, 3))
            result.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
        return result

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, for the pipeline."""
        content = [{"type": "image"}] * self.images + [{"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Workload:
        return cls(**raw)


def picture_size(config: ModelConfig) -> tuple[int, int]:
    """(width, height) of a picture that takes as many visual tokens as one can."""
    return request_limits(config).picture


def prompt_of_length(count: Callable[[str], int], tokens: int) -> str:
    """A text for which `count` comes as near to `tokens` as it can without going beyond.

    Args:
        count: text tokens of the whole prompt with this text in it; grows with the text.
    """
    low, high = 1, 2
    while count(_text(high)) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(_text(middle)) <= tokens:
            low = middle
        else:
            high = middle
    return _text(low)


def _text(characters: int) -> str:
    return (_WORDS * (1 + characters // len(_WORDS)))[:characters]
