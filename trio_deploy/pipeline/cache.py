"""Keys and values of a request: one block a segment of layers, allocated once, written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trio_deploy.bundle.manifest import StageInfo, TensorInfo
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.arrays import clear, copy
from trio_deploy.runtimes.base import Array

_Slot = tuple[int, str]  # layer, and key or value

Empties = Callable[[Sequence[tuple[int, ...]], np.dtype], Sequence[Array]]
"""Uninitialised arrays of shapes and one type, which come and go together."""


@dataclass(frozen=True)
class CacheShape:
    """What is the same for all layers: G key/value heads of size D, and the float type."""

    heads: int
    head_dim: int
    dtype: np.dtype

    def nbytes(self, tokens: int) -> int:
        """Bytes of keys and values of one layer that holds `tokens` tokens."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize * tokens


@dataclass
class SegmentCache:
    """Keys and values [B,G,C,D] of one segment's layers.

    With one side, past and present of a layer are the same buffer. With two, step t reads side
    t mod 2 and writes the whole of the other.

    Attributes:
        capacity: C, tokens a row can hold.
        lengths: int64 [B], tokens valid in each row.
        turn: steps done, hence which side the next one reads.
    """

    layers: Sequence[int]
    capacity: int
    lengths: np.ndarray
    shape: CacheShape
    sides: list[dict[_Slot, Array]] = field(default_factory=list)
    turn: int = 0

    @classmethod
    def allocate(
        cls,
        layers: Sequence[int],
        lengths: np.ndarray,
        capacity: int,
        shape: CacheShape,
        empties: Empties,
        sides: int,
    ) -> SegmentCache:
        """Buffers for rows that hold `lengths` tokens after the prefill.

        Raises:
            TrioError: the capacity is too small.
        """
        cache = cls(layers, capacity, lengths.copy(), shape)
        cache.check()
        names: list[_Slot] = [(i, part) for i in layers for part in ("key", "value")]
        cache.sides = [
            dict(zip(names, empties([cache._full] * len(names), shape.dtype), strict=True))
            for _ in range(sides)
        ]
        return cache

    def head(self, rows: int) -> SegmentCache:
        """The first rows alone, in the same memory; all rows where it cannot be sliced."""
        if rows == self.rows or not self.sliceable:
            return self
        sides = [{name: array[:rows] for name, array in side.items()} for side in self.sides]
        return SegmentCache(self.layers, self.capacity, self.lengths[:rows], self.shape, sides)

    @property
    def sliceable(self) -> bool:
        """Whether rows can be used apart; ONNX Runtime's own values on a GPU offer no parts."""
        return hasattr(next(iter(self.sides[0].values())), "__getitem__")

    def past(self, stage: StageInfo, step: int = 0) -> dict[str, Array]:
        """Cache inputs of a stage that are of these layers, by name, at a decode step."""
        return self._named(stage.inputs_of("cache"), step)

    def present(self, stage: StageInfo, step: int = 0) -> dict[str, Array]:
        """Cache outputs of a stage that are of these layers, by name, at a decode step."""
        return self._named(stage.outputs_of("cache"), step + 1)

    def fill(self, stage: StageInfo, outputs: Mapping[str, Array]) -> None:
        """Copy the caches [B,G,S,D] that a prefill returned to the front of step 0's past."""
        for name, array in self._named(stage.outputs_of("cache"), 0).items():
            new = outputs[name]
            ours = array if self.sliceable else np.empty(self._full, self.shape.dtype)
            copy(ours[:, :, : new.shape[2]], new)
            # A runtime may multiply what lies behind by 0, which must not give NaN.
            clear(ours[:, :, new.shape[2] :])
            if ours is not array:
                array.update_inplace(ours)

    def copy_rows(self, rows: Sequence[int], source: SegmentCache, taken: Sequence[int]) -> None:
        """Let `rows` hold what rows `taken` of another cache of these layers (or of this) hold.

        Raises:
            TrioError: the capacity is too small.
        """
        self.lengths[rows] = source.lengths[taken]
        self.check()
        for name, theirs in source._side(source.turn).items():
            array = self._side(self.turn)[name]
            ours = array if self.sliceable else array.numpy()
            theirs = theirs if source.sliceable else theirs.numpy()
            for row, other, length in zip(rows, taken, source.lengths[taken], strict=True):
                copy(ours[row : row + 1, :, :length], theirs[other : other + 1, :, :length])
                clear(ours[row : row + 1, :, length:])  # as in `fill`
            if ours is not array:
                array.update_inplace(ours)

    def advance(self, active: np.ndarray) -> None:
        """Count the token that a step wrote for each of the first rows, by bool `active`."""
        self.lengths[: len(active)] += active
        self.turn += 1

    def check(self) -> None:
        """Raises TrioError if a row is longer than the capacity."""
        longest = int(self.lengths.max())
        if longest > self.capacity:
            raise TrioError(
                f"the KV cache of layers {self.layers[0]} to {self.layers[-1]} holds "
                f"{self.capacity} tokens, but {longest} are needed"
            )

    @property
    def rows(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def allocated(self) -> int:
        """Bytes of all buffers."""
        one = self.shape.nbytes(self.rows * self.capacity) * len(self.layers)
        return one * len(self.sides)

    def used(self, row: int) -> int:
        """Bytes of the tokens that one row holds now."""
        return self.shape.nbytes(int(self.lengths[row])) * len(self.layers)

    @property
    def _full(self) -> tuple[int, ...]:
        """Shape of a buffer."""
        return (self.rows, self.shape.heads, self.capacity, self.shape.head_dim)

    def _named(self, tensors: Sequence[TensorInfo], step: int) -> dict[str, Array]:
        side = self._side(step)
        slots = {tensor.name: (tensor.layer, tensor.part) for tensor in tensors}
        return {name: side[slot] for name, slot in slots.items() if slot in side}  # type: ignore[index]

    def _side(self, step: int) -> dict[_Slot, Array]:
        return self.sides[step % len(self.sides)]
