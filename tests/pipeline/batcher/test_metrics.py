"""Counters and gauges, alone and in a batcher."""

from __future__ import annotations

import time

import pytest

from tests.support.batching import SHORT, Gate, waiting
from tests.support.waiting import wait_for
from trio_deploy import Batcher, Pipeline, Request
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Refused,
)
from trio_deploy.pipeline.batcher.metrics import BOUNDS_S, Histogram, Metrics, Recorder


def buckets(*seconds: float) -> tuple[int, ...]:
    """Times per bucket, counted in another way: each belongs to the first bound not below it."""
    bounds = (*BOUNDS_S, float("inf"))
    places = [min(bound for bound in bounds if each <= bound) for each in seconds]
    return tuple(places.count(bound) for bound in bounds)


def test_what_is_recorded_adds_up_and_gauges_are_set() -> None:
    recorder = Recorder()
    recorder.record_outcome("stop", 3)
    recorder.record_outcome("stop", 2)
    recorder.record_outcome("refused")
    recorder.record_waits([0.5, 0.25])
    recorder.record_step([0.001, 0.5, 1000.0, 300.0])
    recorder.record_step([0.25])
    recorder.record_outcome("length", 1, 2.0)
    recorder.update_gauges(8, 5, 6, 7)
    recorder.update_gauges(1, 2, 3, 4)
    assert recorder.snapshot(9) == Metrics(
        queued=9,
        prefilling=1,
        active=2,
        kv_bytes=3,
        kv_bytes_allocated=4,
        outcomes={"stop": 2, "refused": 1, "length": 1},
        tokens=6,
        latency=Histogram(buckets(2.0), 2.0),
        between_tokens=Histogram(buckets(0.001, 0.5, 1000.0, 300.0, 0.25), 1300.751),
        queue=Histogram(buckets(0.5, 0.25), 0.75),
        steps=2,
        step_rows=5,
    )


def test_a_snapshot_does_not_change_any_more() -> None:
    recorder = Recorder()
    recorder.record_outcome("stop")
    before = recorder.snapshot(0)
    recorder.record_outcome("stop")
    assert before.outcomes == {"stop": 1}


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
        assert batcher.metrics().queue.count == 0
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
    assert metrics.queue.count == 4
    assert metrics.queue.total > 3 * 0.25  # all but the first; preparing is left out
