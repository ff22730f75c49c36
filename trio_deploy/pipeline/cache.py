"""KV caches: one per segment of layers, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trio_deploy.bundle.manifest import StageInfo, TensorInfo
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.arrays import clear, copy
from trio_deploy.runtimes.base import Array

_Slot = tuple[int, str]  # layer, and key or value

Allocate = Callable[[Sequence[tuple[int, ...]], np.dtype], Sequence[Array]]
"""Makes uninitialised arrays of the given shapes and one dtype, freed together."""


@dataclass(frozen=True)
class CacheShape:
    """What all layers have in common: G key/value heads of size D, and the dtype."""

    heads: int
    head_dim: int
    dtype: np.dtype

    def nbytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in one layer."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize * tokens


@dataclass
class SegmentCache:
    """Keys and values [B,G,C,D] of one segment's layers.

    With one set of buffers, past and present of a layer are the same array. With two, step t reads
    set t mod 2 and writes all of the other.

    Attributes:
        capacity: C, tokens that a row has room for.
        lengths: int64 [B], tokens that each row holds.
        buffers: one or two sets, each from layer and `key` or `value` to an array.
        step: decode steps done, which tells the set that the next one reads.
        clears: whether what lies behind a row's tokens is cleared, since the runtime multiplies it
            by 0, which must not give NaN. Where it is never read, memory that no row uses yet is
            not touched.
    """

    layers: Sequence[int]
    capacity: int
    lengths: np.ndarray
    shape: CacheShape
    buffers: list[dict[_Slot, Array]] = field(default_factory=list)
    step: int = 0
    clears: bool = True

    @classmethod
    def allocate(
        cls,
        layers: Sequence[int],
        lengths: np.ndarray,
        capacity: int,
        shape: CacheShape,
        allocate: Allocate,
        buffer_sets: int,
    ) -> SegmentCache:
        """Allocate a cache for rows that hold `lengths` tokens after the prefill.

        Raises:
            TrioError: the capacity is too small.
        """
        cache = cls(layers, capacity, lengths.copy(), shape)
        cache._check_capacity()
        names: list[_Slot] = [(i, part) for i in layers for part in ("key", "value")]
        cache.buffers = [
            dict(zip(names, allocate([cache._full] * len(names), shape.dtype), strict=True))
            for _ in range(buffer_sets)
        ]
        return cache

    def first_rows(self, count: int) -> SegmentCache:
        """The first rows alone, in the same memory; all rows where it cannot be sliced."""
        if count == self.rows or not self.sliceable:
            return self
        return self._cut(slice(count))

    def only_row(self, row: int) -> SegmentCache:
        """One row alone, in the same memory, which can be sliced."""
        return self._cut(slice(row, row + 1))

    @property
    def sliceable(self) -> bool:
        """Whether rows can be used apart; ONNX Runtime's own values on a GPU cannot be sliced."""
        return hasattr(next(iter(self.buffers[0].values())), "__getitem__")

    def past(self, stage: StageInfo, step: int = 0) -> dict[str, Array]:
        """Inputs of a stage at a decode step that are caches of these layers, by name."""
        return self._named(stage.inputs_of("cache"), step)

    def present(self, stage: StageInfo, step: int = 0) -> dict[str, Array]:
        """Outputs of a stage at a decode step that are caches of these layers, by name."""
        return self._named(stage.outputs_of("cache"), step + 1)

    def fill(self, stage: StageInfo, outputs: Mapping[str, Array]) -> None:
        """Copy a prefill's cache outputs [B,G,S,D] to the front of step 0's past."""
        for name, array in self._named(stage.outputs_of("cache"), 0).items():
            new = outputs[name]
            ours = array if self.sliceable else np.empty(self._full, self.shape.dtype)
            copy(ours[:, :, : new.shape[2]], new)
            clear(ours[:, :, new.shape[2] :])
            if ours is not array:
                array.update_inplace(ours)

    def copy_rows(
        self, rows: Sequence[int], source: SegmentCache, source_rows: Sequence[int]
    ) -> None:
        """Copy rows of a cache of the same layers, which may be this one, into `rows`.

        Raises:
            TrioError: the capacity is too small.
        """
        lengths = source.lengths[source_rows]
        self.lengths[rows] = lengths
        self._check_capacity()
        for slot, theirs in source._set(source.step).items():
            array = self._set(self.step)[slot]
            ours = array if self.sliceable else array.numpy()
            theirs = theirs if source.sliceable else theirs.numpy()
            for row, other, length in zip(rows, source_rows, lengths, strict=True):
                copy(ours[row : row + 1, :, :length], theirs[other : other + 1, :, :length])
                if self.clears:
                    clear(ours[row : row + 1, :, length:])
            if ours is not array:
                array.update_inplace(ours)

    def advance(self, active: np.ndarray) -> None:
        """Count the token that a step wrote in each of the first rows where bool `active`."""
        self.lengths[: len(active)] += active
        self.step += 1

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return len(self.lengths)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers."""
        one = self.shape.nbytes(self.rows * self.capacity) * len(self.layers)
        return one * len(self.buffers)

    def used_bytes(self, row: int) -> int:
        """Bytes of the tokens that one row holds."""
        return self.shape.nbytes(int(self.lengths[row])) * len(self.layers)

    def _check_capacity(self) -> None:
        longest = int(self.lengths.max())
        if longest > self.capacity:
            raise TrioError(
                f"the KV cache of layers {self.layers[0]} to {self.layers[-1]} holds "
                f"{self.capacity} tokens, but {longest} are needed"
            )

    @property
    def _full(self) -> tuple[int, ...]:
        return (self.rows, self.shape.heads, self.capacity, self.shape.head_dim)

    def _cut(self, rows: slice) -> SegmentCache:
        parts = [{slot: array[rows] for slot, array in each.items()} for each in self.buffers]
        return replace(self, lengths=self.lengths[rows], buffers=parts)

    def _named(self, tensors: Sequence[TensorInfo], step: int) -> dict[str, Array]:
        buffers = self._set(step)
        slots = {tensor.name: (tensor.layer, tensor.part) for tensor in tensors}
        return {name: buffers[slot] for name, slot in slots.items() if slot in buffers}  # type: ignore[index]

    def _set(self, step: int) -> dict[_Slot, Array]:
        return self.buffers[step % len(self.buffers)]
