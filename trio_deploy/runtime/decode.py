"""One token after another: everything is bound once, a step changes a few numbers in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.runtime.engine import Array
from trio_deploy.runtime.kv import SegmentCache
from trio_deploy.runtime.stages import Stages

Step = Callable[[], None]


class Decoder:
    """Decodes a batch on the caches that its prefill filled."""

    def __init__(
        self,
        stages: Stages,
        caches: dict[str, SegmentCache],
        prompt_lengths: np.ndarray,
        positions: str,
    ) -> None:
        """Bind the graphs to the caches.

        Args:
            prompt_lengths: int64 [B], before any pruning.
            positions: `original` continues from the prompt's length, `renumber` from the number
                of tokens that each segment holds.
        """
        rows, count = len(prompt_lengths), len(caches)
        self._caches = list(caches.values())
        self._renumber = positions == "renumber"
        self._place = prompt_lengths.astype(np.int64)
        self._ids = np.zeros((rows, 1), np.int64)
        self._logits: np.ndarray = np.empty((rows, stages.vocab_size), np.float32)
        # [segments, B], either as decode.onnx takes them, seen from the side, or a row a segment.
        if stages.separate:
            self._lengths = np.empty((rows, count), np.int64).T
            self._positions = np.empty((rows, count), np.int64).T
            self._sides = [self._bind_decode(stages, side) for side in range(stages.sides)]
        else:
            self._lengths = np.empty((count, rows), np.int64)
            self._positions = np.empty((count, rows), np.int64)
            self._sides = self._bind_segments(stages, list(caches))
        self._count = 0

    def step(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Logits [B,V] after feeding int64 [B] `tokens`; the array is overwritten by the next step.

        Rows where bool [B] `active` is false stand still: their token goes to the same slot again
        and their logits mean nothing.

        Raises:
            TrioError: a cache is full.
        """
        self._ids[:, 0] = tokens
        for column, cache in enumerate(self._caches):
            if int(cache.lengths.max()) >= cache.capacity:
                raise TrioError(f"the KV cache is full: it holds {cache.capacity} tokens")
            self._lengths[column] = cache.lengths
            self._positions[column] = cache.lengths if self._renumber else self._place
        for run in self._sides[self._count % len(self._sides)]:
            run()
        self._count += 1
        self._place += active
        for cache in self._caches:
            cache.advance(active)
        return self._logits

    def _bind_decode(self, stages: Stages, side: int) -> list[Step]:
        feeds: dict[str, Array] = {
            "input_ids": self._ids,
            "position_ids": self._positions.T,
            "lengths": self._lengths.T,
        }
        into: dict[str, Array] = {"logits": self._logits}
        for cache in self._caches:
            feeds |= cache.past(side)
            into |= cache.present(side)
        return [stages.engines["decode"].bind(feeds, into)]

    def _bind_segments(self, stages: Stages, names: list[str]) -> list[list[Step]]:
        rows = len(self._ids)
        hidden = [np.empty((rows, 1, stages.hidden_size), stages.dtype) for _ in names]
        outputs = [*hidden, self._logits]
        nothing = np.zeros((0, stages.hidden_size), stages.dtype)
        zeros, ones = np.zeros((rows, 1), np.int64), np.ones(rows, np.int64)
        embed = stages.engines["embed"].bind(
            {"input_ids": self._ids, "image_features": nothing, "source_index": zeros},
            {"inputs_embeds": hidden[0]},
        )
        sides = []
        for side in range(stages.sides):
            steps = [embed]
            for number, (name, cache) in enumerate(zip(names, self._caches, strict=True)):
                feeds = {
                    stages.source(name): hidden[number],
                    "position_ids": self._positions[number][:, None],
                    "lengths": ones,
                    "past_lengths": self._lengths[number],
                    **cache.past(side),
                }
                into = {stages.sink(name): outputs[number + 1], **cache.present(side)}
                steps.append(stages.engines[name].bind(feeds, into))
            sides.append(steps)
        return sides
