"""Choose the next token, turn tokens into text as they come, and stop at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trio_deploy.errors import TrioError


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens.

    Attributes:
        temperature: 0 chooses the most likely token; above 0 the logits are divided by it first.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        seed: of this request's own generator, so that a request gives the same tokens alone and
            in a batch; None draws a fresh one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise TrioError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise TrioError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise TrioError(f"seed must be 0 or more, got {self.seed}")


class Sampler:
    """Draws tokens for one request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token for logits [V] of any float type.

        Raises:
            TrioError: the logits are not numbers (an overflow in half precision, for example).
        """
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise TrioError(
                "the model produced logits that are not finite; a float16 bundle may have "
                "overflowed: export it with --dtype float32"
            )
        if self._sampling.temperature == 0.0:
            return best
        # Subtracted first: a tiny temperature may then give -inf, but never inf - inf.
        behind = logits.astype(np.float64) - float(logits[best])
        with np.errstate(over="ignore"):
            weights = np.exp(behind / self._sampling.temperature)
        probabilities = weights / weights.sum()
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        if self._sampling.top_p < 1.0:
            # The nucleus: everything before the point where top_p is reached, and that token too.
            size = int(np.searchsorted(cumulative, self._sampling.top_p)) + 1
            order, cumulative = order[:size], cumulative[:size]
        drawn = self._generator.random() * cumulative[-1]
        place = int(np.searchsorted(cumulative, drawn, side="right"))
        return int(order[min(place, len(order) - 1)])


class Forced:
    """Takes given tokens instead of choosing, and records their probabilities.

    Attributes:
        logprobs: natural logarithms of the probabilities of the tokens so far.
        greedy: whether each was the most likely.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)
        self.logprobs: list[float] = []
        self.greedy: list[bool] = []

    def __call__(self, logits: np.ndarray) -> int:
        """The next of the given tokens, whatever the logits [V] say."""
        token = self._tokens[len(self.logprobs)]
        self.logprobs.append(float(log_softmax(logits)[token]))
        self.greedy.append(int(np.argmax(logits)) == token)
        return token


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities that logits [..., V] stand for, float64."""
    behind = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return behind - np.log(np.exp(behind).sum(axis=-1, keepdims=True))


class Detokenizer:
    """Turns a growing list of tokens into text, piece by piece.

    A piece is the difference between decoding a short window with and without the new token: the
    window carries the context that sentencepiece's leading spaces depend on, and text that ends in
    an unfinished character (U+FFFD) waits for its next byte.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._done = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, now = self._window()
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The remaining text, including an unfinished character."""
        before, now = self._window()
        self._start = self._done = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        before = self._decode(self._ids[self._start : self._done])
        return before, self._decode(self._ids[self._start :])


class StopScanner:
    """Cuts text at the first stop string, withholding what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise TrioError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._withheld = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a stop string, nothing more."""
        if self.stopped:
            return ""
        self._withheld += text
        found = [at for stop in self._stops if (at := self._withheld.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._withheld) - self._possible_stop())

    def flush(self) -> str:
        """The withheld text, once no more can come."""
        return "" if self.stopped else self._release(len(self._withheld))

    def _release(self, count: int) -> str:
        text, self._withheld = self._withheld[:count], self._withheld[count:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._withheld)), 0, -1):
            if any(stop.startswith(self._withheld[-size:]) for stop in self._stops):
                return size
        return 0
