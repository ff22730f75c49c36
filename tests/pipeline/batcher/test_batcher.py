"""Requests that come and go give the answers they would give alone; no fault is felt by others."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.batching import expire, unfinished, waiting
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, SCHEDULE, alike, ask
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Bundle, Generation, Pipeline, Request, TrioError, export_model
from trio_deploy.evaluation import scenes
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    Failed,
    Handle,
    Refused,
)
from trio_deploy.pipeline.cache import CacheShape, SegmentCache
from trio_deploy.pipeline.prefill import Clock
from trio_deploy.pipeline.sequence import SequenceState

SHORT = Request("what color is the circle ?", max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@functools.cache
def opened(folder: Path, dialect: str = "ort", runtime: str = "onnxruntime") -> Pipeline:
    """The shipped model, without an end token, so that its answers are as long as they may."""
    bundle = folder / dialect
    if not bundle.is_dir():
        export_model("tiny", bundle, schedule=SCHEDULE, dialect=dialect, progress=False)
    endless = Bundle.load(bundle).with_end_tokens([])
    return Pipeline.open(endless, runtime=runtime, threads=1)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return opened(folder)


def mixed(count: int) -> list[Request]:
    """Requests that differ in everything in which they may differ."""
    requests = []
    for number in range(count):
        scene = scenes.generate(number)
        images: list[Any] = [[scene.image], [], [make_picture(60, 90, number)] * 2][number % 3]
        requests.append(
            Request(
                ask(COLOR if number % 2 else "what shape is red ?", len(images)),
                images,
                max_new_tokens=1 + number * 7 % 12,
                temperature=(0.0, 1.0)[number % 2],
                top_p=0.9,
                seed=number,
                stop=["a", "is"] if number % 5 == 4 else (),
                budget=(None, 0.15, 1.0, 0.5)[number % 4],
            )
        )
    return requests


class Gate:
    """Holds a pipeline's prefills up until it is opened."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.turns: list[int] = []
        prefill = pipeline.prefill

        def gated(rows: list[SequenceState], clock: Any) -> Any:
            self.turns.append(len(rows))
            assert self.open.wait(WAIT_S)
            return prefill(rows, clock)

        monkeypatch.setattr(pipeline, "prefill", gated)

    def held(self) -> None:
        """Wait until a prefill is held up."""
        wait_for(lambda: bool(self.turns))


@pytest.fixture
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipeline, max_rows=4, max_queue=100) as batcher:
        yield batcher


KINDS = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]


@pytest.mark.parametrize("prefillers", [0, 2])
@pytest.mark.parametrize(("dialect", "runtime"), KINDS)
def test_rows_that_join_at_any_time_give_what_they_give_alone(
    folder: Path, dialect: str, runtime: str, prefillers: int
) -> None:
    pipeline = opened(folder, dialect, runtime)
    requests = mixed(14)
    with Batcher(pipeline, max_rows=5, prefill_rows=2, prefillers=prefillers) as batcher:
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
    assert metrics.first_tokens == len(requests) and metrics.active == metrics.queued == 0
    assert metrics.kv_bytes == metrics.kv_bytes_allocated == 0


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


def test_events_are_the_answer_in_pieces(batcher: Batcher) -> None:
    events: list[Event] = []
    request = Request(ask(COLOR), [scenes.generate(3).image], max_new_tokens=9)
    answer = batcher.submit(request, events.append).result(WAIT_S)
    assert [event.token_id for event in events] == answer.token_ids
    assert "".join(event.text for event in events) == answer.text
    assert [event.last for event in events] == [False] * 8 + [True]
    assert events[-1].generation is answer and answer.finish_reason == "length"
    assert {"queue", "preprocess", "vision", "prefill_0", "decode"} <= set(answer.timings)
    assert answer.first_token_s > 0 and all(seconds >= 0 for seconds in answer.timings.values())


def test_what_waits_beyond_the_queue_is_refused_and_the_others_are_answered(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_rows=1, max_queue=2) as batcher:
        running = batcher.submit(SHORT)
        gate.held()
        waiting = [batcher.submit(SHORT), batcher.submit(SHORT)]
        with pytest.raises(Refused, match="max_queue = 2"):
            batcher.submit(SHORT)
        assert batcher.metrics().queued == 2
        gate.open.set()
        assert len({handle.result(WAIT_S).text for handle in [running, *waiting]}) == 1
        assert batcher.metrics().outcomes == {"refused": 1, "length": 3}
    with pytest.raises(Refused, match="shutting down"):
        batcher.submit(SHORT)


