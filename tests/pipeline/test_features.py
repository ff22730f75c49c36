"""Features of a picture that was seen before are the tower's, and are held within a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.batching import Gate
from tests.support.bundles import Bundles
from tests.support.questions import SCHEDULE, alike, ask
from tests.support.tensors import file
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Pipeline, Request
from trio_deploy.families.base import Layout
from trio_deploy.pipeline.features import FeatureCache, KeyedLayout, key_of
from trio_deploy.pipeline.prefill import Clock

ROWS = 4
ONE = ROWS * 2 * 4 + ROWS * 8 + ROWS * 4 * 8  # bytes of one picture's outputs, rows and boxes


def layout(key: bytes) -> KeyedLayout:
    plain = Layout(
        {"pixel_values": np.zeros((1, 3), np.float32)},
        ROWS,
        "x" * ROWS,
        np.arange(ROWS),
        np.zeros((ROWS, 4)),
        (2, 2),
    )
    return KeyedLayout.of(plain, key)


def run(images: list[Any]) -> list[dict[str, np.ndarray]]:
    """A tower: features tell the key."""
    return [{"features": np.full((ROWS, 2), image.key[0], np.float32)} for image in images]


def seen(cache: FeatureCache, *keys: bytes) -> list[float]:
    found = cache.encode([layout(key) for key in keys], run)
    return [float(found[key]["features"][0, 0]) for key in keys]


def test_the_tower_runs_once_per_picture() -> None:
    cache = FeatureCache(10 * ONE)
    assert seen(cache, b"a", b"b", b"a") == [97, 98, 97]
    assert (cache.counts.hits, cache.counts.misses, cache.counts.nbytes) == (1, 2, 2 * ONE)
    assert seen(cache, b"b") == [98] and cache.counts.misses == 2
    known = cache.find(b"a")
    assert known is not None and known.encoded is not None and known.feeds == {}
    assert cache.find(b"c") is None


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    cache = FeatureCache(2 * ONE)
    seen(cache, b"a", b"b")
    cache.find(b"a")
    seen(cache, b"c")
    assert [cache.find(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.counts.nbytes == 2 * ONE


def test_what_is_found_stays_until_its_prefill_though_it_is_dropped() -> None:
    cache = FeatureCache(ONE)
    seen(cache, b"a")
    pinned = cache.find(b"a")
    assert pinned is not None
    seen(cache, b"b")
    assert cache.find(b"a") is None
    assert cache.encode([pinned], run)[b"a"] is pinned.encoded


def test_a_picture_that_is_larger_than_the_bound_is_not_kept() -> None:
    cache = FeatureCache(ONE - 1)
    assert seen(cache, b"a", b"a") == [97, 97]
    assert cache.find(b"a") is None and cache.counts.nbytes == 0


def test_a_picture_that_another_thread_is_at_is_waited_for() -> None:
    cache, go, runs = FeatureCache(10 * ONE), threading.Event(), []

    def slow(images: list[Any]) -> list[dict[str, np.ndarray]]:
        runs.append([image.key for image in images])
        assert go.wait(WAIT_S)
        return run(images)

    found: list[Any] = []

    def ask_for(*keys: bytes) -> threading.Thread:
        layouts = [layout(key) for key in keys]
        thread = threading.Thread(target=lambda: found.append(cache.encode(layouts, slow)))
        thread.start()
        return thread

    first = ask_for(b"a", b"b")
    wait_for(lambda: len(runs) == 1)
    second = ask_for(b"b", b"c")
    wait_for(lambda: len(runs) == 2)
    go.set()
    for thread in (first, second):
        thread.join(WAIT_S)
    assert runs == [[b"a", b"b"], [b"c"]]
    assert {key: outputs["features"][0, 0] for each in found for key, outputs in each.items()} == {
        b"a": 97,
        b"b": 98,
        b"c": 99,
    }


def test_a_run_that_fails_leaves_the_picture_to_those_that_wait() -> None:
    cache, began, go = FeatureCache(10 * ONE), threading.Event(), threading.Event()

    def broken(images: list[Any]) -> list[dict[str, np.ndarray]]:
        began.set()
        assert go.wait(WAIT_S)
        raise RuntimeError("no memory")

    def fail() -> None:
        with pytest.raises(RuntimeError):
            cache.encode([layout(b"a")], broken)

    failing = threading.Thread(target=fail)
    failing.start()
    assert began.wait(WAIT_S)
    waiting = threading.Thread(target=lambda: seen(cache, b"a"))
    waiting.start()
    go.set()
    for thread in (failing, waiting):
        thread.join(WAIT_S)
    assert cache.find(b"a") is not None


@pytest.fixture
def cached(bundles: Bundles) -> Iterator[Pipeline]:
    pipeline = Pipeline.open(bundles.path("tiny", schedule=SCHEDULE), threads=1)
    pipeline.cache_features(2**24)
    yield pipeline
    pipeline.cache_features(0)


def count_runs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the pictures that the tower runs for."""
    counted: list[int] = []
    tower = pipeline._stages._run_tower

    def counting(images: Any) -> Any:
        counted.append(len(images))
        return tower(images)

    monkeypatch.setattr(pipeline._stages, "_run_tower", counting)
    return lambda: sum(counted)


