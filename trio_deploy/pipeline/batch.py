"""Sequences that are decoded together: they join after their prefill and leave when they finish."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trio_deploy.pipeline.cache import SegmentCache
from trio_deploy.pipeline.decode import Decoder
from trio_deploy.pipeline.memory import memory_for
from trio_deploy.pipeline.prefill import Prefilled, Stages
from trio_deploy.pipeline.sequence import SequenceState


class DecodeBatch:
    """A batch that sequences join and leave between decode steps.

    Sequences that join an empty batch bring their caches, which the batch takes over as they are.
    Later ones are copied into free rows; caches without room are replaced by larger ones (twice the
    rows, as many tokens as are needed: an engine may be built for no more). The caches are released
    when the last sequence leaves.

    Rows stay contiguous: the last sequence moves into the row of one that leaves, so that a step
    computes as many rows as there are sequences. Where memory cannot be sliced, all rows are
    computed, and a row stays empty until a sequence joins.

    >>> batch.join(sequences, prefilled)       # each has its first token
    >>> while batch.sequences:
    ...     for sequence, logits in batch.step():
    ...         sequence.advance(logits)
    ...     batch.release()
    """

    def __init__(
        self, stages: Stages, positions: str, pad_token: int, max_rows: int | None = None
    ) -> None:
        """Make an empty batch.

        Args:
            positions: as in `Decoder`.
            pad_token: fed to empty rows.
            max_rows: most sequences at a time; None: any number.
        """
        self._max_rows = max_rows
        self._stages = stages
        self._positions = positions
        self._pad_token = pad_token
        self._rows: list[SequenceState | None] = []
        self._caches: dict[str, SegmentCache] = {}
        self._next_positions = np.zeros(0, np.int64)
        self._decoder: Decoder | None = None

    @property
    def sequences(self) -> list[SequenceState]:
        """Sequences that are still generating."""
        return [sequence for sequence in self._rows if sequence is not None]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all sequences' tokens."""
        return sum(
            cache.shape.nbytes(int(cache.lengths.sum())) * len(cache.layers)
            for cache in self._caches.values()
        )

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of all buffers."""
        return sum(cache.allocated_bytes for cache in self._caches.values())

    def required_bytes(self, sequences: Sequence[SequenceState]) -> int:
        """Bytes of all buffers once these sequences have joined."""
        shape = self._stages.cache_shape
        new = [(sequence, self._prefill_lengths(sequence)) for sequence in sequences]
        rows, capacities = self._required_capacity(new)
        return self._stages.buffer_sets * sum(
            shape.nbytes(rows * capacity) * len(self._stages.layers[name])
            for name, capacity in capacities.items()
        )

    def join(self, sequences: Sequence[SequenceState], prefilled: Prefilled) -> None:
        """Add the sequences of a prefill that have not finished with their first token.

        Raises:
            TrioError: memory of a cache is too small.
        """
        for number, sequence in enumerate(sequences):
            if sequence.finish_reason:
                _record_kv_bytes(sequence, number, prefilled.caches)
        if not self._rows:
            self._rows = list(sequences)
            self._caches = prefilled.caches
            self._next_positions = np.array(
                [each.prompt.next_position for each in sequences], np.int64
            )
            self._decoder = None
            self._free([number for number, each in enumerate(sequences) if each.finish_reason])
            return
        new = [(number, each) for number, each in enumerate(sequences) if not each.finish_reason]
        if not new:
            return
        lengths = {name: cache.lengths for name, cache in prefilled.caches.items()}
        with memory_for("decode"):
            self._grow([(each, [int(x[number]) for x in lengths.values()]) for number, each in new])
        free = [row for row, sequence in enumerate(self._rows) if sequence is None]
        free += range(len(self._rows), len(self._next_positions))
        free = free[: len(new)]
        for name, cache in self._caches.items():
            cache.copy_rows(free, prefilled.caches[name], [number for number, _ in new])
        for row, (_, sequence) in zip(free, new, strict=True):
            self._rows += [None] * (row + 1 - len(self._rows))
            self._rows[row] = sequence
            self._next_positions[row] = sequence.prompt.next_position

    def step(self) -> list[tuple[SequenceState, np.ndarray]]:
        """Feed each sequence its last token; logits [V] of its next, valid until the next step.

        Raises:
            TrioError: the runtime failed, or memory ran out.
        """
        tokens = np.array(
            [self._pad_token if each is None else each.token_ids[-1] for each in self._rows]
        )
        active = np.array([each is not None for each in self._rows])
        with memory_for("decode"):
            if self._decoder is None:
                self._decoder = Decoder(
                    self._stages, self._caches, self._next_positions, self._positions
                )
            logits = self._decoder.step(tokens, active)
        return [(each, logits[row]) for row, each in enumerate(self._rows) if each is not None]

    def release(self) -> None:
        """Remove the sequences that have finished."""
        finished = []
        for row, sequence in enumerate(self._rows):
            if sequence is not None and sequence.finish_reason:
                _record_kv_bytes(sequence, row, self._caches)
                finished.append(row)
        self._free(finished)

    def reset(self) -> None:
        """Remove all sequences and release the caches."""
        self._rows, self._caches = [], {}
        self._next_positions, self._decoder = np.zeros(0, np.int64), None

    def _free(self, rows: Sequence[int]) -> None:
        """Empty these rows, and close the gaps where memory can be sliced."""
        if not rows:
            return
        for row in rows:
            self._rows[row] = None
        if not self.sequences:
            self.reset()
            return
        sliceable = all(cache.sliceable for cache in self._caches.values())
        while sliceable and None in self._rows:
            last = self._rows.pop()
            if last is not None:
                row = self._rows.index(None)
                self._move(len(self._rows), row)
                self._rows[row] = last
        for row in range(len(self._next_positions)):
            if row >= len(self._rows) or self._rows[row] is None:
                self._next_positions[row] = 0
                for cache in self._caches.values():
                    cache.lengths[row] = 0

    def _move(self, source: int, row: int) -> None:
        for cache in self._caches.values():
            cache.copy_rows([row], cache, [source])
        self._next_positions[row] = self._next_positions[source]

    def _required_capacity(
        self, new: Sequence[tuple[SequenceState, Sequence[int]]]
    ) -> tuple[int, dict[str, int]]:
        """Rows, and tokens per row in each segment, that the caches need.

        Args:
            new: sequences that join, each with its tokens in each segment after the prefill.
        """
        rows = len(self.sequences) + len(new)
        if self._rows and rows > len(self._next_positions):
            doubled = 1 << (rows - 1).bit_length()
            rows = max(rows, min(doubled, self._max_rows or doubled))
        capacities = {}
        for column, name in enumerate(self._stages.segments):
            longest = max((lengths[column] + each.max_tokens for each, lengths in new), default=0)
            if self._rows:
                longest = max(longest, self._caches[name].capacity)
            capacities[name] = self._stages.capacity(name, longest)
        return max(rows, len(self._next_positions)), capacities

    def _prefill_lengths(self, sequence: SequenceState) -> list[int]:
        """Tokens of the prompt that each segment will hold."""
        length, visual = [sequence.prompt.length], [sequence.prompt.visual_tokens]
        keeps = [np.array([keep]) for keep in sequence.keep_counts]
        lengths = self._stages.lengths(np.array(length), np.array(visual), keeps)
        return [int(each[0]) for each in lengths.values()]

    def _grow(self, new: Sequence[tuple[SequenceState, Sequence[int]]]) -> None:
        """Replace the caches by larger ones if these sequences, as above, do not fit."""
        rows, capacities = self._required_capacity(new)
        if rows == len(self._next_positions) and all(
            capacities[name] == cache.capacity for name, cache in self._caches.items()
        ):
            return
        positions = np.zeros(rows, np.int64)
        positions[: len(self._next_positions)] = self._next_positions
        old = list(range(len(self._rows)))
        larger = {}
        for name, cache in self._caches.items():
            larger[name] = self._stages.cache(name, np.zeros(rows, np.int64), capacities[name])
            larger[name].copy_rows(old, cache, old)
        self._caches, self._next_positions, self._decoder = larger, positions, None


def _record_kv_bytes(sequence: SequenceState, row: int, caches: dict[str, SegmentCache]) -> None:
    sequence.kv_bytes = sum(cache.used_bytes(row) for cache in caches.values())
    sequence.kv_bytes_allocated = sum(cache.allocated_bytes for cache in caches.values())
