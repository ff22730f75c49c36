"""The thread that carries out what the scheduler decides, and the threads that prefill for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from trio_deploy.errors import NoChoice, TrioError
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    EventThread,
    failed,
)
from trio_deploy.pipeline.batcher.metrics import Recorder
from trio_deploy.pipeline.batcher.queue import Job, RequestQueue
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
)
from trio_deploy.pipeline.pieces import Pace, Piece
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.prefill import Clock, Prefilled
from trio_deploy.pipeline.sequence import SequenceState

_LOG = logging.getLogger(__name__)


class Worker:
    """Prefills, decodes and ends requests in a thread of its own, until nothing is left to do."""

    def __init__(
        self,
        pipeline: Pipeline,
        limits: BatcherLimits,
        queue: RequestQueue,
        events: EventThread,
        recorder: Recorder,
    ) -> None:
        """Start the thread."""
        self._pipeline = pipeline
        self._limits = limits
        self._queue = queue
        self._events = events
        self._recorder = recorder
        self._batch = pipeline.decode_batch(limits.max_rows)
        self._decoding: dict[SequenceState, Job] = {}
        self._prefilling: dict[int, Job] = {}
        self._joined = False
        self._piece: Piece | None = None  # what the worker's own prefill computes next
        self._piece_ran = False
        self._stepped = self._step_s = 0.0
        self._lock = threading.Lock()  # guards the next two, which threads that prefill change
        self._prefills = 0
        self._prefilled: deque[tuple[list[Job], Prefilled | Exception]] = deque()
        self._prefill_pool = ThreadPoolExecutor(
            max(1, limits.prefillers), thread_name_prefix="trio-prefill"
        )
        self._thread = threading.Thread(target=self._run, name="trio-batch", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended, at most `timeout` seconds; whether it has."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._prefill_pool.shutdown()
        return True

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not isinstance(self._act(), Stop):
            pass

    def _act(self) -> Action | None:
        """Do what comes next, unless that ends the caller's loop; None if it failed."""
        try:
            action = next_action(self._state(), self._limits)
            self._carry_out(action)
        except Exception as error:  # ends the rows in the batch, not the service
            _LOG.exception("the batch failed")
            self._fail_batch(error)
            return None
        return action

    def _state(self) -> State:
        queue = self._queue.snapshot()
        kv_bytes = self._kv_bytes(queue.waiting)
        with self._lock:
            prefills, prefilled = self._prefills, len(self._prefilled)
        return State(
            preparing=_entries(queue.preparing),
            waiting=_entries(queue.waiting),
            prefilling=len(self._prefilling),
            prefills=prefills,
            prefilled=prefilled,
            decoding=_entries(self._decoding.values()),
            piece_s=None if self._piece is None else self._pipeline.pace.least_seconds(self._piece),
            piece_ran=self._piece_ran,
            stepped=self._stepped,
            step_s=self._step_s,
            joined=self._joined,
            cancelled=queue.cancelled,
            kv_bytes=kv_bytes,
            closing=queue.closing,
            now=time.perf_counter(),
        )

    def _kv_bytes(self, waiting: list[Job]) -> list[int]:
        """Item n: as in `State`, as far as the scheduler can ask for it.

        A request for which it cannot be computed fails and is taken out of `waiting`.
        """
        limit, sizes = self._limits.max_kv_bytes, list[int]()
        if limit is None or len(self._decoding) + len(self._prefilling) >= self._limits.max_rows:
            return sizes
        rows = [job.row for job in self._prefilling.values() if job.row is not None]
        while len(sizes) < min(len(waiting), self._limits.prefill_rows):
            job = waiting[len(sizes)]
            if job.row is None:  # it has expired, and is ended before anything is prefilled
                break
            try:
                sizes.append(self._batch.required_bytes([*rows, job.row]))
            except Exception as error:  # so one bad request cannot fail those before and after it
                _LOG.exception("computing the KV cache of a request failed")
                self._queue.remove([job.entry.key])
                waiting.remove(job)
                self._fail(job, failed(error))
                continue
            rows.append(job.row)
            if sizes[-1] > limit:
                break
        return sizes

    def _carry_out(self, action: Action) -> None:
        match action:
            case Stop() | Continue():
                return
            case Wait(until):
                self._queue.wait(until)
                return
            case Prefill(keys):
                self._start_prefill(keys)
                return
            case Expire():
                self._expire(action)
            case Join():
                self._join_prefilled()
            case Decode():
                self._decode()
        self._update_gauges()

    def _expire(self, action: Expire) -> None:
        queued = self._queue.remove((*action.cancelled, *action.overdue))
        self._recorder.record_waits([job.queue_s for job in queued])
        for job in queued:
            if job.entry.key in action.cancelled:
                self._fail(job, _cancelled())
            else:
                self._fail(job, DeadlinePassed("the deadline passed before the first token"))
        cancelled, overdue = set(action.cancelled), set(action.overdue)
        ended: list[tuple[SequenceState, Event]] = []
        for row, job in self._decoding.items():
            if job.entry.key in cancelled:
                row.finish_reason = "cancelled"
                ended.append((row, Event(error=_cancelled())))
            elif job.entry.key in overdue:
                ended.append((row, _overdue(row)))
        if ended:
            self._batch.release()
        for row, event in ended:
            if event.error is not None:
                self._fail(self._decoding[row], event.error)
            else:
                self._finish(row, event)

    def _start_prefill(self, keys: tuple[int, ...]) -> None:
        # Before they leave the queue, so that no request is ever neither waiting nor running.
        self._recorder.update_prefilling(len(self._prefilling) + len(keys))
        jobs = self._queue.remove(keys)
        self._prefilling |= {job.entry.key: job for job in jobs}
        with self._lock:
            self._prefills += 1
        claim = threading.Lock()
        if self._limits.prefillers:
            try:
                self._prefill_pool.submit(self._run_prefill, jobs, claim)
                return
            except Exception:
                _LOG.exception("no thread for a prefill: the worker does it")
        self._run_prefill(jobs, claim, self._take_turn)
        self._piece = None

    def _take_turn(self, piece: Piece) -> float:
        """Do all that comes before the next piece of the worker's own prefill; its seconds."""
        self._piece = piece
        while not isinstance(action := self._act(), Continue):
            pass
        self._piece_ran = True
        return action.seconds

    def _run_prefill(
        self, jobs: list[Job], claim: threading.Lock, others: Others | None = None
    ) -> None:
        """Prefill, and leave the result or the error for `_join_prefilled`.

        Args:
            claim: locked by the first caller, for good: a pool that failed to start a thread may
                still run what it was given.
            others: takes the turn of others before each piece; None: nobody waits.
        """
        if not claim.acquire(blocking=False):
            return
        try:
            parts = self._prefill(jobs, others)
        except Exception as error:
            _LOG.exception("prefilling failed")
            parts = [(jobs, error)]
        with self._lock:
            self._prefills -= 1
            self._prefilled.extend(parts)
        self._queue.wake()

    def _prefill(
        self, jobs: list[Job], others: Others | None
    ) -> list[tuple[list[Job], Prefilled | Exception]]:
        """Prefill together; if that fails, each alone, so one bad request cannot fail its batch.

        Returns:
            Requests, and what their prefill gave or raised.
        """
        rows = _rows(jobs)
        clock = Clock()
        started = time.perf_counter()
        try:
            if others is None:
                prefilled = self._pipeline.prefill(rows, clock)
            else:
                turns = _Turns(self._pipeline.pace, others)
                prefilled = self._pipeline.prefill(rows, clock, turns.turn)
                turns.end()  # not reached by a piece that fails, whose time says nothing
        except Exception as error:
            if len(jobs) == 1:
                return [(jobs, error)]
            _LOG.warning("prefilling %d requests failed, each is tried alone", len(jobs))
            return [part for job in jobs for part in self._prefill([job], others)]
        for row in rows:
            prepared = row.timings["preprocess"]
            row.timings["queue"] = started - row.started - prepared
            row.timings |= clock.seconds
            row.timings["preprocess"] += prepared
        return [(jobs, prefilled)]

    def _join_prefilled(self) -> None:
        self._joined = True
        while self._prefilled:
            with self._lock:
                jobs, result = self._prefilled.popleft()
            for job in jobs:
                del self._prefilling[job.entry.key]
            if isinstance(result, Exception):
                for job in jobs:
                    self._fail(job, failed(result))
            else:
                self._join(jobs, result)

    def _join(self, jobs: list[Job], prefilled: Prefilled) -> None:
        rows = _rows(jobs)
        joined = time.perf_counter()
        for job in jobs:
            job.joined = joined
        self._decoding |= zip(rows, jobs, strict=True)  # an error from here on ends them
        pieces = [_take(row, logits) for row, logits in zip(rows, prefilled.logits, strict=True)]
        try:
            self._batch.join(rows, prefilled)
        except Exception as error:  # the caches may be half changed
            _LOG.exception("joining the batch failed")
            self._fail_batch(error)
            return
        self._recorder.record_prefill(rows)
        self._send(rows, pieces)

    def _decode(self) -> None:
        self._joined = self._piece_ran = False
        started = time.perf_counter()
        try:
            steps = self._batch.step()
        except Exception as error:  # which row is at fault cannot be told
            _LOG.exception("a decode step failed")
            self._fail_batch(error)
            return
        rows = [row for row, _ in steps]
        before = [row.last_token_s for row in rows]
        pieces = [_take(row, logits) for row, logits in steps]
        self._batch.release()
        self._recorder.record_step(
            [row.last_token_s - last for row, last in zip(rows, before, strict=True)]
        )
        self._send(rows, pieces)
        self._events.wait_one_step_behind()
        self._stepped = time.perf_counter()
        self._step_s = self._stepped - started

    def _send(self, rows: Sequence[SequenceState], pieces: Sequence[str | Exception]) -> None:
        """Send each row's token, and the end of the rows that have ended."""
        for row, piece in zip(rows, pieces, strict=True):
            job = self._decoding[row]
            if isinstance(piece, Exception):
                self._fail(job, piece if isinstance(piece, NoChoice) else failed(piece))
                continue
            last = row.token_logprobs[-1] if row.token_logprobs else None
            event = Event(row.token_ids[-1], piece, logprobs=last)
            if row.finish_reason:
                self._finish(row, event)
            else:
                self._events.send(job.handle, event)

    def _finish(self, row: SequenceState, event: Event) -> None:
        job = self._decoding[row]
        row.timings["decode"] = time.perf_counter() - job.joined
        event = replace(event, generation=row.to_generation())
        del self._decoding[row]
        self._queue.end(job, event)

    def _fail(self, job: Job, error: TrioError) -> None:
        """End a request with an error, wherever it is."""
        if job.row is not None:
            self._decoding.pop(job.row, None)
        self._queue.end(job, Event(error=error))

    def _fail_batch(self, error: Exception) -> None:
        for job in list(self._decoding.values()):
            self._fail(job, failed(error))
        self._batch.reset()
        self._update_gauges()

    def _update_gauges(self) -> None:
        self._recorder.update_gauges(
            len(self._prefilling),
            len(self._decoding),
            self._batch.kv_bytes,
            self._batch.kv_bytes_allocated,
        )


