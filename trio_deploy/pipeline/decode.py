"""Decode one token at a time: everything is bound once, a step changes a few numbers in place."""

from __future__ import annotations

import numpy as np

from trio_deploy.bundle.manifest import Role
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.cache import SegmentCache
from trio_deploy.pipeline.prefill import Stages
from trio_deploy.runtimes.base import Array, Step


class Decoder:
    """Decodes a batch on the caches that its prefill filled."""

    def __init__(
        self,
        stages: Stages,
        caches: dict[str, SegmentCache],
        next_positions: np.ndarray,
        positions: str,
    ) -> None:
        """Set up for caches of B rows; each number of rows is bound on first use.

        Args:
            next_positions: int64 [B], `Prompt.next_position` of each row; each step increments
                those of active rows in place.
            positions: `original` continues from there, `renumber` from the number of tokens that
                each segment holds.
        """
        rows, count = len(next_positions), len(caches)
        self._stages = stages
        self._caches = caches
        self._renumber = positions == "renumber"
        self._next_positions = next_positions
        self._table = stages.table
        if self._table is None:
            self._tokens = np.zeros((rows, 1), np.int64)
        else:
            self._tokens = np.zeros((rows, 1, self._table.size), self._table.dtype)
        self._logits: np.ndarray = np.empty((rows, stages.vocab_size), np.float32)
        # [segments, B], either as decode.onnx takes them, transposed, or one row per segment, of
        # which each takes [B, 1] positions, or [B, 3, 1] equal ones.
        if stages.decode:
            self._lengths = np.zeros((rows, count), np.int64).T
            self._positions = np.zeros((rows, count), np.int64).T
        else:
            axes = () if stages.axes == 1 else (stages.axes,)
            self._lengths = np.zeros((count, rows), np.int64)
            self._positions = np.zeros((count, rows, *axes), np.int64)
        self._bound: dict[int, list[Step]] = {}
        self._sliceable = all(cache.sliceable for cache in caches.values())

    def step(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Logits [R,V] of the first R rows after feeding int64 [R] `tokens`.

        The array is overwritten by the next step. Rows where bool [R] `active` is false, and those
        after the first R, do not advance: their token is written to the same slot again, and their
        logits mean nothing.

        Raises:
            TrioError: a cache is full.
        """
        rows = len(tokens)
        self._tokens[:rows, 0] = tokens if self._table is None else self._table.rows(tokens)
        for column, cache in enumerate(self._caches.values()):
            if int(cache.lengths.max()) >= cache.capacity:
                raise TrioError(f"the KV cache is full: it holds {cache.capacity} tokens")
            self._lengths[column] = cache.lengths
            places = cache.lengths if self._renumber else self._next_positions
            self._positions[column].T[...] = places  # along all axes
            step = cache.step
        steps = self._bind(rows if self._sliceable else len(self._next_positions))
        steps[step % len(steps)]()
        self._next_positions[:rows] += active
        for cache in self._caches.values():
            cache.advance(active)
        return self._logits[:rows]

    def _bind(self, rows: int) -> list[Step]:
        if rows not in self._bound:
            caches = {name: cache.first_rows(rows) for name, cache in self._caches.items()}
            if self._stages.decode:
                numbers = range(self._stages.buffer_sets)
                steps = [self._bind_decode(rows, caches, number) for number in numbers]
            else:
                steps = self._bind_segments(rows, caches)
            self._bound[rows] = [self._stages.sequence(each) for each in steps]
        return self._bound[rows]

    def _token_feeds(self, rows: int) -> dict[Role, Array]:
        """What stands for the new tokens: their ids, or their embeddings looked up on the host."""
        role: Role = "ids" if self._table is None else "token_embeddings"
        return {role: self._tokens[:rows]}

    def _bind_decode(self, rows: int, caches: dict[str, SegmentCache], step: int) -> list[Step]:
        stage = self._stages.decode
        assert stage is not None
        feeds = self._stages.feeds(
            stage,
            {
                **self._token_feeds(rows),
                "positions": self._positions.T[:rows],
                "past_lengths": self._lengths.T[:rows],
            },
        )
        into: dict[str, Array] = {stage.output_name("logits"): self._logits[:rows]}
        for cache in caches.values():
            feeds |= cache.past(stage, step)
            into |= cache.present(stage, step)
        return [self._stages.engines[stage.name].bind(feeds, into)]

    def _bind_segments(self, rows: int, caches: dict[str, SegmentCache]) -> list[list[Step]]:
        stages = self._stages
        shape = (rows, 1, stages.hidden_size)
        hidden = [stages.engines[name].empty(shape, stages.dtype) for name in caches]
        outputs = [*hidden, self._logits[:rows]]
        nothing = np.zeros((0, stages.hidden_size), stages.dtype)
        # A generated token has no features to be added behind a layer.
        features = {tensor.name: nothing for tensor in stages.vision.outputs_of("deepstack")}
        none = np.full((rows, 1), -1, np.int64)
        zeros, ones = np.zeros((rows, 1), np.int64), np.ones(rows, np.int64)
        embed = stages.engines[stages.embed.name].bind(
            stages.feeds(
                stages.embed, {**self._token_feeds(rows), "features": nothing, "source": zeros}
            ),
            {stages.embed.output_name("tokens"): hidden[0]},
        )
        result = []
        for step in range(stages.buffer_sets):
            steps = [embed]
            for number, (name, cache) in enumerate(caches.items()):
                stage = stages.info[name]
                feeds = stages.feeds(
                    stage,
                    {
                        "tokens": hidden[number],
                        "positions": self._positions[number][:rows, ..., None],
                        "lengths": ones,
                        "past_lengths": self._lengths[number][:rows],
                        "feature_index": none,
                    },
                    features,
                )
                feeds |= cache.past(stage, step)
                into = {stages.output_name(name): outputs[number + 1]}
                into |= cache.present(stage, step)
                steps.append(stages.engines[name].bind(feeds, into))
            result.append(steps)
        return result
