"""Decoding fills a KV cache to its last place and no further, and computes the rows asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.pipeline.cache import SegmentCache
from trio_deploy.pipeline.decode import Decoder
from trio_deploy.pipeline.prefill import Clock

TOKENS, BOTH = np.array([5, 6]), np.array([True, True])


@pytest.fixture(scope="module")
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


def two_rows(pipeline: Pipeline) -> tuple[Decoder, dict[str, SegmentCache], int]:
    """A decoder of a short and a longer prompt, its caches, and the longer one's length."""
    rows = [pipeline.prepare(Request(text, max_new_tokens=5)) for text in ("what ?", "what is ?")]
    caches = pipeline.prefill(rows, Clock()).caches
    longest = rows[1].prompt.length
    assert longest > rows[0].prompt.length
    positions = np.array([row.prompt.next_position for row in rows])
    decoder = Decoder(pipeline._stages, caches, positions, pipeline.bundle.manifest.positions)
    return decoder, caches, longest


def test_a_cache_is_full_when_its_last_place_is_taken(pipeline: Pipeline) -> None:
    decoder, caches, longest = two_rows(pipeline)
    capacity = min(cache.capacity for cache in caches.values())
    assert capacity == longest + 5
    for _ in range(capacity - longest):
        assert np.isfinite(decoder.step(TOKENS, BOTH)).all()
    assert all(cache.lengths.tolist()[1] == capacity for cache in caches.values())
    with pytest.raises(TrioError, match=f"the KV cache is full: it holds {capacity} tokens"):
        decoder.step(TOKENS, BOTH)


def test_a_step_of_the_first_rows_computes_no_others(pipeline: Pipeline) -> None:
    decoder, *_ = two_rows(pipeline)
    logits = decoder.step(TOKENS, BOTH)  # overwritten by the next step
    before = logits.copy()
    decoder.step(TOKENS[:1], BOTH[:1])
    assert np.array_equal(logits[1], before[1])
    assert not np.array_equal(logits[0], before[0])
