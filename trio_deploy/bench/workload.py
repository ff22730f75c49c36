"""The request of a measurement: new pictures in every run, a prompt of a known length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.checkpoint.chat_template import Message
from trio_deploy.checkpoint.tokenizer import load_tokenizer
from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout, ModelConfig, grids_of
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import request_limits
from trio_deploy.pipeline.prompt import Prompt, PromptEncoder

_WORDS = "what is in the picture , and which of the things in it are most alike ? "


@dataclass(frozen=True)
class Workload:
    """One request, made with another seed for every run.

    Attributes:
        images: number of pictures in the prompt.
        width, height: of each picture, in pixels.
        prompt: the text after them.
        new_tokens: generated in every run, the first one included.
        visual_tokens: of all pictures; 0: not known yet.
    """

    images: int
    width: int
    height: int
    prompt: str
    new_tokens: int
    visual_tokens: int = 0

    def pictures(self, seed: int) -> list[Image.Image]:
        """Coarse colours with noise: no two patches are equal, neighbours resemble each other.

        Every seed gives new ones, so that no cache of an earlier run's picture can answer.
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


class Inputs:
    """Tokenizer, chat template and preprocessing of a bundle, without its graphs.

    The memory of a baseline is that of a process without graphs, so it cannot ask a pipeline.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.config
        tokens = {key: token for key, token in bundle.tokens.items() if isinstance(token, str)}
        self._encoder = PromptEncoder(
            load_tokenizer(bundle.tokenizer_path, "export the bundle again"),
            self.config.image_token_id,
            tokens,
            bundle.chat_template,
        )
        self._preprocessor = Preprocessor.from_json(bundle.preprocessor, self.config)

    def encode(
        self, messages: Sequence[Message], pictures: Sequence[Image.Image]
    ) -> tuple[Prompt, list[Layout]]:
        """Encode a request as the pipeline does, without the check of the model's context."""
        processed = [self._preprocessor(picture) for picture in pictures]
        return self.prompt(messages, processed), processed

    def prompt(self, messages: Sequence[Message], images: Sequence[Layout]) -> Prompt:
        """The prompt alone."""
        text = self._encoder.text(messages, len(images))
        return self._encoder.encode(
            text,
            [image.text for image in images],
            rendered=self._encoder.has_template,
            grids=grids_of(images, self.config),
        )


def picture_size(config: ModelConfig) -> tuple[int, int]:
    """(width, height) of a picture with the maximum number of visual tokens."""
    return request_limits(config).picture


def fit_prompt(work: Workload, bundle: Bundle, text_tokens: int) -> tuple[Workload, int]:
    """Give a workload a prompt of `text_tokens`, chat template included; also returns its tiles.

    Raises:
        TrioError: the prompt and its answer do not fit into the model's context.
    """
    inputs = Inputs(bundle)
    _, processed = inputs.encode(work.messages(), work.pictures(0))
    visual = sum(len(p.rows) for p in processed)

    def count(text: str) -> int:
        return inputs.prompt(replace(work, prompt=text).messages(), processed).length - visual

    work = replace(work, prompt=prompt_of_length(count, text_tokens), visual_tokens=visual)
    length = visual + count(work.prompt)
    if length + work.new_tokens > bundle.config.text.max_positions:
        raise TrioError(
            f"a prompt of {length} tokens, {visual} of them visual, and {work.new_tokens} new "
            f"tokens exceed the model's context of {bundle.config.text.max_positions}: pass fewer "
            "--images, or with --size a larger context="
        )
    return work, sum(len(picture.feeds["pixel_values"]) for picture in processed)


def prompt_of_length(count: Callable[[str], int], tokens: int) -> str:
    """A text for which `count` comes as close to `tokens` as possible without exceeding it.

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
