"""Requests that come and go give the answers they would give alone."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

from tests.support.batching import mixed, opened, unfinished
from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, alike, ask
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Generation, Pipeline, Request, TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    Handle,
)
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.runtimes.onnxruntime import OrtEngine

KINDS = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]


@pytest.mark.parametrize(("prefillers", "max_gap_ms"), [(0, 0.01), (0, 600.0), (2, 600.0)])
@pytest.mark.parametrize(("dialect", "runtime"), KINDS)
def test_rows_that_join_at_any_time_give_what_they_give_alone(
    bundles: Bundles, dialect: str, runtime: str, prefillers: int, max_gap_ms: float
) -> None:
    pipeline = opened(bundles, dialect, runtime)
    requests = mixed(14)
    limits = BatcherLimits(max_rows=5, prefill_rows=2, prefillers=prefillers, max_gap_ms=max_gap_ms)
    with Batcher(pipeline, limits) as batcher:
        handles = []
        for number, request in enumerate(requests):
            handles.append(batcher.submit(request))
            time.sleep(0.02 * (number % 3))
        answers = [handle.result(WAIT_S) for handle in handles]
    metrics = batcher.metrics()  # now: the worker notes what it holds after the answers are out
    for request, answer in zip(requests, answers, strict=True):
        assert alike(pipeline.generate_batch([request])[0], answer)
    assert metrics.step_rows > metrics.steps, "nobody was decoded together"
    assert metrics.tokens == sum(len(answer.token_ids) for answer in answers)
    assert metrics.first_token.count == len(requests)
    assert metrics.prefilling == metrics.active == metrics.queued == 0
    assert metrics.kv_bytes == metrics.kv_bytes_allocated == 0


def test_memory_that_holds_anything_changes_no_answer(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh memory of caches is not cleared where only tokens' keys and values are read."""
    requests = mixed(9)
    expected = [pipeline.generate_batch([request])[0] for request in requests]
    monkeypatch.setattr(
        OrtEngine, "empty", lambda self, shape, dtype: np.full(shape, np.nan, dtype)
    )
    with Batcher(pipeline, max_rows=5, max_gap_ms=0.01) as batcher:
        for answer, handle in zip(expected, [batcher.submit(r) for r in requests], strict=True):
            assert alike(handle.result(WAIT_S), answer)


def test_a_long_answer_meets_many_short_ones(pipeline: Pipeline) -> None:
    """Caches that are outgrown in rows and in tokens, and rows moved into gaps again and again."""
    long = Request(ask(COLOR), [scenes.generate(1).image], max_new_tokens=150, budget=0.2)
    others = mixed(24)
    with Batcher(pipeline, max_rows=8) as batcher:
        started = threading.Event()
        first = batcher.submit(long, lambda event: started.set())
        assert started.wait(WAIT_S)
        handles = []
        for request in others:
            handles.append(batcher.submit(request))
            time.sleep(0.003)
        assert alike(first.result(WAIT_S), pipeline.generate_batch([long])[0])
        for request, handle in zip(others, handles, strict=True):
            assert alike(handle.result(WAIT_S), pipeline.generate_batch([request])[0])


def test_unknown_words_are_named_in_every_way_to_ask(pipeline: Pipeline) -> None:
    known = Request("what color is the circle ?", max_new_tokens=3)
    unknown = Request(ask("what color is the Giraffe ?", 0), max_new_tokens=3)
    warnings = pipeline.generate(unknown).warnings
    assert len(warnings) == 1 and "lacks 'Giraffe': " in warnings[0]
    with pipeline.stream(unknown) as stream:
        list(stream)
    assert stream.generation.warnings == warnings
    together = pipeline.generate_batch([known, unknown])
    assert [each.warnings for each in together] == [(), warnings]
    events: list[Event] = []
    with Batcher(pipeline) as batcher:
        assert batcher.submit(known).result(WAIT_S).warnings == ()
        assert batcher.submit(unknown, events.append).result(WAIT_S).warnings == warnings
    assert events[-1].generation is not None and events[-1].generation.warnings == warnings


def test_draining_answers_what_was_asked(pipeline: Pipeline) -> None:
    batcher = Batcher(pipeline, max_rows=2)
    handles = [batcher.submit(request) for request in mixed(7)]
    assert batcher.close()
    assert all(handle.done for handle in handles)
    for request, handle in zip(mixed(7), handles, strict=True):
        assert alike(handle.result(0), pipeline.generate_batch([request])[0])


