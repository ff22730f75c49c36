"""Prefills in pieces of any length, and whether they gave the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trio_deploy import Pipeline, Request
from trio_deploy.pipeline.pieces import Piece, at_once
from trio_deploy.pipeline.prefill import Clock, Prefilled


def of(queries: int) -> Callable[[Piece], int | None]:
    """Pieces of so many queries, and never one alone: its products are rounded in another way."""

    def turn(piece: Piece) -> int | None:
        left = piece.queries
        return None if left is None else left if left - queries < 2 else queries

    return turn


def ran(
    pipeline: Pipeline, requests: list[Request], turn: Any = at_once
) -> tuple[Prefilled, list[Piece]]:
    """A prefill, and the pieces that it asked for a turn before."""
    pieces: list[Piece] = []

    def noted(piece: Piece) -> int | None:
        pieces.append(piece)
        return turn(piece)  # type: ignore[no-any-return]

    rows = [pipeline.prepare(request) for request in requests]
    return pipeline.prefill(rows, Clock(), noted), pieces


def equal(one: Prefilled, other: Prefilled) -> bool:
    """Whether logits, what was kept, and all keys and values that are read are equal."""
    caches = zip(one.caches.values(), other.caches.values(), strict=True)
    return np.array_equal(one.logits, other.logits) and all(
        np.array_equal(mine[row, :, :length], theirs[row, :, :length])
        for a, b in caches
        for slot, mine in a.buffers[0].items()
        for theirs in [b.buffers[0][slot]]
        for row, length in enumerate(a.lengths)
        if np.array_equal(a.lengths, b.lengths)
    )
