"""The worker carries out what the scheduler decides; one bad request harms no other."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.batching import SHORT, Gate, expire, unfinished, waiting
from tests.support.hand_clock import HandClock
from tests.support.questions import COLOR, alike, ask
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Pipeline, Request, TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.batch import DecodeBatch
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    Failed,
)
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits, Wait, next_action
from trio_deploy.pipeline.pieces import Piece
from trio_deploy.pipeline.sampling import Detokenizer
from trio_deploy.pipeline.sequence import SequenceState


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


def test_rows_in_prefill_count_for_the_limits_of_rows_and_bytes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, empty = pipeline.prepare(SHORT), pipeline.decode_batch()
    two, three = (empty.required_bytes([row] * count) for count in (2, 3))
    for limit in ({"max_rows": 2}, {"max_rows": 8, "max_kv_bytes": three - 1}):
        gate = Gate(pipeline, monkeypatch)
        limits = BatcherLimits(prefillers=2, **limit)
        with Batcher(pipeline, limits) as batcher:
            handles = [batcher.submit(SHORT) for _ in range(2)]
            wait_for(lambda gate=gate: sum(gate.turns) == 2)
            handles += [batcher.submit(SHORT)]
            wait_for(lambda batcher=batcher: len(waiting(batcher)) == 1)
            state = replace(batcher._worker._state(), prefills=0)  # a thread would be free
            assert state.prefilling == 2
            assert next_action(state, limits) == Wait(None)
            if limits.max_kv_bytes is not None:
                assert state.kv_bytes == [three] and two < limits.max_kv_bytes
            assert sum(gate.turns) == 2
            gate.open.set()
            for handle in handles:
                handle.result(WAIT_S)
        monkeypatch.undo()


def test_the_first_token_is_timed_from_submit_on(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock(monkeypatch)
    clock.before(pipeline._preparer, "_open", 10)
    clock.before(pipeline, "prepare", 7)  # until a thread is free
    clock.before(pipeline, "prefill", 1000)
    clock.before(DecodeBatch, "step", 4)
    picture = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=3)
    with Batcher(pipeline, max_rows=1) as batcher:
        answer = batcher.submit(picture).result(WAIT_S)
        metrics = batcher.metrics()
    assert answer.first_token_s == metrics.first_token.total == 7 + 10 + 1000
    assert answer.timings["preprocess"] >= 10
    assert (answer.timings["queue"], metrics.queue.total) == (7, 7)
    assert (metrics.between_tokens.total, metrics.latency.total) == (2 * 4, 1017 + 2 * 4)
    assert metrics.prompt_tokens == answer.prompt_tokens
    assert answer.tokens_per_s == 2 / (2 * 4) and answer.timings["decode"] == 2 * 4


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


def test_an_answer_that_cannot_end_at_its_deadline_fails_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=2000)
    shorter = replace(request, max_new_tokens=200)
    flush, broken = Detokenizer.flush, [True]

    def break_once(detokenizer: Detokenizer) -> str:
        if broken and broken.pop():
            raise ValueError("no text")
        return flush(detokenizer)

    with Batcher(pipeline) as batcher:
        started = [threading.Event(), threading.Event()]
        late = batcher.submit(request, lambda event: started[0].set(), timeout_s=600)
        other = batcher.submit(shorter, lambda event: started[1].set(), timeout_s=600)
        assert all(event.wait(WAIT_S) for event in started)
        monkeypatch.setattr(Detokenizer, "flush", break_once)
        (job,) = (job for job in unfinished(batcher) if job.handle is late)
        job.entry = replace(job.entry, deadline=0.0)
        batcher._queue.wake()
        with pytest.raises(Failed, match="no text"):
            late.result(WAIT_S)
        assert len(other.result(WAIT_S).token_ids) == 200


def test_a_row_whose_prefill_fails_leaves_the_others_their_answers(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefilled together they all fail; then each is tried alone."""
    prefill = pipeline.prefill

    def fragile(rows: list[SequenceState], *given: Any) -> Any:
        if any(row.request.max_new_tokens == 7 for row in rows):
            raise TrioError("select_2 found no set of tokens")
        return prefill(rows, *given)

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

    def broken(rows: list[SequenceState], *given: Any) -> Any:
        prefilled = prefill(rows, *given)
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
        assert batcher.metrics().first_token.count == 5 and batcher._worker._prefills == 0


