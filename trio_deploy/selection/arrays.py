"""What references and rules of methods share, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trio_deploy.schedule.view import Selected

FARTHEST = 2.0
"""The largest cosine distance; a token that is compared with nothing has it."""

TIE = 1e-5
"""Distances this close count as equal, so that rounding decides no tie between copies."""


def greatest(
    scores: NDArray[np.floating], among: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """Places of the `count` greatest of scores [S] among the tokens of `among`, descending.

    Ties go to the earlier token.
    """
    places = np.flatnonzero(among)
    return places[np.argsort(-scores[places], kind="stable")[:count]]


def cosine_distances(rows: NDArray[np.floating], row: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 - cosine of each of [n,d] with [d], in fp64; a zero row has cosine 0."""
    rows, row = rows.astype(np.float64), row.astype(np.float64)
    norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-12) * max(np.linalg.norm(row), 1e-12)
    return 1.0 - rows @ row / norms


def keeps_greatest(selected: Selected) -> bool:
    """Whether the tokens with the greatest scores are kept, the earlier ones of equals."""
    expected = greatest(selected.scores, selected.visual, len(selected.kept))
    return set(expected.tolist()) == set(selected.kept.tolist())
