"""What a continuous batcher does next: a pure function of its requests and its limits.

No threads, clocks or models: `worker.py` describes the situation in a `State`, asks `next_action`,
and carries the decision out. Every rule of the batcher is in this file:

- A request that was cancelled or whose deadline has passed ends before anything else happens, and
  never starts.
- Requests are prefilled first come, first served, a bounded number of them together.
- Rows being decoded and rows being prefilled together never exceed the limits.
- After prefilled rows have joined, the batch takes a decode step before more are prefilled or join,
  so that new requests cannot stall those being answered.
- A prefill of the worker's own is run in pieces. The batch takes a decode step between two of them
  where its rows would wait longer than `max_gap_ms` for their next tokens otherwise. At least one
  piece runs between two steps, so that a prefill comes to its end whatever the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from trio_deploy.errors import TrioError


@dataclass(frozen=True)
class BatcherLimits:
    """Limits of a batcher.

    Attributes:
        max_rows: rows decoded at once; the runtime's engines may be built for fewer.
        max_queue: requests that may wait; more are refused.
        prefill_rows, prefill_tokens: requests, and tokens with padding, that are prefilled together
            before the next decode step. A single longer prompt is still prefilled, alone.
        max_prompt_tokens: tokens per prompt, visual ones included; None: the model's context.
        max_kv_bytes: bytes of the batch's KV caches; requests wait until they fit. While caches
            grow and rows join, the prefill's caches and the outgrown ones exist besides.
        prefillers: threads that prefill while the worker decodes; 0: the worker prefills too,
            between steps. If a CPU's cores are shared out to them (and the pipeline is opened with
            `threads=1`), short answers come faster than from one prefill on all cores.
        max_gap_ms: milliseconds that rows being decoded wait at most for their next tokens while
            the worker prefills others, between steps. It is aimed at: a piece that takes longer by
            itself takes as long, and how long pieces take is learnt from those before. A low one
            delays the first tokens of those that join. Where stages return before they are done
            (TensorRT), a prefill runs as a whole, unless a decode step alone takes longer.
        preparers: threads that open pictures and tokenise prompts.

    Raises:
        TrioError: a limit is too small.
    """

    max_rows: int = 16
    max_queue: int = 64
    prefill_rows: int = 4
    prefill_tokens: int = 4096
    max_prompt_tokens: int | None = None
    max_kv_bytes: int | None = None
    prefillers: int = 0
    max_gap_ms: float = 600.0
    preparers: int = 2

    def __post_init__(self) -> None:
        if type(self.max_gap_ms) not in (int, float) or not 0 < self.max_gap_ms < math.inf:
            raise TrioError(f"max_gap_ms must be a number above 0, got {self.max_gap_ms!r:.40}")
        for field in fields(self):
            if field.name == "max_gap_ms":
                continue
            minimum = 0 if field.name == "prefillers" else 1
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or value < minimum):
                raise TrioError(f"{field.name} must be {minimum} or more, got {value!r:.40}")


@dataclass(frozen=True)
class Entry:
    """What the scheduler knows of a request.

    Attributes:
        key: its number, unique within the batcher.
        deadline: seconds, on the clock of `State.now`; infinite for none.
        tokens: length of its prompt, 0 until that is known.
    """

    key: int
    deadline: float = math.inf
    tokens: int = 0


@dataclass(frozen=True)
class State:
    """A batcher's situation.

    Attributes:
        preparing: requests whose pictures are opened and whose prompts are tokenised.
        waiting: requests ready for their prefill, in the order in which they became so.
        prefilling: requests whose prefill has begun and that have not joined the batch.
        prefills: prefills under way; `prefilled`: finished ones whose rows have not joined.
        decoding: requests whose rows are in the batch.
        piece_s: seconds that the shortest next piece of the worker's own prefill takes, by
            estimate; None: it has none under way.
        piece_ran: whether a piece has run since the last decode step.
        stepped: when the last decode step ended; `step_s`: seconds that it took.
        joined: whether rows have joined since the last decode step.
        cancelled: keys of requests to cancel, wherever they are.
        kv_bytes: item n: bytes of all KV buffers once those being prefilled and the first n + 1
            waiting requests have joined. Read under `max_kv_bytes` alone, and only up to the first
            item that exceeds it.
        closing: whether no more requests will come.
        now: seconds, on any clock.
    """

    preparing: Sequence[Entry] = ()
    waiting: Sequence[Entry] = ()
    prefilling: int = 0
    prefills: int = 0
    prefilled: int = 0
    decoding: Sequence[Entry] = ()
    piece_s: float | None = None
    piece_ran: bool = False
    stepped: float = 0.0
    step_s: float = 0.0
    joined: bool = False
    cancelled: frozenset[int] = frozenset()
    kv_bytes: Sequence[int] = ()
    closing: bool = False
    now: float = 0.0


@dataclass(frozen=True)
class Expire:
    """End requests that were cancelled, and those whose deadline has passed, by key."""

    cancelled: tuple[int, ...]
    overdue: tuple[int, ...]


@dataclass(frozen=True)
class Prefill:
    """Prefill waiting requests together, by key."""

    keys: tuple[int, ...]


@dataclass(frozen=True)
class Continue:
    """Run the next piece of the worker's own prefill, for about so many seconds at most."""

    seconds: float