@pytest.mark.parametrize("drain", [False, True])
def test_closing_without_time_cancels_what_is_left(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, drain: bool
) -> None:
    batcher = Batcher(pipeline, max_rows=2)
    long = Request("what is red ?", max_new_tokens=2000)
    handles = [batcher.submit(long) for _ in range(5)]
    assert not batcher.close(drain=drain, timeout=0.01)
    for handle in handles:
        with pytest.raises(Cancelled):
            handle.result(0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"max_rows": 0}, "max_rows"), ({"max_queue": -1}, "max_queue"), ({"preparers": 0}, "prep")],
)
def test_limits_below_one_are_refused(
    pipeline: Pipeline, limits: dict[str, int], message: str
) -> None:
    with pytest.raises(TrioError, match=message):
        Batcher(pipeline, **limits)


def test_threads_for_prefills_need_a_runtime_that_several_may_call(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline._stages, "concurrent", False)
    with pytest.raises(TrioError, match="one call at a time"):
        Batcher(pipeline, prefillers=1)


def test_caches_that_cannot_be_sliced_are_filled_by_row_too(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU ONNX Runtime's own values cannot; here those on the CPU stand in for them."""
    from trio_deploy.runtimes.onnxruntime import OrtEngine

    def empty(engine: OrtEngine, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return engine._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, "cpu", 0)

    pipeline = opened(bundles)
    expected = [pipeline.generate_batch([request])[0] for request in mixed(8)]
    monkeypatch.setattr(OrtEngine, "empty", empty)
    with Batcher(pipeline, max_rows=3, prefill_rows=2) as batcher:
        handles = [batcher.submit(request) for request in mixed(8)]
        answers: list[Generation] = [handle.result(WAIT_S) for handle in handles]
    assert all(alike(*pair) for pair in zip(answers, expected, strict=True))


def test_an_answered_request_leaves_nothing_behind(pipeline: Pipeline) -> None:
    """Pictures are large, and cycles of references would keep them until a rare full collection."""
    gc.collect()
    gc.disable()
    try:
        with Batcher(pipeline) as batcher:

            class Listener:
                handle: Handle

                def hear(self, event: Event) -> None:
                    pass

            listener = Listener()
            rows = []
            take = pipeline.prepare
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    pipeline, "prepare", lambda *r: rows.append(weakref.ref(row := take(*r))) or row
                )
                listener.handle = batcher.submit(
                    Request(ask(COLOR), [make_picture()], 3), listener.hear
                )
                listener.handle.result(WAIT_S)
            gone = weakref.ref(listener)
            del listener
            # The worker and the deliverer may not have left their functions yet.
            wait_for(lambda: gone() is None and rows[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("prefillers", [0, 2])
def test_in_a_storm_everyone_gets_their_own_answer_or_what_they_wished(
    pipeline: Pipeline, prefillers: int
) -> None:
    """Requests, hang-ups and deadlines in any order, in every state that a request can be in."""
    random = np.random.default_rng(prefillers)
    requests = mixed(6)
    expected = [pipeline.generate_batch([request])[0] for request in requests]
    with Batcher(
        pipeline, max_rows=3, prefill_rows=2, max_queue=200, prefillers=prefillers
    ) as batcher:
        sent: list[tuple[int, bool, Handle]] = []
        for _ in range(60):
            number, late = int(random.integers(len(requests))), bool(random.random() < 0.1)
            timeout = float(random.random()) * 0.05 if late else 600.0
            sent.append((number, late, batcher.submit(requests[number], timeout_s=timeout)))
            if random.random() < 0.4:
                sent[int(random.integers(len(sent)))][2].cancel()
            time.sleep(float(random.random()) * 0.02)
        outcomes: dict[str, int] = {}
        for number, late, handle in sent:
            try:
                answer = handle.result(WAIT_S)
            except (Cancelled, DeadlinePassed) as error:
                assert handle.cancelled or late
                outcome = "cancelled" if isinstance(error, Cancelled) else "deadline"
            else:
                outcome = answer.finish_reason
                known = len(answer.token_ids)
                assert answer.token_ids == expected[number].token_ids[:known]
                assert outcome == "deadline" or alike(answer, expected[number])
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        metrics = batcher.metrics()
    assert metrics.outcomes == outcomes
    assert not unfinished(batcher) and not batcher._worker._batch.sequences
