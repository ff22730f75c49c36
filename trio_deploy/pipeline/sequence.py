"""State of one sequence: its prompt, its generated tokens, why it finished."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.families.base import Layout
from trio_deploy.pipeline.prompt import Prompt
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sampling import Detokenizer, Forced, Sampler, StopScanner, TokenLogprobs
from trio_deploy.schedule.schedule import Schedule


@dataclass(eq=False)
class SequenceState:
    """One request while it is answered; a row of a batch.

    Attributes:
        max_tokens: tokens that may be generated.
        schedule: of the request's budget, or the bundle's own; `keep_counts`: visual tokens to keep
            at each of its pruning points.
        end_tokens: tokens that end the answer.
        sampling: the request's options over the bundle's, by which `sampler` chooses.
        started: `time.perf_counter()` when the request was made.
        token_ids, text: generated so far; `token_logprobs`: of the tokens, where asked for.
        finish_reason: empty until the sequence has finished.
        first_token_s, last_token_s: seconds from `started` to the first and the latest token.
        timings: seconds per stage, filled in by the caller.
        kept, layer_ranges: as in `Generation`, known after the prefill.
        kv_bytes, kv_bytes_allocated: as in `Generation`, known at the end.
        warnings: as in `Generation`; each part that handles the sequence may add to them.
    """

    request: Request
    images: list[Image.Image]
    processed: list[Layout]
    prompt: Prompt
    max_tokens: int
    schedule: Schedule
    keep_counts: tuple[int, ...]
    end_tokens: frozenset[int]
    sampling: SamplingOptions
    sampler: Sampler | Forced
    detokenizer: Detokenizer
    stop_scanner: StopScanner
    started: float
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    first_logits: np.ndarray | None = None
    timings: dict[str, float] = field(default_factory=dict)
    kept: list[np.ndarray] = field(default_factory=list)
    layer_ranges: list[tuple[int, int, int]] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_allocated: int = 0
    warnings: list[str] = field(default_factory=list)

    def advance(self, logits: np.ndarray) -> str:
        """Choose the next token from logits [V]; return the text that it completes.

        Raises:
            TrioError: the logits are not finite.
        """
        if not self.token_ids:
            self.first_logits = logits.copy()
        token = self.sampler(logits)
        if (top := self.request.top_logprobs) is not None:
            self.token_logprobs.append(TokenLogprobs.of(logits, token, top))
        self.token_ids.append(token)
        self.last_token_s = time.perf_counter() - self.started
        self.first_token_s = self.first_token_s or self.last_token_s
        if token in self.end_tokens:
            return self.finish("stop")
        piece = self._append(self.stop_scanner.push(self.detokenizer.push(token)))
        if self.stop_scanner.stopped:
            return piece + self.finish("stop")
        if len(self.token_ids) >= self.max_tokens:
            return piece + self.finish("length")
        return piece

    def finish(self, reason: str) -> str:
        """End the answer; return the text that was still withheld."""
        self.finish_reason = reason
        text = self._append(self.stop_scanner.push(self.detokenizer.flush()))
        text += self._append(self.stop_scanner.flush())
        if self.stop_scanner.stopped:
            self.finish_reason = "stop"
        return text

    def to_generation(self) -> Generation:
        """The answer so far."""
        later, seconds = len(self.token_ids) - 1, self.last_token_s - self.first_token_s
        forced = self.sampler if isinstance(self.sampler, Forced) else None
        return Generation(
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            timings=dict(self.timings),
            first_token_s=self.first_token_s,
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
            token_logprobs=self.token_logprobs,
            warnings=tuple(dict.fromkeys(self.warnings)),
            sampling=self.sampling,
        )

    def _append(self, text: str) -> str:
        self.text += text
        return text