Others = Callable[[Piece], float]
"""Takes the turn of others before a piece; returns the seconds that the piece may take."""


class _Turns:
    """What others do between the pieces of one prefill, and how long its pieces take."""

    def __init__(self, pace: Pace, others: Others) -> None:
        self._pace = pace
        self._others = others
        self._ran: tuple[Piece, int | None, float] | None = None

    def turn(self, piece: Piece) -> int | None:
        """As `pieces.Turn`."""
        self.end()
        queries = self._pace.queries(piece, self._others(piece))
        self._ran = piece, queries, time.perf_counter()
        return queries

    def end(self) -> None:
        """Note how long the last piece took."""
        if self._ran is not None:
            piece, queries, started = self._ran
            self._pace.record(piece, queries, time.perf_counter() - started)
        self._ran = None


def _entries(jobs: Iterable[Job]) -> tuple[Entry, ...]:
    return tuple(job.entry for job in jobs)


def _rows(jobs: Sequence[Job]) -> list[SequenceState]:
    return [job.row for job in jobs if job.row is not None]


def _take(row: SequenceState, logits: np.ndarray) -> str | Exception:
    """Give a row its next token; the text that it completes, or the error that ends the row."""
    try:
        return row.advance(logits)
    except Exception as error:
        row.finish_reason = "failed"
        return error


def _overdue(row: SequenceState) -> Event:
    """End an answer at its deadline; an error in its last text is its own, not the batch's."""
    try:
        return Event(text=row.finish("deadline"))
    except Exception as error:
        return Event(error=failed(error))


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled")
