"""How sure a measured difference is: bootstrap over pictures, and how far two answers are apart.

Questions about one picture are not independent, so pictures are drawn with replacement, each with
all its questions; the same draws serve every configuration, which makes the intervals paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4000
LEVEL = 0.95
TOP_TOKENS = 256


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Estimate:
        return cls(float(raw["value"]), float(raw["low"]), float(raw["high"]))


class Bootstrap:
    """Draws of pictures, the same for everything that is compared.

    >>> bootstrap = Bootstrap(["a", "a", "b"])
    >>> bootstrap.retention(scores, reference)
    """

    def __init__(self, pictures: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        """`pictures` says of each question, in order, which picture it is about."""
        _, self._picture = np.unique(np.array(pictures, dtype=object).astype(str),
                                     return_inverse=True)  # fmt: skip
        self._count = int(self._picture.max()) + 1 if len(self._picture) else 0
        generator = np.random.default_rng(seed)
        even = np.full(self._count, 1 / max(self._count, 1))
        self._weights = generator.multinomial(self._count, even, size=draws).astype(np.float64)

    def mean(self, scores: np.ndarray, chosen: np.ndarray | None = None) -> Estimate:
        """Mean of float [n] scores, of those that bool [n] `chosen` marks."""
        total, size = self._sums(scores, chosen), self._sums(np.ones(len(scores)), chosen)
        return _estimate(total, size)

    def retention(
        self, scores: np.ndarray, reference: np.ndarray, chosen: np.ndarray | None = None
    ) -> Estimate:
        """Sum of the scores as a share of the reference's."""
        return _estimate(self._sums(scores, chosen), self._sums(reference, chosen))

    def difference(self, scores: np.ndarray, others: np.ndarray, reference: np.ndarray) -> Estimate:
        """Retention of `scores` minus retention of `others`."""
        return _estimate(self._sums(scores - others, None), self._sums(reference, None))

    def _sums(self, scores: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
        """The sum over all questions, then over each draw's: [1 + draws]."""
        weights = scores if chosen is None else np.where(chosen, scores, 0.0)
        each = np.bincount(self._picture, weights=weights, minlength=self._count)
        return np.concatenate([[each.sum()], self._weights @ each])


def _estimate(above: np.ndarray, below: np.ndarray) -> Estimate:
    """The ratio, and the percentiles of the draws' ratios; NaN where nothing is below."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = above / below
    drawn = ratios[1:][np.isfinite(ratios[1:])]
    if not np.isfinite(ratios[0]) or not len(drawn):
        return Estimate(float("nan"), float("nan"), float("nan"))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(ratios[0]), float(low), float(high))


def top_tokens(logprobs: np.ndarray, count: int = TOP_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """The `count` likeliest tokens of log-probabilities [V], likeliest first, and theirs."""
    order = np.argsort(-logprobs, kind="stable")[:count]
    return order, logprobs[order]


def divergence(tokens: np.ndarray, expected: np.ndarray, logprobs: np.ndarray) -> float:
    """KL divergence in nats of a distribution from the expected one, never below 0.

    Args:
        tokens, expected: the expected distribution's likeliest tokens and their log-probabilities.
        logprobs: [V] of the other.

    All other tokens count as one, so with more than `TOP_TOKENS` words it is a lower bound.
    """
    p, log_q = np.exp(expected), logprobs[tokens]
    total = float((p * (expected - log_q)).sum())
    rest_p = max(0.0, 1.0 - float(p.sum()))
    rest_q = max(0.0, 1.0 - float(np.exp(log_q).sum()))
    if len(tokens) < len(logprobs) and rest_p > 0:
        total += rest_p * float(np.log(rest_p / max(rest_q, 1e-12)))
    return max(0.0, total)
