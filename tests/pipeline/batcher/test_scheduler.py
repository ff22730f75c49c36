"""What the batcher does next, from tables of situations and whole runs: no threads, no clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_deploy import TrioError
from trio_deploy.pipeline.batcher.scheduler import (
    Action,
    BatcherLimits,
    Continue,
    Decode,
    Entry,
    Expire,
    Join,
    Prefill,
    State,
    Stop,
    Wait,
    next_action,
    refusal,
)

LIMITS = BatcherLimits(max_rows=4, prefill_rows=3, prefill_tokens=100)
THREADS = replace(LIMITS, prefillers=2)
KV = replace(LIMITS, max_kv_bytes=50)
A, B, C, D = (Entry(key, tokens=tokens) for key, tokens in enumerate((10, 20, 30, 40)))
GAP = replace(LIMITS, max_gap_ms=500)
# The last step ended at 10.0 and took 0.125 s, and the next piece takes 0.15 s at least.
PIECE = State(decoding=[A], prefilling=1, prefills=1, piece_s=0.15, stepped=10.0, step_s=0.125)
LATE = Entry(7, deadline=5.0, tokens=10)
HALF = Entry(8, tokens=50)  # of the tokens of one prefill

SITUATIONS: dict[str, tuple[State, BatcherLimits, Action]] = {
    "nothing to do": (State(), LIMITS, Wait(None)),
    "nothing left to do": (State(closing=True), LIMITS, Stop()),
    "closing, one is being prepared": (State(preparing=[A], closing=True), LIMITS, Wait(None)),
    "closing, one waits": (State(waiting=[A], closing=True), LIMITS, Prefill((0,))),
    "closing, one is prefilled by a thread": (
        State(prefilling=1, prefills=1, closing=True),
        THREADS,
        Wait(None),
    ),
    "closing, one is being decoded": (State(decoding=[A], closing=True), LIMITS, Decode()),
    "first come, first served": (State(waiting=[C, A, B]), LIMITS, Prefill((2, 0, 1))),
    "rows of one prefill": (State(waiting=[A, A, A, A]), LIMITS, Prefill((0, 0, 0))),
    "tokens of one prefill, padded": (State(waiting=[A, D, B]), LIMITS, Prefill((0, 3))),
    "the longest pads the others": (State(waiting=[D, A, A]), LIMITS, Prefill((3, 0))),
    "a long prompt alone": (State(waiting=[Entry(9, tokens=999), A]), LIMITS, Prefill((9,))),
    "a long prompt behind others": (
        State(waiting=[A, Entry(9, tokens=999), B]),
        LIMITS,
        Prefill((0,)),
    ),
    "as many padded tokens as are allowed": (
        State(waiting=[HALF, HALF, A]),
        LIMITS,
        Prefill((8, 8)),
    ),
    "as many as there are free rows": (
        State(waiting=[B, C, D], decoding=[A, A, A]),
        LIMITS,
        Prefill((1,)),
    ),
    "no free row": (State(waiting=[B], decoding=[A] * 4), LIMITS, Decode()),
    "more rows than the limit": (State(waiting=[B], decoding=[A] * 5), LIMITS, Decode()),
    "prefilling rows count": (
        State(waiting=[B, C], decoding=[A], prefilling=2, prefills=1),
        THREADS,
        Prefill((1,)),
    ),
    "one prefill per step": (State(waiting=[B], decoding=[A], joined=True), LIMITS, Decode()),
    "the next prefill after the step": (State(waiting=[B], decoding=[A]), LIMITS, Prefill((1,))),
    "the batch is empty again": (State(waiting=[B], joined=True), LIMITS, Prefill((1,))),
    "prefilled rows join": (State(decoding=[A], prefilling=1, prefilled=1), LIMITS, Join()),
    "prefilled rows join before the next prefill": (
        State(waiting=[A], prefilling=1, prefilled=1),
        LIMITS,
        Join(),
    ),
    "a step before more rows join": (
        State(decoding=[A], prefilling=1, prefilled=1, joined=True),
        THREADS,
        Decode(),
    ),
    "threads prefill on while others join": (
        State(waiting=[A], prefilling=1, prefilled=1, prefills=1),
        THREADS,
        Prefill((0,)),
    ),
    "all threads are prefilling": (
        State(waiting=[A], decoding=[B], prefilling=2, prefills=2),
        THREADS,
        Decode(),
    ),
    "the only thread is prefilling": (
        State(waiting=[A], decoding=[B], prefilling=1, prefills=1),
        replace(LIMITS, prefillers=1),
        Decode(),
    ),
    "more prefills than threads": (
        State(waiting=[A], decoding=[B], prefilling=3, prefills=3),
        replace(THREADS, max_rows=9),
        Decode(),
    ),
    "all threads are prefilling, nothing to decode": (
        State(waiting=[LATE], prefilling=2, prefills=2),
        THREADS,
        Wait(5.0),
    ),
    "keys and values fit": (State(waiting=[A, B], kv_bytes=[20, 50]), KV, Prefill((0, 1))),
    "keys and values leave room": (State(waiting=[A, B], kv_bytes=[20, 40]), KV, Prefill((0, 1))),
    "keys and values do not fit": (State(waiting=[A, B], kv_bytes=[20, 51]), KV, Prefill((0,))),
    "keys and values of the batch": (State(waiting=[A], decoding=[B], kv_bytes=[51]), KV, Decode()),
    "keys and values of one alone": (State(waiting=[A], kv_bytes=[51]), KV, Prefill((0,))),
    "keys and values beside those being prefilled": (
        State(waiting=[A], prefilling=1, prefills=1, kv_bytes=[51]),
        replace(KV, prefillers=2),
        Wait(None),
    ),
    "the next deadline": (
        State(preparing=[LATE, replace(LATE, deadline=4.0), A], now=3.0),
        LIMITS,
        Wait(4.0),
    ),
    "overdue as the clock begins": (
        State(preparing=[replace(LATE, deadline=0.0)]),
        LIMITS,
        Expire((), (7,)),
    ),
    "soon overdue": (State(preparing=[replace(LATE, deadline=0.5)]), LIMITS, Wait(0.5)),
    "overdue while being prepared": (State(preparing=[LATE], now=5.0), LIMITS, Expire((), (7,))),
    "overdue while waiting": (State(waiting=[A, LATE], now=9.0), LIMITS, Expire((), (7,))),
    "overdue while being decoded": (
        State(decoding=[LATE, A], joined=True, now=9.0),
        LIMITS,
        Expire((), (7,)),
    ),
    "overdue while being prefilled": (
        State(prefilling=1, prefilled=1, now=9.0),
        LIMITS,
        Join(),
    ),
    "cancelled anywhere": (
        State(preparing=[A], waiting=[B, D], decoding=[C], cancelled=frozenset([0, 1, 2, 8])),
        LIMITS,
        Expire((1, 0, 2), ()),
    ),
    "cancelled and overdue": (
        State(waiting=[LATE, A], cancelled=frozenset([7]), now=9.0),
        LIMITS,
        Expire((7,), ()),
    ),
    "a piece, nobody is being decoded": (
        replace(PIECE, decoding=(), now=10.0),
        GAP,
        Continue(math.inf),
    ),
    "a piece, as long as the rows can wait": (replace(PIECE, now=10.125), GAP, Continue(0.25)),
    "another piece, there is room for it": (
        replace(PIECE, now=10.125, piece_ran=True),
        GAP,
        Continue(0.25),
    ),
    "another piece, just room for it": (
        replace(PIECE, now=10.125, piece_s=0.25, piece_ran=True),
        GAP,
        Continue(0.25),
    ),
    "a step, for there is no room for another piece": (
        replace(PIECE, now=10.25, piece_ran=True),
        GAP,
        Decode(),
    ),
    "a piece where no step is short enough, so that the prefill ends": (
        replace(PIECE, now=10.25, step_s=9.0),
        GAP,
        Continue(0.0),
    ),
    "rows that joined take their step before a piece": (
        replace(PIECE, now=10.0, joined=True),
        GAP,
        Decode(),
    ),
    "cancelled before a piece": (
        replace(PIECE, now=10.0, cancelled=frozenset([0])),
        GAP,
        Expire((0,), ()),
    ),
    "nobody else is prefilled between the pieces": (
        replace(PIECE, now=10.0, waiting=[B], decoding=()),
        GAP,
        Continue(math.inf),
    ),
    "cancelled, but already ended": (State(cancelled=frozenset([3])), LIMITS, Wait(None)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_comes_next(situation: str) -> None:
    state, limits, action = SITUATIONS[situation]
    assert next_action(state, limits) == action


@pytest.mark.parametrize(
    ("queued", "closing", "reason"),
    [
        (0, False, None),
        (63, False, None),
        (64, False, "max_queue = 64"),
        (65, False, "max_queue = 64"),
        (0, True, "shutting"),
    ],
)
def test_who_may_wait(queued: int, closing: bool, reason: str | None) -> None:
    said = refusal(queued, closing, BatcherLimits())
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 0}, "max_rows must be 1 or more, got 0"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_kv_bytes": 0}, "max_kv_bytes"),
        ({"preparers": 0}, "preparers"),
        ({"prefillers": -1}, "prefillers must be 0 or more"),
        ({"max_gap_ms": 0}, "max_gap_ms must be a number above 0, got 0"),
        ({"max_gap_ms": math.inf}, "max_gap_ms"),
        ({"max_gap_ms": math.nan}, "max_gap_ms"),
        ({"max_gap_ms": "500"}, "max_gap_ms"),
    ],
)
def test_limits_that_are_too_small_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        BatcherLimits(**limits)


@dataclass
class Planned:
    """A request of a simulated run.

    Attributes:
        arrival: at which action it is submitted; `prepared`: how many actions later it is ready.
        tokens: of its prompt; `answer`: tokens of its answer.
        deadline, cancel: at which time it is overdue, at which action it is cancelled, if ever.
    """

    arrival: int
    prepared: int
    tokens: int
    answer: int
    deadline: float
    cancel: float


@dataclass
class Run:
    """A batcher without threads, clocks or a model: time is the number of actions so far."""

    plan: list[Planned]
    limits: BatcherLimits
    prefill_time: int
    piece_time: int = 1
    time: int = 0
    preparing: dict[int, Entry] = field(default_factory=dict)
    waiting: dict[int, Entry] = field(default_factory=dict)
    prefilling: list[tuple[float, list[Entry]]] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)
    pieces: int = 0
    piece_ran: bool = False
    stepped: int = 0
    decoding: dict[int, Entry] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    joined: bool = False
    steps: list[int] = field(default_factory=list)

    def simulate(self) -> None:
        for _ in range(100 * len(self.plan) + 1000):
            self.arrive()
            state = self.state()
            action = next_action(state, self.limits)
            if isinstance(action, Stop):
                return
            self.carry_out(action, state)
            self.time += 1
        raise AssertionError("requests starve")

    def arrive(self) -> None:
        for key, planned in enumerate(self.plan):
            if planned.arrival <= self.time and key not in self.arrived:
                self.arrived.add(key)
                if refusal(len(self.preparing) + len(self.waiting), False, self.limits):
                    self.ended[key] = "refused"
                else:
                    self.preparing[key] = Entry(key, planned.deadline)
            if planned.arrival + planned.prepared <= self.time and key in self.preparing:
                self.waiting[key] = replace(self.preparing.pop(key), tokens=planned.tokens)

    def state(self) -> State:
        everywhere = {*self.preparing, *self.waiting, *self.decoding, *self.in_prefill()}
        finished = [jobs for time, jobs in self.prefilling if time <= self.time]
        return State(
            preparing=list(self.preparing.values()),
            waiting=list(self.waiting.values()),
            prefilling=len(self.in_prefill()),
            prefills=len(self.prefilling) - len(finished),
            prefilled=len(finished),
            decoding=list(self.decoding.values()),
            piece_s=self.piece_time if self.pieces else None,
            piece_ran=self.piece_ran,
            stepped=self.stepped,
            step_s=1,
            joined=self.joined,
            cancelled=frozenset(k for k in everywhere if self.plan[k].cancel <= self.time),
            kv_bytes=[
                self.kv_bytes([*self.decoding, *self.in_prefill(), *list(self.waiting)[: n + 1]])
                for n in range(len(self.waiting))
            ],
            closing=all(planned.arrival < self.time for planned in self.plan),
            now=self.time,
        )

    def in_prefill(self) -> list[int]:
        return [entry.key for _, jobs in self.prefilling for entry in jobs]

    def kv_bytes(self, keys: list[int]) -> int:
        """As in a batch: as many rows as there are, as long as the longest."""
        longest = max((self.plan[key].tokens + self.plan[key].answer for key in keys), default=0)
        return len(keys) * longest

    def carry_out(self, action: Action, state: State) -> None:
        match action:
            case Expire(cancelled, overdue):
                for key in (*cancelled, *overdue):
                    assert key in state.cancelled or self.plan[key].deadline <= self.time
                    self.end(key, "cancelled" if key in cancelled else "deadline")
            case Prefill(keys):
                self.prefill(keys, state)
            case Continue(seconds):
                self.piece(seconds, state)
            case Join():
                self.join()
            case Decode():
                assert self.decoding
                self.joined = self.piece_ran = False
                self.stepped = self.time + 1
                self.steps.append(len(self.decoding))
                for key in list(self.decoding):
                    self.take(key)
            case Wait(until):
                nothing_runs = not (self.decoding or state.prefilled)
                assert nothing_runs and (until is None or until > self.time)
                due = [e.deadline for e in (*state.preparing, *state.waiting)]
                assert min([math.inf, *due]) == (math.inf if until is None else until)

    def prefill(self, keys: tuple[int, ...], state: State) -> None:
        jobs = [self.waiting.pop(key) for key in keys]
        for key in keys:
            assert key not in state.cancelled and self.plan[key].deadline > self.time
        assert len(jobs) == 1 or len(jobs) <= self.limits.prefill_rows
        padded = len(jobs) * max(entry.tokens for entry in jobs)
        assert len(jobs) == 1 or padded <= self.limits.prefill_tokens
        self.started += keys
        if self.limits.prefillers:
            self.prefilling.append((self.time + self.prefill_time, jobs))
        else:
            self.pieces = 1 + self.prefill_time
            self.prefilling.append((math.inf, jobs))
        under_way = sum(time > self.time for time, _ in self.prefilling)
        assert under_way <= max(1, self.limits.prefillers)
        rows = [*self.decoding, *self.in_prefill()]
        assert len(rows) <= self.limits.max_rows
        if self.limits.max_kv_bytes is not None and len(rows) > 1:
            assert self.kv_bytes(rows) <= self.limits.max_kv_bytes

    def piece(self, seconds: float, state: State) -> None:
        """Run a piece of the least length: of two, the second only where there is room for it."""
        assert self.pieces and not (self.joined and state.decoding)
        if state.decoding:
            waited = self.time - self.stepped + self.piece_time + state.step_s
            assert not self.piece_ran or waited <= self.limits.max_gap_ms / 1000
        self.piece_ran = True
        self.pieces -= 1
        self.time += self.piece_time - 1
        if not self.pieces:
            ((_, jobs),) = self.prefilling
            self.prefilling = [(self.time, jobs)]

    def join(self) -> None:
        assert not (self.joined and self.decoding), "those being decoded wait for a step"
        self.joined = True
        finished = [jobs for time, jobs in self.prefilling if time <= self.time]
        self.prefilling = [each for each in self.prefilling if each[0] > self.time]
        assert finished
        for entry in (entry for jobs in finished for entry in jobs):
            self.decoding[entry.key] = entry
            self.take(entry.key)

    def take(self, key: int) -> None:
        self.made[key] = self.made.get(key, 0) + 1
        if self.made[key] == self.plan[key].answer:
            self.end(key, "length")

    def end(self, key: int, how: str) -> None:
        assert key not in self.ended
        self.ended[key] = how
        for place in (self.preparing, self.waiting, self.decoding):
            place.pop(key, None)


times = st.one_of(st.just(math.inf), st.integers(0, 120).map(float))
requests = st.builds(
    Planned,
    arrival=st.integers(0, 60),
    prepared=st.integers(0, 12),
    tokens=st.integers(1, 60),
    answer=st.integers(1, 12),
    deadline=times,
    cancel=times,
)
limits = st.builds(
    BatcherLimits,
    max_rows=st.integers(1, 6),
    max_queue=st.integers(1, 8),
    prefill_rows=st.integers(1, 5),
    prefill_tokens=st.integers(1, 150),
    max_kv_bytes=st.none() | st.integers(72, 300),
    prefillers=st.integers(0, 3),
    max_gap_ms=st.integers(1, 12).map(lambda seconds: 1000.0 * seconds),
)


@given(st.lists(requests, max_size=25), limits, st.integers(0, 6), st.integers(1, 4))
def test_a_whole_run_keeps_the_limits_and_ends_every_request(
    plan: list[Planned], limits: BatcherLimits, prefill_time: int, piece_time: int
) -> None:
    """Limits, and that none that was cancelled or is overdue starts, are checked on the way."""
    run = Run(plan, limits, prefill_time, piece_time)
    run.simulate()
    assert run.ended.keys() == set(range(len(plan))), "one is forgotten"
    assert len(run.started) == len(set(run.started))
    for key, how in run.ended.items():
        made = run.made.get(key, 0)
        assert made == plan[key].answer if how == "length" else made < plan[key].answer
        assert how != "cancelled" or plan[key].cancel < math.inf
        assert how != "deadline" or plan[key].deadline < math.inf
    # Prepared in the order of submission, they start in that order.
    if all(planned.prepared == 0 for planned in plan):
        order = sorted(range(len(plan)), key=lambda key: plan[key].arrival)
        assert run.started == [key for key in order if key in set(run.started)]


@given(limits, st.integers(1, 40))
def test_a_row_being_decoded_is_not_stalled_by_new_requests(
    limits: BatcherLimits, count: int
) -> None:
    """Between two of its tokens, rows join once at most, however short the new answers are."""
    long = Planned(0, 0, 10, 40, math.inf, math.inf)
    short = Planned(1, 0, 10, 1, math.inf, math.inf)
    run = Run([long, *[short] * count], replace(limits, max_rows=4, max_queue=100), 0)
    joins = 0
    carry_out = run.carry_out

    def counted(action: Action, state: State) -> None:
        nonlocal joins
        if isinstance(action, Decode):
            joins = 0
        elif isinstance(action, Join):
            joins += 1
            assert joins <= 1 or not state.decoding
        carry_out(action, state)

    run.carry_out = counted  # type: ignore[method-assign]
    run.simulate()
    assert set(run.ended.values()) == {"length"}
