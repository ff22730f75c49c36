"""Greedy non-maximum suppression, one token after another, as the method states it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def greedy_select(
    scores: NDArray[np.floating], features: NDArray[np.floating], keep: int, threshold: float
) -> NDArray[np.int64]:
    """Choose `keep` tokens: the most salient ones that are not near-copies of a chosen one.

    A kept token suppresses every token whose cosine similarity is `threshold` or more. If fewer
    than `keep` survive, the best suppressed ones fill up.

    Args:
        scores: [N] saliency; equal scores go to the lower index first.
        features: [N, d] rows that similarity is measured on.

    Returns:
        The kept indices in ascending order, [min(keep, N)].
    """
    rows = _unit(features)
    return _greedy(
        scores, keep, lambda kept, token: bool((rows[kept] @ rows[token] >= threshold).any())
    )


def greedy_by_cosines(
    scores: NDArray[np.floating], cosines: NDArray[np.floating], keep: int, threshold: float
) -> NDArray[np.int64]:
    """`greedy_select` from cosines [N, N], computed once for several thresholds.

    Returns:
        The kept indices in ascending order, [min(keep, N)].
    """
    alike = cosines >= threshold
    return _greedy(scores, keep, lambda kept, token: bool(alike[token][kept].any()))


def cosines_of(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosines [N, N] of rows [N, d]; a zero row has cosine 0."""
    rows = _unit(features)
    return rows @ rows.T


def _greedy(
    scores: NDArray[np.floating], keep: int, is_alike: Callable[[list[int], int], bool]
) -> NDArray[np.int64]:
    kept: list[int] = []
    suppressed: list[int] = []
    for token in np.argsort(-scores, kind="stable").tolist():
        if len(kept) >= keep:
            break
        (suppressed if kept and is_alike(kept, token) else kept).append(token)
    kept += suppressed[: max(0, keep - len(kept))]
    return np.sort(np.asarray(kept, dtype=np.int64))


def _unit(features: NDArray[np.floating]) -> NDArray[np.float64]:
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows
