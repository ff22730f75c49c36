"""Decoding fills a KV cache to its last place and no further."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.pipeline.decode import Decoder
from trio_deploy.pipeline.prefill import Clock


@pytest.fixture(scope="module")
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


def test_a_cache_is_full_when_its_last_place_is_taken(pipeline: Pipeline) -> None:
    rows = [pipeline.prepare(Request(text, max_new_tokens=5)) for text in ("what ?", "what is ?")]
    caches = pipeline.prefill(rows, Clock()).caches
    capacity = min(cache.capacity for cache in caches.values())
    longest = rows[1].prompt.length
    assert longest > rows[0].prompt.length and capacity == longest + 5
    positions = np.array([row.prompt.next_position for row in rows])
    decoder = Decoder(pipeline._stages, caches, positions, pipeline.bundle.manifest.positions)
    both, tokens = np.array([True, True]), np.array([5, 6])
    for _ in range(capacity - longest):
        assert np.isfinite(decoder.step(tokens, both)).all()
    assert all(cache.lengths.tolist()[1] == capacity for cache in caches.values())
    with pytest.raises(TrioError, match=f"the KV cache is full: it holds {capacity} tokens"):
        decoder.step(tokens, both)
