"""Handles and the thread of listeners, alone and in a batcher."""

from __future__ import annotations

import threading

import pytest

from tests.support.batching import SHORT
from tests.support.questions import COLOR, alike, ask
from tests.support.waiting import WAIT_S
from trio_deploy import Batcher, Pipeline, Request, TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    EventThread,
    Failed,
    Handle,
    failed,
    outcome,
)

END = Event(error=Cancelled("the request was cancelled"))


def test_events_are_delivered_in_order_and_the_last_one_ends_the_request() -> None:
    heard: list[Event] = []
    handle, thread = Handle(heard.append, lambda: None), EventThread()
    sent = [Event(1, "a"), Event(2, "b"), END]
    for event in sent:
        assert not handle.done
        thread.send(handle, event)
    with pytest.raises(Cancelled):
        handle.result(WAIT_S)
    thread.close()
    assert heard == sent and handle.done


def test_cancelling_wakes_whoever_can_end_the_request() -> None:
    woken = []
    handle = Handle(None, lambda: woken.append(1))
    assert not handle.cancelled
    handle.cancel()
    assert handle.cancelled and woken == [1]


@pytest.mark.parametrize("error", [RuntimeError("client gone"), SystemExit(3)])
def test_a_listener_that_raises_cancels_its_request_and_gets_the_last_event_only(
    error: BaseException,
) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise error

    handle, thread = Handle(broken, lambda: None), EventThread()
    for event in (Event(1, "a"), Event(2, "b"), END):
        thread.send(handle, event)
    thread.close()
    assert heard == [Event(1, "a"), END] and handle.cancelled and handle.done


def test_listeners_are_at_most_one_step_behind() -> None:
    go, behind = threading.Event(), threading.Event()
    handle, thread = Handle(lambda event: go.wait(WAIT_S) and None, lambda: None), EventThread()
    thread.send(handle, Event(1, "a"))
    thread.wait_one_step_behind()  # the first step's events may still be under way

    def second_step() -> None:
        thread.send(handle, Event(2, "b"))
        thread.wait_one_step_behind()
        behind.set()

    worker = threading.Thread(target=second_step)
    worker.start()
    assert not behind.wait(0.05)
    go.set()
    assert behind.wait(WAIT_S)
    worker.join()
    thread.close()


def test_waiting_for_a_result_has_an_end() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        Handle(None, lambda: None).result(0.01)


def test_errors_are_counted_by_their_kind() -> None:
    errors = [Cancelled("x"), DeadlinePassed("x"), Failed("x"), TrioError("x")]
    assert [*map(outcome, errors)] == ["cancelled", "deadline", "failed", "invalid"]
    assert str(failed(TrioError("out of memory"))) == "out of memory"
    assert str(failed(RuntimeError("boom"))) == "RuntimeError('boom')"


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
