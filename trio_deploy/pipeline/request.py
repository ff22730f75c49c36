"""A question to a pipeline, and its answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from trio_deploy.families.base import Layout
from trio_deploy.pipeline.chat import Message
from trio_deploy.schedule.schedule import Schedule

ImageSource = Image.Image | str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: the question, or a whole conversation as messages in Hugging Face's format.
        images: one for each image the prompt names, alone or in a sequence; Pillow image, path or
            file content.
        max_new_tokens: the answer's length at most; the model's context may end it earlier.
        temperature, top_p, seed: see `Sampling`; temperature 0 is greedy. The seed is that of
            `random` pruning points too, 0 where there is none.
        stop: one or more strings that end the answer, themselves left out.
        budget: visual tokens a layer on average, as a share of all (1.0 prunes nothing), see
            `Bundle.schedule_at`; None takes the bundle's own schedule.
        raw: take a prompt string as it is, without the chat template.
        keep: for each pruning point of the bundle what to keep, as a schedule says it (ratios or
            counts), in place of a budget.
        forced: tokens to answer with instead of choosing any; `Generation.logprobs` says how
            likely they were.
    """

    prompt: str | Sequence[Message]
    images: ImageSource | Sequence[ImageSource] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    budget: float | None = None
    raw: bool = False
    keep: Sequence[float | int] = ()
    forced: Sequence[int] = ()

    @property
    def image_list(self) -> list[ImageSource]:
        """The images, also where one came alone."""
        if isinstance(self.images, str | bytes | os.PathLike | Image.Image):
            return [self.images]
        return list(self.images)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, also where one came alone."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class Generation:
    """An answer, and what it took.

    Attributes:
        text: the answer, without special tokens and stop string.
        token_ids: the generated tokens, an end token included.
        finish_reason: `stop` (an end token or stop string) or `length`.
        timings: seconds a stage (`preprocess`, `vision`, `embed`, `prefill_i`, `select_i`,
            `decode`), of the whole batch.
        first_token_s: from the call to the first token.
        tokens_per_s: of the tokens after the first; 0 where there is only one.
        prompt_tokens: length of the prompt, visual tokens included, before pruning.
        visual: int64, places of the visual tokens in the prompt.
        kept: for each pruning point, int64 places of the prompt (text and visual) that went on.
        layer_ranges: (first layer, stop layer, tokens of the prompt there) of each segment.
        schedule: pruning points and what was to be kept at each, as the request's budget asked.
        kv_bytes: keys and values of this row's tokens at the end.
        kv_bytes_allocated: all buffers of the batch.
        images: the pictures, upright RGB, and `processed`: their tokens and where they lie.
        first_logits: float [V], from which the first token was chosen.
        logprobs: of forced tokens, natural logarithms of their probabilities; `greedy`: whether
            each was the likeliest.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]
    first_token_s: float
    tokens_per_s: float
    prompt_tokens: int
    visual: np.ndarray
    kept: list[np.ndarray]
    layer_ranges: list[tuple[int, int, int]]
    kv_bytes: int
    kv_bytes_allocated: int
    schedule: Schedule = field(default_factory=Schedule)
    images: list[Image.Image] = field(default_factory=list, repr=False)
    processed: list[Layout] = field(default_factory=list, repr=False)
    first_logits: np.ndarray | None = field(default=None, repr=False)
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt before pruning."""
        return len(self.visual)

    @property
    def keep_counts(self) -> list[int]:
        """Visual tokens that went on at each pruning point."""
        return [len(tokens) for tokens in self.kept_visual]

    @property
    def kept_visual(self) -> list[np.ndarray]:
        """For each pruning point, numbers 0 … visual_tokens−1 of the visual tokens that went on."""
        return [np.flatnonzero(np.isin(self.visual, kept)) for kept in self.kept]

    def kept_of_image(self, image: int) -> list[np.ndarray]:
        """For each pruning point, which of the image's own visual tokens went on."""
        counts = [len(processed.rows) for processed in self.processed]
        start = sum(counts[:image])
        return [
            tokens[(tokens >= start) & (tokens < start + counts[image])] - start
            for tokens in self.kept_visual
        ]