def test_a_turn_prefills_no_more_rows_and_tokens_than_it_may(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=1)
    length = pipeline.prepare(picture).prompt.length
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_rows=8, prefill_rows=3, prefill_tokens=2 * length) as batcher:
        first = batcher.submit(SHORT)
        gate.held()
        handles = [batcher.submit(SHORT) for _ in range(4)]
        wait_for(lambda: len(waiting(batcher)) == 4)
        handles += [batcher.submit(picture) for _ in range(3)]
        wait_for(lambda: len(waiting(batcher)) == 7)
        gate.open.set()
        for handle in [first, *handles]:
            handle.result(WAIT_S)
    # Three short ones; the fourth with one picture, for it is padded to that; the other two.
    assert gate.turns == [1, 3, 2, 2]


def test_requests_wait_until_their_keys_and_values_fit(pipeline: Pipeline) -> None:
    request = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=20)
    alone = pipeline.decode_batch().required_bytes([pipeline.prepare(request)])
    with Batcher(pipeline, max_rows=8, max_kv_bytes=int(2.9 * alone)) as batcher:
        most = 0

        def look(event: Event) -> None:
            nonlocal most
            most = max(most, batcher._worker._batch.kv_bytes_allocated)

        handles = [batcher.submit(request, look) for _ in range(9)]
        expected = pipeline.generate_batch([request])[0]
        assert all(alike(handle.result(WAIT_S), expected) for handle in handles)
        assert alone <= most <= 2.9 * alone
    with (
        Batcher(pipeline, max_kv_bytes=alone - 1) as batcher,
        pytest.raises(TrioError, match="max_kv_bytes"),
    ):
        batcher.submit(request).result(WAIT_S)


def test_engines_of_one_capacity_need_all_of_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's that update in place are made for one; a number in a signature stands for it."""
    for segment in pipeline._stages.segments:
        inputs: Any = pipeline.engine(segment).inputs
        for name, spec in list(inputs.items()):
            if name.startswith("past."):
                shape = (*spec.shape[:2], 900, *spec.shape[3:])
                monkeypatch.setitem(inputs, name, replace(spec, shape=shape))
    running = pipeline.decode_batch(2)
    for images in ([], [make_picture()]):
        prompt = ask(COLOR, len(images))
        row = pipeline.prepare(Request(prompt, images, max_new_tokens=3))
        needed = running.required_bytes([row])
        prefilled = pipeline.prefill([row], Clock())
        row.advance(prefilled.logits[0])
        running.join([row], prefilled)
        assert running.kv_bytes_allocated == needed
    assert {cache.capacity for cache in running._caches.values()} == {900}


@pytest.mark.parametrize("prefillers", [0, 2])
def test_cancelling_is_heeded_within_a_token(pipeline: Pipeline, prefillers: int) -> None:
    with Batcher(pipeline, prefillers=prefillers) as batcher:
        events: list[Event] = []
        handle: list[Handle] = []
        known = threading.Event()

        def listen(event: Event) -> None:
            events.append(event)
            known.wait(WAIT_S)
            if len(events) == 3:
                handle[0].cancel()

        long = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=150)
        other = batcher.submit(long)
        handle.append(batcher.submit(long, listen))
        known.set()
        with pytest.raises(Cancelled):
            handle[0].result(WAIT_S)
        assert len(events) <= 3 + 1 + 1, "one more token, and the end"
        assert alike(other.result(WAIT_S), pipeline.generate_batch([long])[0])
        handle[0].cancel()  # again, and too late: nothing happens
        metrics = batcher.metrics()
        assert metrics.outcomes == {"cancelled": 1, "length": 1}
        assert metrics.tokens - len(other.result(0).token_ids) in (3, 4)


def test_a_waiting_request_can_be_cancelled_and_overdue(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_rows=1) as batcher:
        running = batcher.submit(SHORT)
        gate.held()
        cancelled, late = batcher.submit(SHORT), batcher.submit(SHORT, timeout_s=0.01)
        served = batcher.submit(SHORT, timeout_s=600)
        cancelled.cancel()
        time.sleep(0.02)
        gate.open.set()
        with pytest.raises(Cancelled):
            cancelled.result(WAIT_S)
        with pytest.raises(DeadlinePassed):
            late.result(WAIT_S)
        assert served.result(WAIT_S).token_ids == running.result(WAIT_S).token_ids


