"""Rotary positions of a prompt along one axis, or along three: time, row and column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]
"""Frames, rows and columns of a run of visual tokens."""


def plain_positions(length: int) -> np.ndarray:
    """One after another, int64 [1, S]."""
    return np.arange(length, dtype=np.int64)[None]


def grid_positions(visual: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Positions of text and of pictures between it along time, rows and columns, int64 [3, S].

    A token of text is one position on along all three. A picture's tokens begin where the text
    before them ended: frame, row and column are added. The text behind it goes on after the longer
    side of the picture, whatever number of tokens it has.

    Args:
        visual: bool [S], whether each token is a visual one.
        grids: one per run of visual tokens, as many tokens in all as are visual.
    """
    positions = np.empty((3, len(visual)), dtype=np.int64)
    places = np.flatnonzero(visual)
    place = following = taken = 0
    for frames, rows, columns in grids:
        count = frames * rows * columns
        start = int(places[taken])
        positions[:, place:start] = following + np.arange(start - place)
        following += start - place
        run = np.indices((frames, rows, columns)).reshape(3, count)
        positions[:, start : start + count] = following + run
        following += max(rows, columns)
        place, taken = start + count, taken + count
    positions[:, place:] = following + np.arange(len(visual) - place)
    return positions