def _steps_in_prefills(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, batcher: Batcher
) -> list[int]:
    """The decode steps that are taken within each prefill from now on."""
    prefill, steps = pipeline.prefill, list[int]()

    def counted(*given: Any) -> Any:
        before = batcher.metrics().steps
        prefilled = prefill(*given)
        steps.append(batcher.metrics().steps - before)
        return prefilled

    monkeypatch.setattr(pipeline, "prefill", counted)
    return steps


@pytest.mark.parametrize("max_gap_ms", [0.001, 1e6])
def test_rows_get_tokens_between_the_pieces_of_a_prefill_where_the_gap_asks_for_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, max_gap_ms: float
) -> None:
    running = Request("what is red ?", max_new_tokens=500)
    joining = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=2)
    with Batcher(pipeline, max_gap_ms=max_gap_ms) as batcher:
        started = threading.Event()
        first = batcher.submit(running, lambda event: started.set())
        assert started.wait(WAIT_S)
        steps = _steps_in_prefills(pipeline, monkeypatch, batcher)
        answer = batcher.submit(joining).result(WAIT_S)
        assert not first.done and len(steps) == 1
        whole = first.result(WAIT_S)
    monkeypatch.undo()
    runs = sum(stage.kind != "decode" for stage in pipeline.bundle.stages.values())
    assert steps[0] >= runs - 1 if max_gap_ms < 1 else steps[0] == 0
    assert alike(answer, pipeline.generate_batch([joining])[0])
    assert alike(whole, pipeline.generate_batch([running])[0])


def test_a_step_that_fails_between_pieces_ends_its_rows_and_not_the_prefill(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining = Request(ask(COLOR), [scenes.generate(0).image], max_new_tokens=2)
    with Batcher(pipeline, max_gap_ms=0.001) as batcher:
        started = threading.Event()
        first = batcher.submit(
            Request("what is red ?", max_new_tokens=2000), lambda event: started.set()
        )
        assert started.wait(WAIT_S)
        prefill, step = pipeline.prefill, batcher._worker._batch.step

        def breaks_steps(*given: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(batcher._worker._batch, "step", broken)
                return prefill(*given)

        def broken() -> Any:
            raise TrioError("out of memory")

        monkeypatch.setattr(pipeline, "prefill", breaks_steps)
        answer = batcher.submit(joining).result(WAIT_S)
        with pytest.raises(Failed, match="out of memory"):
            first.result(WAIT_S)
        assert batcher._worker._batch.step == step
    monkeypatch.undo()
    assert alike(answer, pipeline.generate_batch([joining])[0])


def test_a_piece_that_fails_says_nothing_about_how_long_pieces_take(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when all rows fail together, nor when one of them fails alone."""
    learnt: list[str] = []
    record, prefill, tried = pipeline.pace.record, pipeline.prefill, list[int]()

    def noted(piece: Piece, queries: int | None, seconds: float) -> None:
        learnt.append(piece.stage)
        record(piece, queries, seconds)

    def fragile(rows: list[SequenceState], clock: Any, turn: Any) -> Any:
        tried.append(len(rows))
        if any(row.request.max_new_tokens == 7 for row in rows):
            turn(Piece("sound", 1))
            turn(Piece("broken", 1))
            raise TrioError("out of memory")
        return prefill(rows, clock, turn)

    monkeypatch.setattr(pipeline.pace, "record", noted)
    gate = Gate(pipeline, monkeypatch)
    with Batcher(pipeline) as batcher:
        first = batcher.submit(SHORT)
        gate.held()
        monkeypatch.setattr(pipeline, "prefill", fragile)
        handles = [
            batcher.submit(Request("what is red ?", max_new_tokens=count)) for count in (6, 7)
        ]
        wait_for(lambda: len(waiting(batcher)) == 2)
        gate.open.set()
        for handle in (first, handles[0]):
            handle.result(WAIT_S)
        with pytest.raises(Failed, match="out of memory"):
            handles[1].result(WAIT_S)
    assert tried == [2, 1, 1]
    assert learnt.count("sound") == 2 and "broken" not in learnt
    assert len(set(learnt)) > 1  # those of the others are learnt