def test_requests_that_no_thread_has_prepared_are_cancelled_and_overdue_too(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, prepare = threading.Event(), pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *given: go.wait(60) and prepare(*given))
    with Batcher(pipeline, preparers=1) as batcher:
        stuck, late = batcher.submit(SHORT), batcher.submit(SHORT, timeout_s=0.01)
        with pytest.raises(DeadlinePassed):
            late.result(WAIT_S)
        stuck.cancel()
        with pytest.raises(Cancelled):
            stuck.result(WAIT_S)
        assert batcher.metrics().queued == 0
        go.set()
        assert len(batcher.submit(SHORT).result(WAIT_S).token_ids) == 3
        assert batcher.metrics().outcomes == {"deadline": 1, "cancelled": 1, "length": 1}


@pytest.mark.parametrize("ended", ["cancelled", "deadline"])
def test_pictures_of_a_request_that_nobody_waits_for_are_not_all_decoded(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    go, opened = threading.Event(), []
    open_image = Preprocessor.open_image

    def slow(source: Any) -> Any:
        opened.append(source)
        assert go.wait(30)
        return open_image(source)

    monkeypatch.setattr(Preprocessor, "open_image", staticmethod(slow))
    with Batcher(pipeline) as batcher:
        images = [make_picture(seed=seed) for seed in range(4)]
        handle = batcher.submit(Request(ask(COLOR, len(images)), images))
        wait_for(lambda: bool(opened))
        if ended == "cancelled":
            handle.cancel()
        else:
            expire(batcher)
        with pytest.raises(Cancelled if ended == "cancelled" else DeadlinePassed):
            handle.result(30)
        go.set()
    assert len(opened) == 1
    assert batcher.metrics().outcomes == {ended: 1}


def test_waiting_in_vain_counts_as_waiting(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the average would fall as more give up; what is refused at once has not waited."""
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_rows=1, max_queue=3) as batcher:
        running = batcher.submit(SHORT)
        gate.held()
        cancelled, late = batcher.submit(SHORT), batcher.submit(SHORT, timeout_s=0.3)
        bad = batcher.submit(Request("?", [b"no picture"]))
        wait_for(lambda: bad.done)
        served = batcher.submit(SHORT)
        with pytest.raises(Refused):
            batcher.submit(SHORT)
        wait_for(lambda: len(waiting(batcher)) == 3)
        time.sleep(0.3)
        cancelled.cancel()
        assert batcher.metrics().waits == 0
        gate.open.set()
        for handle in (running, served):
            handle.result(30)
        for handle in (cancelled, late):
            with pytest.raises((Cancelled, DeadlinePassed)):
                handle.result(30)
    metrics = batcher.metrics()
    assert metrics.outcomes == {"length": 2, "cancelled": 1, "deadline": 1} | {
        "invalid": 1,
        "refused": 1,
    }
    assert metrics.waits == 4
    assert metrics.queue_s > 3 * 0.25  # all but the first; preparing is left out


def test_a_request_that_waits_holds_no_picture(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded ones are large: those of a full queue would fill the memory."""
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_rows=1) as batcher:
        batcher.submit(SHORT)
        gate.held()
        handle = batcher.submit(Request(ask(COLOR), [make_picture()], max_new_tokens=1))
        wait_for(lambda: len(waiting(batcher)) == 1)
        (job,) = waiting(batcher)
        assert job.row is not None and not job.row.images and not job.row.request.images
        assert job.request is None
        gate.open.set()
        assert handle.result(WAIT_S).visual_tokens == 256


def test_a_deadline_ends_an_answer_with_what_there_is(pipeline: Pipeline) -> None:
    request = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=2000)
    whole = pipeline.generate_batch([Request(request.prompt, request.images, 60)])[0]
    with Batcher(pipeline) as batcher:
        started = threading.Event()
        handle = batcher.submit(request, lambda event: started.set(), timeout_s=600)
        assert started.wait(WAIT_S)
        expire(batcher)
        answer = handle.result(WAIT_S)
    assert answer.finish_reason == "deadline" and answer.kv_bytes > 0
    known = min(len(answer.token_ids), len(whole.token_ids))
    assert known > 0 and answer.token_ids[:known] == whole.token_ids[:known]


