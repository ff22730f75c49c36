"""Rows that are decoded together: they join after their prefill and leave when they end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trio_deploy.pipeline.cache import SegmentCache
from trio_deploy.pipeline.decode import Decoder
from trio_deploy.pipeline.prefill import Prefilled, Stages
from trio_deploy.pipeline.sequence import Row


class Running:
    """A batch whose rows come and go.

    Its KV caches are those of the prefill whose rows found it empty, taken over as they are. Rows
    that come later are copied into free places; caches without room are replaced by larger ones
    (twice the rows, as many tokens as are needed: an engine may be made for no more). They are
    given back when the last row has left.

    Rows stay in front: who leaves makes room for the last one, so that a step computes as many
    rows as there are answers. Where memory cannot be sliced, all rows are computed, and places
    stay empty until they are filled again.

    >>> running.join(rows, prefilled)       # rows that have taken their first token
    >>> while running.rows:
    ...     for row, logits in running.step():
    ...         row.take(logits)
    ...     running.release()
    """

    def __init__(self, stages: Stages, positions: str, pad: int, most: int | None = None) -> None:
        """An empty batch.

        Args:
            positions: as in `Decoder`.
            pad: the token that empty places are fed with.
            most: rows that there will be at once; None means any number.
        """
        self._most = most
        self._stages = stages
        self._positions = positions
        self._pad = pad
        self._slots: list[Row | None] = []
        self._caches: dict[str, SegmentCache] = {}
        self._places = np.zeros(0, np.int64)
        self._decoder: Decoder | None = None

    @property
    def rows(self) -> list[Row]:
        """Those that go on."""
        return [row for row in self._slots if row is not None]

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the rows' tokens; empty places have none."""
        return sum(
            cache.shape.nbytes(int(cache.lengths.sum())) * len(cache.layers)
            for cache in self._caches.values()
        )

    @property
    def kv_bytes_allocated(self) -> int:
        """All buffers."""
        return sum(cache.allocated for cache in self._caches.values())

    def needed(self, rows: Sequence[Row]) -> int:
        """Bytes of all buffers once these rows have joined as well."""
        shape = self._stages.cache_shape
        count, capacities = self._room([(row, self._lengths(row)) for row in rows])
        return sum(
            shape.nbytes(count * capacity) * len(self._stages.layers[name]) * self._stages.sides
            for name, capacity in capacities.items()
        )

    def join(self, rows: Sequence[Row], prefilled: Prefilled) -> None:
        """Take in those rows of a prefilled batch whose first token did not end them.

        Raises:
            TrioError: memory of a cache is too small.
        """
        for number, row in enumerate(rows):
            if row.finish:
                _account(row, number, prefilled.caches)
        if not self._slots:
            self._slots = list(rows)
            self._caches = prefilled.caches
            self._places = np.array([row.prompt.next_position for row in rows], np.int64)
            self._decoder = None
            self._clear([number for number, row in enumerate(rows) if row.finish])
            return
        new = [(number, row) for number, row in enumerate(rows) if not row.finish]
        if not new:
            return
        lengths = {name: cache.lengths for name, cache in prefilled.caches.items()}
        self._make_room([(row, [int(x[number]) for x in lengths.values()]) for number, row in new])
        free = [number for number, row in enumerate(self._slots) if row is None]
        free += range(len(self._slots), len(self._places))
        free, taken = free[: len(new)], [number for number, _ in new]
        for name, cache in self._caches.items():
            cache.copy_rows(free, prefilled.caches[name], taken)
        for place, (_, row) in zip(free, new, strict=True):
            self._slots += [None] * (place + 1 - len(self._slots))
            self._slots[place] = row
            self._places[place] = row.prompt.next_position

    def step(self) -> list[tuple[Row, np.ndarray]]:
        """Feed every row its last token; the logits [V] of its next, valid until the next step.

        Raises:
            TrioError: the runtime failed.
        """
        if self._decoder is None:
            self._decoder = Decoder(self._stages, self._caches, self._places, self._positions)
        tokens = np.array([self._pad if row is None else row.ids[-1] for row in self._slots])
        active = np.array([row is not None for row in self._slots])
        logits = self._decoder.step(tokens, active)
        return [(row, logits[i]) for i, row in enumerate(self._slots) if row is not None]

    def release(self) -> None:
        """Let the rows go that have ended."""
        ended = [i for i, row in enumerate(self._slots) if row is not None and row.finish]
        for number in ended:
            row = self._slots[number]
            assert row is not None
            _account(row, number, self._caches)
        self._clear(ended)

    def reset(self) -> None:
        """Forget all rows and caches."""
        self._slots, self._caches = [], {}
        self._places, self._decoder = np.zeros(0, np.int64), None

    def _clear(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        for number in numbers:
            self._slots[number] = None
        if not any(row is not None for row in self._slots):
            self.reset()
            return
        sliceable = all(cache.sliceable for cache in self._caches.values())
        while sliceable and None in self._slots:
            last = self._slots.pop()
            if last is not None:
                self._move(len(self._slots), self._slots.index(None))
                self._slots[self._slots.index(None)] = last
        for number in range(len(self._places)):
            if number >= len(self._slots) or self._slots[number] is None:
                self._places[number] = 0
                for cache in self._caches.values():
                    cache.lengths[number] = 0

    def _move(self, source: int, place: int) -> None:
        for cache in self._caches.values():
            cache.copy_rows([place], cache, [source])
        self._places[place] = self._places[source]

    def _room(self, new: Sequence[tuple[Row, Sequence[int]]]) -> tuple[int, dict[str, int]]:
        """Rows and tokens a segment that caches must have, for rows and their lengths there."""
        count = len(self.rows) + len(new)
        if self._slots and count > len(self._places):
            doubled = 1 << (count - 1).bit_length()
            count = max(count, min(doubled, self._most or doubled))
        capacities = {}
        for column, name in enumerate(self._stages.segments):
            longest = max((lengths[column] + row.limit for row, lengths in new), default=0)
            if self._slots:
                longest = max(longest, self._caches[name].capacity)
            capacities[name] = self._stages.capacity(name, longest)
        return max(count, len(self._places)), capacities

    def _lengths(self, row: Row) -> list[int]:
        """Tokens of the prompt that each segment will hold."""
        one = np.array([row.prompt.length]), np.array([row.prompt.visual_tokens])
        held = self._stages.lengths(*one, [np.array([keep]) for keep in row.keeps])
        return [int(lengths[0]) for lengths in held.values()]

    def _make_room(self, new: Sequence[tuple[Row, Sequence[int]]]) -> None:
        """Replace the caches by larger ones if rows with these lengths do not fit."""
        count, capacities = self._room(new)
        if count == len(self._places) and all(
            capacities[name] == cache.capacity for name, cache in self._caches.items()
        ):
            return
        places = np.zeros(count, np.int64)
        places[: len(self._places)] = self._places
        old = list(range(len(self._slots)))
        larger = {}
        for name, cache in self._caches.items():
            larger[name] = self._stages.cache(name, np.zeros(count, np.int64), capacities[name])
            larger[name].copy_rows(old, cache, old)
        self._caches, self._places, self._decoder = larger, places, None


def _account(row: Row, number: int, caches: dict[str, SegmentCache]) -> None:
    row.kv_bytes = sum(cache.used(number) for cache in caches.values())
    row.kv_bytes_allocated = sum(cache.allocated for cache in caches.values())
