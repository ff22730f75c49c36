"""Requests in the queue, alone and in a batcher; bad ones are told why and fail no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.batching import SHORT, Gate, expire, mixed, unfinished, waiting
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, alike, ask
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Pipeline, Request, TrioError
from trio_deploy.errors import PromptTooLong
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    EventThread,
    Handle,
    Refused,
)
from trio_deploy.pipeline.batcher.metrics import Recorder
from trio_deploy.pipeline.batcher.queue import Job, RequestQueue
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits, Entry

END = Event(error=Cancelled("the request was cancelled"))


class Queue(RequestQueue):
    """A queue of two that nothing prepares or takes from."""

    def __init__(self) -> None:
        self.events, self.recorder = EventThread(), Recorder()
        super().__init__(BatcherLimits(max_queue=2), self.events, self.recorder)

    def submit(self, key: int, heard: list[Event] | None = None) -> Job:
        handle = Handle(None if heard is None else heard.append, self.wake)
        job = Job(Entry(key), Request("?"), handle, time.perf_counter())
        self.add(job, lambda job: None)
        return job


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.events.close()


def row(tokens: int) -> Any:
    return SimpleNamespace(prompt=SimpleNamespace(length=tokens), token_ids=[1, 2])


def test_a_request_is_prepared_waits_and_is_taken_out(queue: Queue) -> None:
    first, second = queue.submit(0), queue.submit(1)
    assert queue.snapshot().preparing == [first, second] and queue.queued == 2
    assert queue.prepared(second, row(7)) and queue.prepared(first, row(5))
    assert queue.snapshot().waiting == [second, first], "in the order of being ready"
    assert second.entry == Entry(1, tokens=7)
    assert queue.remove([0, 9]) == [first] and queue.queued == 1


def test_a_request_that_was_taken_out_while_being_prepared_does_not_wait(queue: Queue) -> None:
    job = queue.submit(0)
    assert queue.remove([0]) == [job]
    assert not queue.prepared(job, row(5)) and job.row is None and queue.queued == 0


def test_a_full_or_closed_queue_refuses(queue: Queue) -> None:
    queue.submit(0)
    queue.prepared(queue.submit(1), row(5))
    with pytest.raises(Refused, match="max_queue = 2"):
        queue.submit(2)
    queue.remove([1])
    queue.close()
    with pytest.raises(Refused, match="shutting down"):
        queue.submit(3)
    assert queue.queued == 1 and queue.snapshot().closing


def test_a_request_that_no_thread_prepares_is_refused_and_forgotten(queue: Queue) -> None:
    def none(job: Job) -> None:
        raise RuntimeError("can't start new thread")

    job = Job(Entry(0), Request("?"), Handle(None, queue.wake), 0.0)
    with pytest.raises(Refused, match="new thread"):
        queue.add(job, none)
    assert queue.queued == 0 and job.handle.cancelled, "a thread may still come to it"
    assert not queue.snapshot().cancelled


def test_a_request_ends_once_and_lets_go_of_its_pictures(queue: Queue) -> None:
    heard: list[Event] = []
    job = queue.submit(0, heard)
    queue.prepared(job, row(5))
    queue.end(job, END)
    queue.end(job, END)
    with pytest.raises(Cancelled):
        job.handle.result(WAIT_S)
    assert heard == [END] and job.request is None
    metrics = queue.recorder.snapshot(0)
    assert metrics.outcomes == {"cancelled": 1} and metrics.tokens == 2


def test_cancelled_requests_show_wherever_they_are(queue: Queue) -> None:
    first, second = queue.submit(0), queue.submit(1)
    queue.prepared(first, row(5))
    queue.remove([0])  # to be prefilled
    first.handle.cancel()
    assert queue.snapshot().cancelled == {0}
    queue.cancel_all()
    assert queue.snapshot().cancelled == {0, 1} and second.expired


def test_waiting_ends_with_a_change_or_a_deadline(queue: Queue) -> None:
    queue.submit(0)
    queue.wait(None)  # at once: something has changed
    started = time.perf_counter()
    queue.wait(started + 0.02)
    assert time.perf_counter() >= started + 0.02
    threading.Timer(0.01, queue.wake).start()
    queue.wait(None)


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

    def slow(*given: Any) -> Any:
        opened.append(given)
        assert go.wait(30)
        return open_image(*given)

    monkeypatch.setattr(Preprocessor, "open_image", staticmethod(slow))
    with Batcher(pipeline) as batcher:
        images = [make_picture(seed=seed) for seed in range(3)]  # as many as the context holds
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
        assert type(caught.value) in (TrioError, PromptTooLong)
    for request, handle in zip(mixed(4), good, strict=True):
        assert alike(handle.result(WAIT_S), pipeline.generate_batch([request])[0])
    assert batcher.metrics().outcomes["invalid"] == len(BAD)


def test_a_prompt_above_the_limit_is_refused_by_its_name(pipeline: Pipeline) -> None:
    with (
        Batcher(pipeline, max_prompt_tokens=30) as batcher,
        pytest.raises(TrioError, match=r"256 of them visual.*max_prompt_tokens is 30"),
    ):
        batcher.submit(Request(ask(COLOR), [make_picture()])).result(WAIT_S)


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
