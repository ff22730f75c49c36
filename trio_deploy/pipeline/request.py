"""A request to a pipeline, and its answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.checkpoint.chat_template import Message
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import TrioError, shown
from trio_deploy.families.base import Layout
from trio_deploy.files import require_unicode
from trio_deploy.pipeline.grammar import Structure
from trio_deploy.pipeline.sampling import TokenLogprobs
from trio_deploy.schedule.budget import check_budget
from trio_deploy.schedule.schedule import Schedule

ImageSource = Image.Image | np.ndarray | str | os.PathLike[str] | bytes
IMAGE_KINDS: tuple[type, ...] = (
    Image.Image,
    np.ndarray,
    str,
    os.PathLike,
    bytes,
    bytearray,
    memoryview,
)
MAX_TOP_LOGPROBS = 20
_LARGEST = 1 << 62


@dataclass(frozen=True)
class Request(SamplingOptions):
    """One question and how to answer it; its fields are those of `SamplingOptions`, too.

    Attributes:
        prompt: the question, or a whole conversation as messages in Hugging Face's format:
            {"role": ..., "content": str or list of items}, an item being {"type": "image"} or
            {"type": "text", "text": ...}.
        images: one for each image the prompt names, alone or in a sequence; Pillow image, path,
            file content, http or https address (which `Pipeline` fetches, and `Batcher` does not),
            or array uint8 [height, width, 3].
        bgr: channels of arrays are blue, green and red, as OpenCV has them.
        max_new_tokens: most tokens to generate; the model's context may end the answer earlier.
        seed: as in `SamplingOptions`; also that of `random` pruning points (None: 0).
        stop: one or more strings that end the answer, themselves left out.
        budget: average share of visual tokens per layer (1.0 prunes nothing), see
            `Bundle.schedule_at`; None: the bundle's own schedule.
        raw: take a prompt string as it is, without the chat template.
        keep: ratio or count of visual tokens to keep at each pruning point of the bundle, instead
            of a budget.
        forced: token ids of the answer, instead of choosing any; `Generation.logprobs` has their
            probabilities.
        top_logprobs: record how likely each token was, and this many most likely ones (0: the token
            alone), in `Generation.token_logprobs`; None: nothing.
        structure: form that the answer must have, which needs the extra [serve]; an answer that
            ends by `stop` has it, one that is cut by `length` is the beginning of one.
        cache_images: keep what the vision tower makes of pictures for later requests, and use what
            is kept, where the pipeline has a cache for it.
        ignore_eos: go on after an end token, as benchmarks of a fixed length want it.
        bundle_sampling: take sampling options that are None from the bundle, which has them from
            the checkpoint's generation_config.json; False: an option that is None has no effect.
    """

    prompt: str | Sequence[Message]
    images: ImageSource | Sequence[ImageSource] = ()
    max_new_tokens: int = 128
    stop: str | Sequence[str] = ()
    budget: float | None = None
    raw: bool = False
    keep: Sequence[float | int] = ()
    forced: Sequence[int] = ()
    bundle_sampling: bool = True
    bgr: bool = False
    top_logprobs: int | None = None
    ignore_eos: bool = False
    cache_images: bool = True
    structure: Structure | None = None

    def check(self, vocabulary: int | None = None) -> None:
        """Check the kinds of all fields, and the ranges of those that no bundle decides.

        Args:
            vocabulary: number of tokens of the model, if known.

        Raises:
            TrioError: which field is wrong, and what it must be.
        """
        super().check(vocabulary)
        if isinstance(self.prompt, str):
            require_unicode(self.prompt, "the prompt")
        elif not isinstance(self.prompt, list | tuple):
            raise TrioError(
                f"prompt must be a text or a list of messages, got {shown(self.prompt)}"
            )
        if not isinstance(self.images, IMAGE_KINDS) and not isinstance(self.images, list | tuple):
            raise TrioError(f"images must be pictures or a list of them, got {shown(self.images)}")
        for number, image in enumerate(self.image_list):
            if not isinstance(image, IMAGE_KINDS):
                raise TrioError(
                    f"images[{number}] must be a path, bytes, a Pillow image or an array, "
                    f"got {shown(image)}"
                )
        _check_number("max_new_tokens", self.max_new_tokens, Integral)
        if self.max_new_tokens < 1:
            raise TrioError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        for stop in _list("stop", self.stop, str):
            if not isinstance(stop, str):
                raise TrioError(f"stop must be texts, got {shown(stop)}")
            require_unicode(stop, "a stop string")
        if self.budget is not None:
            _check_number("budget", self.budget, Real)
            check_budget(self.budget)
        for keep in _list("keep", self.keep):
            _check_number("keep", keep, Real)
        for token in _list("forced", self.forced):
            _check_number("forced", token, Integral)
            if token < 0 or (vocabulary is not None and token >= vocabulary):
                raise TrioError(f"forced has the token {token}, which the model does not have")
        if self.top_logprobs is not None:
            _check_number("top_logprobs", self.top_logprobs, Integral)
            if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
                raise TrioError(
                    f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}, got {self.top_logprobs}"
                )
        if self.structure is not None:
            if not isinstance(self.structure, Structure):
                raise TrioError(f"structure must be a Structure, got {shown(self.structure)}")
            if self.ignore_eos or len(self.forced):
                raise TrioError(
                    "an answer of a form ends by itself: give no ignore_eos and nothing forced"
                )
        for name in ("raw", "bundle_sampling", "bgr", "ignore_eos", "cache_images"):
            if not isinstance(getattr(self, name), bool):
                raise TrioError(f"{name} must be true or false, got {shown(getattr(self, name))}")

    @property
    def image_list(self) -> list[ImageSource]:
        """The images, also where one came alone."""
        if isinstance(self.images, IMAGE_KINDS):
            return [self.images]  # type: ignore[list-item]
        return list(self.images)  # type: ignore[arg-type]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, also where one came alone."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _list(name: str, value: Any, *alone: type) -> Sequence[Any]:
    """The items of a field; `alone` are kinds that may stand there without a list."""
    if alone and isinstance(value, alone):
        return [value]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple | range):
        raise TrioError(f"{name} must be a list, got {shown(value)}")
    return value


def _check_number(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not abs(value) < _LARGEST:
        what = "a whole number" if kind is Integral else "a finite number"
        raise TrioError(f"{name} must be {what}, got {shown(value)}")


@dataclass(frozen=True)
class Generation:
    """An answer, and how it was made.

    Attributes:
        text: the answer, without special tokens and stop string.
        token_ids: generated tokens, including an end token.
        finish_reason: `stop` (an end token or stop string) or `length`.
        timings: seconds per stage (`preprocess`, `vision`, `embed`, `prefill_i`, `select_i`,
            `decode`), of the whole batch.
        first_token_s: seconds from the call to the first token.
        tokens_per_s: rate of the tokens after the first; 0 if there is only one.
        prompt_tokens: tokens of the prompt before pruning, text and visual.
        visual: int64, indices of the visual tokens in the prompt.
        kept: for each pruning point, int64 indices of the prompt's tokens (text and visual) that
            were kept.
        layer_ranges: (first layer, stop layer, tokens of the prompt there) of each segment.
        schedule: pruning points and what to keep at each, at the request's budget.
        kv_bytes: bytes of the keys and values of this sequence's tokens at the end.
        kv_bytes_allocated: bytes of all KV caches of the batch.
        images: the images, upright RGB; none where the cache of features knew one;
            `processed`: their visual tokens and what each one shows.
        first_logits: float [V], from which the first token was chosen.
        logprobs: natural logarithms of the forced tokens' probabilities; `greedy`: whether each was
            the most likely.
        token_logprobs: one per token, as `Request.top_logprobs` asks for them.
        warnings: what may make the answer wrong or cost more than asked for, a sentence each: words
            that the model does not know, messages that the chat template leaves out, a selection
            whose scores tell no visual token from another, or a budget that keeps less than one
            visual token (one is kept).
        sampling: how the tokens were chosen: the request's options over the bundle's.
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
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens before pruning."""
        return len(self.visual)

    @property
    def keep_counts(self) -> list[int]:
        """Number of visual tokens kept at each pruning point."""
        return [len(tokens) for tokens in self.kept_visual]

    @property
    def kept_visual(self) -> list[np.ndarray]:
        """For each pruning point, the kept visual tokens, numbered from 0 to visual_tokens − 1."""
        return [np.flatnonzero(np.isin(self.visual, kept)) for kept in self.kept]

    def kept_of_image(self, image: int) -> list[np.ndarray]:
        """For each pruning point, which of one image's own visual tokens were kept."""
        counts = [len(processed.rows) for processed in self.processed]
        start = sum(counts[:image])
        return [
            tokens[(tokens >= start) & (tokens < start + counts[image])] - start
            for tokens in self.kept_visual
        ]
