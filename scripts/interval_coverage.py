"""Simulate how often the intervals of `trio eval` contain the true value.

Prints the table of docs/evaluation.md:

    python scripts/interval_coverage.py [RUNS]

Answers about a picture are drawn from a beta-binomial distribution: the probability of a right one
differs between pictures, so that two answers have the given correlation. The percentile bootstrap,
which many tools use, is shown for comparison.
"""

from __future__ import annotations

import sys

import numpy as np

from trio_deploy.evaluation.statistics import Bootstrap

PICTURES = ((10, 16), (40, 16), (160, 16), (500, 1))
SHARES = (0.8, 0.97, 0.994, 0.998)
CORRELATIONS = (0.0, 0.05, 0.2)


def answers(
    rng: np.random.Generator, share: float, pictures: int, each: int, correlation: float
) -> np.ndarray:
    """Whether each answer is right, float [pictures * each]."""
    chance: float | np.ndarray = share
    if correlation:
        more = (1 - correlation) / correlation
        chance = rng.beta(share * more, (1 - share) * more, (pictures, 1))
    return (rng.random((pictures, each)) < chance).ravel().astype(float)


def coverage(pictures: int, each: int, share: float, correlation: float, runs: int) -> list[float]:
    """Coverage of accuracy, retention, a paired difference, and accuracy by percentiles."""
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap([str(n // each) for n in range(pictures * each)], draws=500)
    whole = np.ones(pictures * each)
    covered = np.zeros(4)
    for _ in range(runs):
        # The other configuration is wrong half as often, independently.
        one = answers(rng, share, pictures, each, correlation)
        other = answers(rng, (1 + share) / 2, pictures, each, correlation)
        sums = one.reshape(pictures, each).sum(axis=1)
        drawn = rng.choice(sums, (500, pictures)).mean(axis=1) / each
        low, high = np.quantile(drawn, [0.025, 0.975])
        found = (
            (bootstrap.mean(one), share),
            (bootstrap.retention(one, whole), share),
            (bootstrap.difference(other, one, whole), (1 - share) / 2),
        )
        covered += [*(e.low <= truth <= e.high for e, truth in found), low <= share <= high]
    return list(covered / runs)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print("| pictures × questions | correlation | " + " | ".join(f"{s:.1%}" for s in SHARES) + " |")
    print("|---|---|" + "---|" * len(SHARES))
    for pictures, each in PICTURES:
        for correlation in CORRELATIONS if each > 1 else CORRELATIONS[:1]:
            cells = [
                " / ".join(f"{100 * c:.0f}" for c in coverage(pictures, each, s, correlation, runs))
                for s in SHARES
            ]
            print(f"| {pictures} × {each} | {correlation:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
