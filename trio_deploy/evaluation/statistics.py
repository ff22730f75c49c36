"""How sure a measured share is: intervals over pictures, and how far two answers are apart.

Questions about one picture are not independent, so n questions are worth n divided by the design
effect: the variance between pictures over what it would be if all questions were independent (Kish
1965), with a correction for few pictures (Korn and Graubard 1998).

- A share (accuracy, agreement): Wilson's score interval with that effective number (compared with
  others for clustered samples by Dean and Pagano 2015 and by Franco et al. 2019).
- Retention and differences: a paired bootstrap over pictures (the same draws serve every
  configuration), and the adjusted interval of a paired difference of Bonett and Price 2012, which
  adds one imaginary question to either side; of each end the wider. Near 100 %, where few pictures
  differ or none, the bootstrap repeats what it was given and is far too narrow.

Where few pictures differ, the design effect cannot be estimated: it is then at least that of
questions which correlate by `ASSUMED`. With fewer pictures than `FEWEST` there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

DRAWS = 4000
LEVEL = 0.95
TOP_TOKENS = 256
FEWEST = 10
"""Pictures without which there is no interval."""
ASSUMED = 0.1
"""Correlation of the questions about one picture where fewer than `_TELLING` pictures differ."""

_TELLING = 8  # pictures, (Σ x)² / Σ x² of how much each differs: k that differ alike count as k
_Z = 1.959964  # of the normal distribution at LEVEL


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are NaN where none can be given."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def to_json(self) -> dict[str, float | None]:
        low, high = (self.low, self.high) if self.known else (None, None)
        return {"value": self.value, "low": low, "high": high}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Estimate:
        ends = (math.nan if raw[end] is None else float(raw[end]) for end in ("low", "high"))
        return cls(float(raw["value"]), *ends)


class EstimateForm(msgspec.Struct):
    """The form of an `Estimate` in results.json; both ends are numbers, or both null."""

    value: float
    low: float | None
    high: float | None


def points_text(estimate: Estimate | None) -> str:
    """A difference of shares and its interval, in percentage points."""
    if estimate is None:
        return ""
    if not estimate.known:
        return f"{100 * estimate.value:+.1f} (–)"
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


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
        """Mean of float [n] scores within 0 to 1, of those that bool [n] `chosen` marks."""
        chosen = np.ones(len(scores), bool) if chosen is None else chosen
        if not chosen.any():
            return Estimate(math.nan)
        value = float(scores[chosen].mean())
        size = self._worth(scores, np.ones(len(scores)), chosen)
        return Estimate(value, *wilson(value, size)) if size else Estimate(value)

    def retention(
        self, scores: np.ndarray, reference: np.ndarray, chosen: np.ndarray | None = None
    ) -> Estimate:
        """Sum of the scores as a share of the reference's; NaN where that has none."""
        lost = self.difference(reference, scores, reference, chosen)
        if not lost.known:
            return Estimate(1 - lost.value)
        marked = slice(None) if chosen is None else chosen
        most = 1 / float(reference[marked].mean())  # where every answer is right
        return Estimate(1 - lost.value, max(0.0, 1 - lost.high), min(most, 1 - lost.low))

    def difference(
        self,
        scores: np.ndarray,
        others: np.ndarray,
        reference: np.ndarray,
        chosen: np.ndarray | None = None,
    ) -> Estimate:
        """Retention of `scores` minus retention of `others`."""
        chosen = np.ones(len(scores), bool) if chosen is None else chosen
        delta = scores - others
        above, below = self._sums(delta, chosen), self._sums(reference, chosen)
        if not below[0]:
            return Estimate(math.nan)
        value = float(above[0] / below[0])
        size = self._worth(delta, reference, chosen)
        if not size:
            return Estimate(value)
        drawn = above[1:][below[1:] > 0] / below[1:][below[1:] > 0]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        gained, lost = (float(np.maximum(sign * delta[chosen], 0).mean()) for sign in (1, -1))
        scale = float(reference[chosen].mean())
        least, most = (end / scale for end in paired(gained, lost, size))
        return Estimate(value, min(float(low), least), max(float(high), most))

    def _sums(self, scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The sum over all questions, then over each draw's: [1 + draws]."""
        each = self._by_picture(np.where(chosen, scores, 0.0))
        return np.concatenate([[each.sum()], self._weights @ each])

    def _by_picture(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._picture, weights=values, minlength=self._count)

    def _worth(self, above: np.ndarray, below: np.ndarray, chosen: np.ndarray) -> float:
        """How many independent questions the chosen ones are worth for the ratio of the two sums.

        0 where they are about too few pictures for an interval.
        """
        questions, asked = int(chosen.sum()), self._by_picture(chosen.astype(np.float64)) > 0
        pictures = int(asked.sum())
        if pictures < FEWEST:
            return 0.0
        ratio = above[chosen].sum() / below[chosen].sum()
        residual = np.where(chosen, above - ratio * below, 0.0)
        apart = float((residual**2).sum()) * questions / (questions - 1)
        together = float((self._by_picture(residual) ** 2).sum()) * pictures / (pictures - 1)
        effect = max(1.0, together / apart) if apart > 0 else 1.0
        usual = np.median(above[chosen])  # what most questions have: 1 if right, 0 if no difference
        differing = self._by_picture(np.where(chosen, np.abs(above - usual), 0.0))
        if differing.sum() ** 2 < _TELLING * (differing**2).sum() or not differing.any():
            effect = max(effect, 1 + (questions / pictures - 1) * ASSUMED)
        return questions / effect * (_Z / student(pictures - 1)) ** 2


def wilson(share: float, size: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `size` independent questions (Wilson 1927)."""
    whole = 1 + _Z**2 / size
    middle = (share + _Z**2 / (2 * size)) / whole
    spread = max(0.0, share * (1 - share)) / size + _Z**2 / (4 * size**2)
    half = _Z * math.sqrt(spread) / whole
    # All right: the upper end is 1, whatever rounding makes of it; none right: the lower is 0.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def paired(gained: float, lost: float, size: float) -> tuple[float, float]:
    """Interval of gained − lost, shares of `size` independent pairs (Bonett and Price 2012)."""
    more, less = ((share * size + 1) / (size + 2) for share in (gained, lost))
    half = _Z * math.sqrt((more + less - (more - less) ** 2) / (size + 2))
    return more - less - half, more - less + half


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Fisher's expansion: 2.262 for 9, right to 0.001."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


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
