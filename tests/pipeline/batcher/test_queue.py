"""Requests on their way through the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import WAIT_S
from trio_deploy import Request
from trio_deploy.pipeline.batcher.events import Cancelled, Event, EventThread, Handle, Refused
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
    return SimpleNamespace(prompt=SimpleNamespace(length=tokens), ids=[1, 2])


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