@dataclass(frozen=True)
class Join:
    """Let the rows of finished prefills join the batch."""


@dataclass(frozen=True)
class Decode:
    """Take a decode step."""


@dataclass(frozen=True)
class Wait:
    """Wait for a change, at most until a time on the clock of `State.now`; None: without an end."""

    until: float | None


@dataclass(frozen=True)
class Stop:
    """End: nothing is left to do, and no more requests will come."""


Action = Expire | Prefill | Continue | Join | Decode | Wait | Stop


def next_action(state: State, limits: BatcherLimits) -> Action:
    """Decide what the batcher does next."""
    if expired := _expired(state):
        return expired
    if state.decoding and state.joined:
        return Decode()
    if state.piece_s is not None:
        return _piece(state, state.piece_s, limits)
    # Without threads of their own, prefills wait until the rows of the last one have joined.
    if (limits.prefillers or not state.prefilled) and (keys := _choose(state, limits)):
        return Prefill(keys)
    if state.prefilled:
        return Join()
    if state.decoding:
        return Decode()
    if state.closing and not (state.preparing or state.waiting or state.prefilling):
        return Stop()
    deadlines = (entry.deadline for entry in (*state.preparing, *state.waiting))
    until = min(deadlines, default=math.inf)
    return Wait(until if until < math.inf else None)


def refusal(queued: int, closing: bool, limits: BatcherLimits) -> str | None:
    """Why a new request is refused; None if it may wait."""
    if closing:
        return "the server is shutting down: ask another one"
    if queued >= limits.max_queue:
        return (
            f"the queue is full: max_queue = {limits.max_queue} requests are waiting; try again "
            "later"
        )
    return None


def _expired(state: State) -> Expire | None:
    entries = (*state.waiting, *state.preparing, *state.decoding)
    cancelled = tuple(entry.key for entry in entries if entry.key in state.cancelled)
    overdue = tuple(
        entry.key
        for entry in entries
        if entry.deadline <= state.now and entry.key not in state.cancelled
    )
    return Expire(cancelled, overdue) if cancelled or overdue else None


def _piece(state: State, least: float, limits: BatcherLimits) -> Continue | Decode:
    """Run a piece of the prefill where rows can wait for it, or where none has run yet."""
    if not state.decoding:
        return Continue(math.inf)
    room = limits.max_gap_ms / 1000 - state.step_s - (state.now - state.stepped)
    if state.piece_ran and least > room:
        return Decode()
    return Continue(max(room, 0.0))


def _choose(state: State, limits: BatcherLimits) -> tuple[int, ...]:
    """Choose the requests of the next prefill: as many of the first ones as the limits allow."""
    if state.prefills >= max(1, limits.prefillers):
        return ()
    return tuple(_chosen(state, limits))


def _chosen(state: State, limits: BatcherLimits) -> Iterator[int]:
    rows = len(state.decoding) + state.prefilling
    longest = 0
    for count, entry in enumerate(state.waiting):
        longest = max(longest, entry.tokens)
        if rows + count >= limits.max_rows:
            return
        if count and (
            count >= limits.prefill_rows or (count + 1) * longest > limits.prefill_tokens
        ):
            return
        # Alone in the batch every request fits: larger ones were refused when they were prepared.
        if (
            limits.max_kv_bytes is not None
            and rows + count
            and state.kv_bytes[count] > limits.max_kv_bytes
        ):
            return
        yield entry.key