BAD: list[tuple[Request, str]] = [
    (Request(ask(COLOR), [b"no picture"]), "picture"),
    (Request(ask(COLOR), []), "placeholder"),
    (Request(ask(COLOR), [make_picture()], budget=0.0001), "budget"),
    (Request("?", temperature=float("nan")), "temperature"),
    (Request("word " * 4000), "context"),
]


def test_a_bad_request_is_told_why_and_no_other_feels_it(
    pipeline: Pipeline, batcher: Batcher
) -> None:
    good = [batcher.submit(request) for request in mixed(4)]
    bad = [(batcher.submit(request), message) for request, message in BAD]
    for handle, message in bad:
        with pytest.raises(TrioError, match=message) as caught:
            handle.result(WAIT_S)
        assert type(caught.value) is TrioError
    for request, handle in zip(mixed(4), good, strict=True):
        assert alike(handle.result(WAIT_S), pipeline.generate_batch([request])[0])
    assert batcher.metrics().outcomes["invalid"] == len(BAD)


def test_a_prompt_above_the_limit_is_refused_by_its_name(pipeline: Pipeline) -> None:
    with (
        Batcher(pipeline, max_prompt_tokens=30) as batcher,
        pytest.raises(TrioError, match=r"256 of them visual.*max_prompt_tokens is 30"),
    ):
        batcher.submit(Request(ask(COLOR), [make_picture()])).result(WAIT_S)


