"""Rows copied between KV caches."""

from __future__ import annotations

import numpy as np
import pytest

from trio_deploy import TrioError
from trio_deploy.pipeline.cache import CacheShape, SegmentCache


def test_a_row_copied_between_caches_brings_its_tokens_and_no_other() -> None:
    shape = CacheShape(2, 4, np.dtype(np.float32))

    def cache(rows: int, lengths: list[int], capacity: int) -> SegmentCache:
        made = SegmentCache.allocate(
            [0],
            np.array(lengths),
            capacity,
            shape,
            lambda shapes, dtype: [np.full(each, np.nan, dtype) for each in shapes],
            2,
        )
        assert made.rows == rows
        return made

    source, target = cache(2, [3, 5], 6), cache(3, [0, 0, 0], 8)
    for buffers in source.buffers:
        for array in buffers.values():
            array[:] = np.arange(array.size).reshape(array.shape)
    target.step = 1
    target.copy_rows([2, 0], source, [1, 0])
    assert target.lengths.tolist() == [3, 0, 5]
    for name, array in target.buffers[1].items():
        assert np.array_equal(array[2, :, :5], source.buffers[0][name][1, :, :5])
        assert np.array_equal(array[0, :, :3], source.buffers[0][name][0, :, :3])
        assert not array[2, :, 5:].any() and np.isnan(array[1]).all()
    assert all(np.isnan(array).all() for array in target.buffers[0].values())
    with pytest.raises(TrioError, match="holds 2 tokens, but 5 are needed"):
        cache(1, [0], 2).copy_rows([0], source, [1])


def test_what_is_never_read_is_not_written() -> None:
    """Memory that no row uses yet costs no time then: gigabytes where many rows wait."""
    shape = CacheShape(1, 2, np.dtype(np.float32))
    source, target = (
        SegmentCache.allocate(
            [0],
            np.array([2]),
            4,
            shape,
            lambda shapes, dtype: [np.full(each, np.nan, dtype) for each in shapes],
            1,
        )
        for _ in range(2)
    )
    source.buffers[0][0, "key"][:] = 1
    target.clears = False
    target.copy_rows([0], source, [0])
    keys = target.buffers[0][0, "key"]
    assert (keys[:, :, :2] == 1).all() and np.isnan(keys[:, :, 2:]).all()


def test_a_capacity_is_what_fits_exactly() -> None:
    shape = CacheShape(1, 2, np.dtype(np.float32))

    def allocate(lengths: list[int], capacity: int) -> SegmentCache:
        arrays = [np.zeros((len(lengths), 1, capacity, 2), np.float32) for _ in range(4)]
        return SegmentCache.allocate(
            [3, 4], np.array(lengths), capacity, shape, lambda *_: arrays, 1
        )

    assert allocate([2, 5], 5).lengths.tolist() == [2, 5]
    with pytest.raises(TrioError, match="of layers 3 to 4 holds 4 tokens, but 5 are needed"):
        allocate([2, 5], 4)
