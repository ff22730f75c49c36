"""Counters and gauges of a batcher, without one."""

from __future__ import annotations

from trio_deploy.pipeline.batcher.metrics import Metrics, Recorder


def test_what_is_recorded_adds_up_and_gauges_are_set() -> None:
    recorder = Recorder()
    recorder.record_outcome("stop", 3)
    recorder.record_outcome("stop", 2)
    recorder.record_outcome("refused")
    recorder.record_waits([0.5, 0.25])
    recorder.record_step(4)
    recorder.record_step(1)
    recorder.update_gauges(5, 6, 7)
    recorder.update_gauges(2, 3, 4)
    assert recorder.snapshot(9) == Metrics(
        queued=9,
        active=2,
        kv_bytes=3,
        kv_bytes_allocated=4,
        outcomes={"stop": 2, "refused": 1},
        tokens=5,
        waits=2,
        queue_s=0.75,
        steps=2,
        step_rows=5,
    )


def test_a_snapshot_does_not_change_any_more() -> None:
    recorder = Recorder()
    recorder.record_outcome("stop")
    before = recorder.snapshot(0)
    recorder.record_outcome("stop")
    assert before.outcomes == {"stop": 1}