def test_a_row_whose_prefill_fails_leaves_the_others_their_answers(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefilled together they all fail; then each is tried alone."""
    prefill = pipeline.prefill

    def fragile(rows: list[SequenceState], clock: Any) -> Any:
        if any(row.request.max_new_tokens == 7 for row in rows):
            raise TrioError("select_2 found no set of tokens")
        return prefill(rows, clock)

    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline) as batcher:
        first = batcher.submit(SHORT)
        gate.held()
        monkeypatch.setattr(pipeline, "prefill", fragile)
        requests = [Request("what is red ?", max_new_tokens=count) for count in (6, 7, 8)]
        handles = [batcher.submit(request) for request in requests]
        wait_for(lambda: len(waiting(batcher)) == 3)
        gate.open.set()
        first.result(WAIT_S)
        with pytest.raises(Failed, match="select_2"):
            handles[1].result(WAIT_S)
        for number in (0, 2):
            alone = pipeline.generate_batch([requests[number]])[0]
            assert alike(handles[number].result(WAIT_S), alone)


def test_logits_that_are_not_numbers_end_their_row_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = SequenceState.advance

    def broken(row: SequenceState, logits: np.ndarray) -> str:
        if row.request.seed == 5 and len(row.token_ids) == 2:
            logits = np.full_like(logits, np.nan)
        return take(row, logits)

    monkeypatch.setattr(SequenceState, "advance", broken)
    sound = Request("what is red ?", max_new_tokens=9, seed=4)
    with Batcher(pipeline) as batcher:
        handles = [
            batcher.submit(request)
            for request in (sound, Request("what is red ?", max_new_tokens=9, seed=5), sound)
        ]
        with pytest.raises(Failed, match="not finite"):
            handles[1].result(WAIT_S)
        expected = pipeline.generate_batch([sound])[0]
        for handle in (handles[0], handles[2]):
            assert alike(handle.result(WAIT_S), expected)


@pytest.mark.parametrize("prefillers", [0, 1])
@pytest.mark.parametrize("name", ["step", "join", "release"])
def test_a_failing_batch_ends_its_rows_and_not_the_service(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str, prefillers: int
) -> None:
    def broken(*given: Any) -> Any:
        raise TrioError("ONNX Runtime failed: out of memory")

    with Batcher(pipeline, prefillers=prefillers) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(batcher._worker._batch, name, broken)
            handles = [batcher.submit(SHORT) for _ in range(6)]
            for handle in handles:
                with pytest.raises(Failed, match="out of memory"):
                    handle.result(WAIT_S)
        assert alike(batcher.submit(SHORT).result(WAIT_S), pipeline.generate_batch([SHORT])[0])
        assert batcher.metrics().outcomes == {"failed": 6, "length": 1}


@pytest.mark.parametrize("prefillers", [0, 1])
@pytest.mark.parametrize("fault", ["logits", "timings"])
def test_a_prefill_that_gives_nonsense_ends_its_rows_and_not_the_service(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, fault: str, prefillers: int
) -> None:
    prefill = pipeline.prefill

    def broken(rows: list[SequenceState], clock: Any) -> Any:
        prefilled = prefill(rows, clock)
        if fault == "logits":
            return replace(prefilled, logits=prefilled.logits[:0])
        for row in rows:
            row.timings.clear()
        return prefilled

    with Batcher(pipeline, prefillers=prefillers) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "prefill", broken)
            handles = [batcher.submit(SHORT) for _ in range(6)]
            for handle in handles:
                with pytest.raises(Failed):
                    handle.result(WAIT_S)
        assert alike(batcher.submit(SHORT).result(WAIT_S), pipeline.generate_batch([SHORT])[0])
        assert batcher.metrics().outcomes == {"failed": 6, "length": 1}


def test_a_request_that_cannot_be_chosen_ends_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rows: list[SequenceState]) -> int:
        raise RuntimeError("no such segment")

    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline, max_kv_bytes=10**9) as batcher:
        first = batcher.submit(SHORT)
        gate.held()
        others = [batcher.submit(SHORT) for _ in range(2)]
        wait_for(lambda: len(waiting(batcher)) == 2)
        monkeypatch.setattr(batcher._worker._batch, "required_bytes", broken)
        gate.open.set()
        for handle in others:
            with pytest.raises(Failed, match="no such segment"):
                handle.result(WAIT_S)
        assert alike(first.result(WAIT_S), pipeline.generate_batch([SHORT])[0])


def test_a_request_that_no_thread_can_prepare_is_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any) -> None:
        raise RuntimeError("can't start new thread")

    with Batcher(pipeline) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(batcher._preparer._pool, "submit", none)
            with pytest.raises(Refused, match="new thread"):
                batcher.submit(SHORT)
        assert batcher.metrics().queued == 0 and not unfinished(batcher)
        assert alike(batcher.submit(SHORT).result(WAIT_S), pipeline.generate_batch([SHORT])[0])


@pytest.mark.parametrize("late", [False, True])
def test_a_prefill_that_no_thread_is_started_for_is_done_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A pool that cannot start a thread keeps the work, which another of its threads may do."""
    with Batcher(pipeline, prefillers=1) as batcher:
        submit = batcher._worker._prefill_pool.submit

        def none(*given: Any) -> None:
            if late:
                submit(*given)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(batcher._worker._prefill_pool, "submit", none)
        expected = pipeline.generate_batch([SHORT])[0]
        for handle in [batcher.submit(SHORT) for _ in range(5)]:
            assert alike(handle.result(WAIT_S), expected)
        assert batcher.metrics().outcomes == {"length": 5}
        assert batcher.metrics().first_tokens == 5 and batcher._worker._prefills == 0


def test_a_listener_that_raises_loses_its_request_alone(
    pipeline: Pipeline, batcher: Batcher
) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise RuntimeError("client gone")

    one = batcher.submit(Request(SHORT.prompt, max_new_tokens=200), broken)
    two = batcher.submit(SHORT)
    with pytest.raises(Cancelled):
        one.result(WAIT_S)
    assert [event.last for event in heard] == [False, True], "it may have things to put away"
    assert alike(two.result(WAIT_S), pipeline.generate_batch([SHORT])[0])


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
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU ONNX Runtime's own values cannot; here those on the CPU stand in for them."""
    from trio_deploy.runtimes.onnxruntime import OrtEngine

    def empty(engine: OrtEngine, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return engine._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, "cpu", 0)

    pipeline = opened(folder)
    expected = [pipeline.generate_batch([request])[0] for request in mixed(8)]
    monkeypatch.setattr(OrtEngine, "empty", empty)
    with Batcher(pipeline, max_rows=3, prefill_rows=2) as batcher:
        handles = [batcher.submit(request) for request in mixed(8)]
        answers: list[Generation] = [handle.result(WAIT_S) for handle in handles]
    assert all(alike(*pair) for pair in zip(answers, expected, strict=True))


def test_a_row_copied_between_caches_brings_its_tokens_and_no_other(pipeline: Pipeline) -> None:
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
