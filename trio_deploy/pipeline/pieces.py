"""A prefill in pieces, so that others can be answered meanwhile, and how long pieces take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: Fewest queries that a piece takes where more are left. A product of a few rows takes as long as
#: one of a hundred; and one of a single row is rounded in another way.
LEAST_QUERIES = 128

# Queries that a piece's length is a multiple of: ONNX Runtime's product with a quantised matrix
# takes rows in pairs, and rounds one that is left over in another way.
_STEP = 16


@dataclass(frozen=True)
class Piece:
    """What a prefill computes next: a stage, or what is left of one.

    Work is counted in multiply-adds where queries can be computed apart, else in tokens: it is
    compared with that of the same stage alone.

    Attributes:
        stage: label of the stage.
        work: of all that is left.
        rows: (start, stop) of each row whose queries are left, if they can be computed apart.
        per_query, per_key: work of a query, and per key that it attends to.
    """

    stage: str
    work: float
    rows: tuple[tuple[int, int], ...] = ()
    per_query: float = 0.0
    per_key: float = 0.0

    @classmethod
    def of_queries(
        cls, stage: str, rows: tuple[tuple[int, int], ...], per_query: float, per_key: float
    ) -> Piece:
        """What is left of a stage that computes queries apart."""
        work = sum((stop - start) * (per_query + per_key * stop) for start, stop in rows)
        return cls(stage, work, rows, per_query, per_key)

    def first(self, queries: int | None) -> float:
        """Work of the first queries of the first row; None: all that is left."""
        if queries is None:
            return self.work
        start = self.rows[0][0]
        return queries * (self.per_query + self.per_key * (start + queries))

    @property
    def queries(self) -> int | None:
        """Queries that are left of the first row; None: nothing can be computed apart."""
        return self.rows[0][1] - self.rows[0][0] if self.rows else None


Turn = Callable[[Piece], int | None]
"""Called before each piece, for as long as others take their turn; returns the queries of the first
row to compute then, at most those that are left, or None for all of the piece."""


def at_once(piece: Piece) -> int | None:
    """Compute all of every piece: the `Turn` of a prefill that nobody waits for."""
    return None


class Pace:
    """How long pieces take, learnt from those that have run."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}  # seconds per work, by stage

    def record(self, piece: Piece, queries: int | None, seconds: float) -> None:
        """Learn from a piece, of which so many queries have run, as in `Piece.first`."""
        rate = seconds / max(1.0, piece.first(queries))
        self._rates[piece.stage] = (self._rates.get(piece.stage, rate) + rate) / 2

    def least_seconds(self, piece: Piece) -> float:
        """Seconds of the shortest run that brings a piece forward; 0 where nothing is known."""
        least = None if piece.queries is None else min(piece.queries, LEAST_QUERIES)
        return self._rates.get(piece.stage, 0.0) * piece.first(least)

    def queries(self, piece: Piece, seconds: float) -> int | None:
        """Queries that take so many seconds, as a `Turn` returns them, and not below the least.

        What is left of a row is divided into equal parts, so that none of them is short.
        """
        left, rate = piece.queries, self._rates.get(piece.stage)
        if left is None or math.isinf(seconds):
            return None
        if rate is None or seconds <= 0:
            parts = left
        elif rate * piece.work <= seconds:
            return None
        else:
            parts = math.ceil(rate * piece.first(left) / seconds)
        queries = max(LEAST_QUERIES, -(-left // parts // _STEP) * _STEP)
        return left if left - queries < LEAST_QUERIES else queries
