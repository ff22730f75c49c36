"""A request on its way: what it was, how far its answer is, and when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from trio_deploy.families.base import Layout
from trio_deploy.pipeline.prompt import Prompt
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sampling import Forced, Sampler, StopScanner, TokenStream
from trio_deploy.schedule.schedule import Schedule


@dataclass(eq=False)
class Row:
    """One row of a batch.

    Attributes:
        limit: tokens that it may generate.
        schedule: what was asked for, a budget or the bundle's own; `keeps`: how many visual tokens
            it keeps at each pruning point.
        ends: tokens that end the answer.
        start: `time.perf_counter()` when it was asked.
        finish: why the answer ended; empty while it goes on.
        timings: seconds a stage, to be filled in.
        kept, layer_ranges: as in `Generation`, known after the prefill.
        kv_bytes, kv_bytes_allocated: as in `Generation`, known at the end.
    """

    request: Request
    images: list[Image.Image]
    processed: list[Layout]
    prompt: Prompt
    limit: int
    schedule: Schedule
    keeps: tuple[int, ...]
    ends: frozenset[int]
    sampler: Sampler | Forced
    stream: TokenStream
    scanner: StopScanner
    start: float
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    first_logits: np.ndarray | None = None
    timings: dict[str, float] = field(default_factory=dict)
    kept: list[np.ndarray] = field(default_factory=list)
    layer_ranges: list[tuple[int, int, int]] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_allocated: int = 0

    def take(self, logits: np.ndarray) -> str:
        """Pick the next token from logits [V]; the text that it completes.

        Raises:
            TrioError: the logits are not numbers.
        """
        if not self.ids:
            self.first_logits = logits.copy()
        token = self.sampler(logits)
        self.ids.append(token)
        self.last_s = time.perf_counter() - self.start
        self.first_s = self.first_s or self.last_s
        if token in self.ends:
            return self.end("stop")
        piece = self._say(self.scanner.push(self.stream.push(token)))
        if self.scanner.stopped:
            return piece + self.end("stop")
        if len(self.ids) >= self.limit:
            return piece + self.end("length")
        return piece

    def end(self, reason: str) -> str:
        """End the answer; the text that was held back until now."""
        self.finish = reason
        text = self._say(self.scanner.push(self.stream.flush()))
        text += self._say(self.scanner.flush())
        if self.scanner.stopped:
            self.finish = "stop"
        return text

    def report(self) -> Generation:
        """The answer as far as it is."""
        later, seconds = len(self.ids) - 1, self.last_s - self.first_s
        forced = self.sampler if isinstance(self.sampler, Forced) else None
        return Generation(
            text=self.text,
            token_ids=self.ids,
            finish_reason=self.finish,
            timings=dict(self.timings),
            first_token_s=self.first_s,
            tokens_per_s=later / seconds if later > 0 and seconds > 0 else 0.0,
            prompt_tokens=self.prompt.length,
            visual=np.flatnonzero(self.prompt.visual),
            kept=self.kept,
            layer_ranges=self.layer_ranges,
            schedule=self.schedule,
            kv_bytes=self.kv_bytes,
            kv_bytes_allocated=self.kv_bytes_allocated,
            images=self.images,
            processed=self.processed,
            first_logits=self.first_logits,
            logprobs=forced.logprobs if forced else [],
            greedy=forced.greedy if forced else [],
        )

    def _say(self, text: str) -> str:
        if text:
            self.text += text
        return text