def test_follow_ups_are_answered_as_without_the_cache(
    cached: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = count_runs(cached, monkeypatch)
    pictures = [file(40 + number, 30) for number in range(3)]
    questions = ["what color is the circle ?", "what shape is red ?"]
    asked = [
        Request(ask(question, count), pictures[:count], max_new_tokens=5)
        for question in questions
        for count in (1, 3)
    ]
    answers = [cached.generate(request) for request in asked]
    assert runs() == 3
    together = cached.generate_batch(asked)
    assert runs() == 3 and cached.feature_counts.misses == 3
    cached.cache_features(0)
    for request, one, other in zip(asked, answers, together, strict=True):
        alone = cached.generate(request)
        assert alike(alone, one) and alike(alone, other)
        assert alone.first_logits is not None and one.first_logits is not None
        assert np.array_equal(alone.first_logits, one.first_logits)
        assert one.processed[0].size == alone.processed[0].size


def test_another_file_is_another_picture_and_a_request_may_stay_out(
    cached: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = count_runs(cached, monkeypatch)
    data = file()
    changed = bytearray(file(form="BMP"))
    flipped = bytes(changed)
    changed[-1] ^= 1
    for content, expected in ((flipped, 1), (bytes(changed), 2), (flipped, 2), (data, 3)):
        cached.generate(Request("what ?", content, max_new_tokens=1))
        assert runs() == expected
    assert key_of(flipped) != key_of(bytes(changed))
    cached.generate(Request("what ?", data, max_new_tokens=1, cache_images=False))
    assert runs() == 4 and cached.feature_counts.misses == 3


def test_one_run_serves_many_at_once(cached: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(cached, monkeypatch)
    gate = Gate(cached, monkeypatch)
    requests = [Request(f"what is {n} ?", file(), max_new_tokens=2) for n in range(6)]
    with Batcher(cached, prefillers=2, prefill_rows=2) as batcher:
        handles = [batcher.submit(request) for request in requests]
        gate.held()
        gate.open.set()
        for handle in handles:
            handle.result(WAIT_S)
    assert runs() == 1


def test_what_was_prepared_with_the_cache_runs_without_it(cached: Pipeline) -> None:
    request = Request("what ?", file(), max_new_tokens=1)
    expected = cached.generate(request).first_logits
    known, unknown = cached.prepare(request), cached.prepare(Request("what ?", file(41, 30)))
    cached.cache_features(0)
    logits = cached.prefill([known, unknown], Clock()).logits
    assert expected is not None and np.allclose(logits[0], expected, atol=1e-4)
