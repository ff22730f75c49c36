"""Continuous batching: requests join the batch that is being decoded, and leave when they end."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.prefill import Clock, Prefilled
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sequence import Row

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.05  # between looks at the deadlines of those that wait, while nothing else happens


class Refused(TrioError):
    """The queue is full, the batcher is shutting down, or there is no thread to be had."""


class Cancelled(TrioError):
    """The request was cancelled."""


class DeadlinePassed(TrioError):
    """The deadline passed before there was a first token."""


class Failed(TrioError):
    """Answering failed for no fault of the request."""


class _GivenUp(Exception):
    """Nobody waits for a request that is being prepared."""


@dataclass(frozen=True)
class Event:
    """A step of an answer; exactly one event has `generation` or `error`, and it is the last.

    Attributes:
        token_id: the token generated; None where the event adds none (an error, a deadline).
        text: the text that it completes.
        generation: the whole answer. Its `finish_reason` may also be `deadline`, its `timings`
            have `queue` (from `submit` to the prefill, preprocessing left out) and its own time in
            `decode`; stages of the prefill are of all rows that were prefilled together. It has
            no `images`.
        error: a `TrioError` where the request was at fault, else one of its kinds here.
    """

    token_id: int | None = None
    text: str = ""
    generation: Generation | None = None
    error: TrioError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.generation is not None or self.error is not None


OnEvent = Callable[[Event], None]


class Handle:
    """A request that was submitted."""

    def __init__(
        self, batcher: Batcher, request: Request, on_event: OnEvent | None, until: float
    ) -> None:
        """Use `Batcher.submit`."""
        self._batcher = batcher
        self._request: Request | None = request
        self._on_event = on_event
        self._until = until
        self._submitted = time.perf_counter()
        self._cancelled = False
        self._deaf = False
        self._row: Row | None = None
        self._joined = 0.0
        self._last: Event | None = None
        self._done = threading.Event()

    def cancel(self) -> None:
        """End the answer before its next token, with `Cancelled`; nothing if it has ended."""
        self._cancelled = True
        self._batcher._wake()

    @property
    def done(self) -> bool:
        """Whether the last event has been delivered."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the answer.

        Raises:
            TrioError: as in `Event.error`.
            TimeoutError: it took longer than `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        assert self._last is not None
        if self._last.error is not None:
            raise self._last.error
        assert self._last.generation is not None
        return self._last.generation


@dataclass(frozen=True)
class Metrics:
    """What a batcher is doing, and has done since it was made.

    Attributes:
        queued: requests that wait for their prefill, those being preprocessed included.
        active: rows being decoded.
        kv_bytes, kv_bytes_allocated: keys and values of their tokens, and of all buffers.
        outcomes: requests by how they ended: stop, length, deadline, cancelled, refused, invalid
            or failed.
        tokens: generated, of answers that ended in whatever way.
        first_tokens: requests that got one, and `first_token_s`, the sum of their times to it
            from `submit` on.
        waits: requests whose time in the queue has come to its end, by their prefill, a deadline
            or being cancelled; `queue_s`, the sum of those times. What is refused does not wait.
        visual_tokens, kept_tokens: of prefilled prompts, before pruning and after the last point.
        steps: of decoding; the rows they had sum up to `step_rows`.
        prefills: turns, which took in `first_tokens` rows altogether.
    """

    queued: int = 0
    active: int = 0
    kv_bytes: int = 0
    kv_bytes_allocated: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    first_tokens: int = 0
    first_token_s: float = 0.0
    waits: int = 0
    queue_s: float = 0.0
    visual_tokens: int = 0
    kept_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    prefills: int = 0


class Batcher:
    """Answers requests as they come, many at once, on one pipeline.

    A worker thread decodes all rows together. Before each step, waiting requests are prefilled, a
    bounded batch of them, and join; rows that have ended leave at once. Where the runtime may be
    called from several threads, prefills can have threads of their own, beside the decoding. Each
    row gives the answer that `Pipeline.generate` gives (within the arithmetic's rounding),
    whoever is beside it. Pictures are opened and prompts tokenised by other threads, and events
    are delivered by another, so that none of it holds up the model.

    >>> with Batcher(pipeline) as batcher:
    ...     handle = batcher.submit(Request("What is this?", ["cat.png"]), on_event=print)
    ...     handle.result().text
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        max_rows: int = 16,
        max_queue: int = 64,
        prefill_rows: int = 4,
        prefill_tokens: int = 4096,
        max_prompt_tokens: int | None = None,
        max_kv_bytes: int | None = None,
        prefillers: int = 0,
        preparers: int = 2,
    ) -> None:
        """Start the threads.

        Args:
            max_rows: rows decoded at once; no more than the runtime's engines were built for.
            max_queue: requests that may wait; more are refused.
            prefill_rows, prefill_tokens: requests, and tokens with padding, that are prefilled
                before the rows in decoding take their next step. A single longer prompt still is.
            max_prompt_tokens: of a request, visual ones included; None: the model's context.
            max_kv_bytes: of the batch's KV caches; requests wait until they fit. While the caches
                grow and rows join, those of the prefill and those outgrown exist besides.
            prefillers: threads that prefill while the worker decodes; 0: the worker prefills too,
                between steps. With a CPU's cores shared out to them (and the pipeline loaded with
                `threads=1`), short answers are given faster than by one prefill on all cores.
            preparers: threads that open pictures and tokenise prompts.

        Raises:
            TrioError: a limit below 1, or prefillers where the runtime takes one call at a time.
        """
        limits = {
            "max_rows": max_rows,
            "max_queue": max_queue,
            "prefill_rows": prefill_rows,
            "prefill_tokens": prefill_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "max_kv_bytes": max_kv_bytes,
            "preparers": preparers,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise TrioError(f"{name} must be 1 or more, got {value}")
        if prefillers and not pipeline.concurrent:
            raise TrioError(
                "this runtime takes one call at a time, so prefills cannot have threads of their "
                "own: set prefillers to 0"
            )
        self._pipeline = pipeline
        self._max_rows = min(max_rows, pipeline.max_rows or max_rows)
        self._max_queue = max_queue
        self._prefill_rows = min(prefill_rows, self._max_rows)
        self._prefill_tokens = prefill_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._max_kv_bytes = max_kv_bytes
        self._running = pipeline.running(self._max_rows)
        self._active: dict[Row, Handle] = {}
        self._away: set[Handle] = set()
        # Guards what follows; everything above belongs to the worker.
        self._changed = threading.Condition()
        self._news = False
        self._arrived: deque[tuple[list[Handle], Prefilled | Exception]] = deque()
        self._busy = 0
        self._open: set[Handle] = set()
        self._preparing: set[Handle] = set()
        self._ready: deque[Handle] = deque()
        self._metrics = Metrics()
        self._closing = False
        self._events: queue.SimpleQueue[tuple[Handle, Event] | threading.Event | None]
        self._events = queue.SimpleQueue()
        self._delivered = threading.Event()
        self._delivered.set()
        self._pool = ThreadPoolExecutor(preparers, thread_name_prefix="trio-prepare")
        self._prefillers = prefillers
        self._turns = ThreadPoolExecutor(max(1, prefillers), thread_name_prefix="trio-prefill")
        self._worker = threading.Thread(target=self._work, name="trio-batch", daemon=True)
        self._deliverer = threading.Thread(target=self._deliver, name="trio-events", daemon=True)
        self._worker.start()
        self._deliverer.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    def submit(
        self,
        request: Request,
        on_event: OnEvent | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Handle:
        """Ask a question.

        Args:
            on_event: called with each event, from one thread for all requests, so it must be
                quick. If it raises, its request is cancelled, and it hears the last event only.
            timeout_s: seconds from now until the answer ends with what there is (finish reason
                `deadline`), or with `DeadlinePassed` if that is nothing.

        Raises:
            Refused: the queue is full, the batcher is closed, or no thread can be started.
        """
        until = float("inf") if timeout_s is None else time.perf_counter() + timeout_s
        handle = Handle(self, request, on_event, until)
        with self._changed:
            if self._closing or self._queued >= self._max_queue:
                self._count("refused")
                raise Refused(
                    "the server is shutting down: ask another one"
                    if self._closing
                    else f"the queue is full: max_queue = {self._max_queue} requests are waiting; "
                    "try again later"
                )
            self._open.add(handle)
            self._preparing.add(handle)
            try:
                self._pool.submit(self._prepare, handle)
            except Exception as error:
                handle._cancelled = True  # another thread may come to it yet
                self._open.discard(handle)
                self._preparing.discard(handle)
                self._count("refused")
                raise Refused(f"the request cannot be prepared: {error!r:.200}") from error
            self._changed.notify_all()  # of a deadline to look after
        return handle

    def metrics(self) -> Metrics:
        """A snapshot."""
        with self._changed:
            outcomes = dict(self._metrics.outcomes)
            return replace(self._metrics, queued=self._queued, outcomes=outcomes)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and stop the threads; not to be called from `on_event`.

        Args:
            drain: finish what was submitted; otherwise it is cancelled.
            timeout: seconds to drain; what is left then is cancelled.

        Returns:
            Whether every request could finish.
        """
        with self._changed:
            self._closing = True
            if not drain:
                self._cancel_all()
            self._tell_worker()
        self._worker.join(timeout)
        whole = drain and not self._worker.is_alive()
        if self._worker.is_alive():
            with self._changed:
                self._cancel_all()
                self._tell_worker()
            self._worker.join()
        self._pool.shutdown()
        self._turns.shutdown()
        self._events.put(None)
        self._deliverer.join()
        return whole

    # --- threads that prepare -------------------------------------------------------------------

    def _prepare(self, handle: Handle) -> None:
        error: TrioError | None = None
        row: Row | None = None
        request = handle._request
        if request is not None and not self._overdue(handle):
            try:
                row = self._pipeline.prepare(request, lambda: self._go_on(handle))
                # Only drawing needs pictures, and those of all that wait could fill the memory.
                row.images, row.request = [], replace(request, images=())
                request = handle._request = None
                row.timings["preprocess"] = time.perf_counter() - row.start
                row.start = handle._submitted
                self._check(row)
            except _GivenUp:
                request = handle._request = None  # the worker finds it among those that wait
            except TrioError as caught:
                error = caught
            except Exception as caught:
                _LOG.exception("preparing a request failed")
                error = Failed(f"preparing the request failed: {caught!r:.200}")
        with self._changed:
            if handle not in self._preparing:
                return  # it was let go of while it waited
            self._preparing.remove(handle)
            if error is None:
                handle._row = row
                self._ready.append(handle)
            self._tell_worker()
        if error is not None:
            self._fail(handle, error)

    def _go_on(self, handle: Handle) -> None:
        """Pictures of one request may take many seconds to decode."""
        if self._overdue(handle):
            raise _GivenUp

    def _check(self, row: Row) -> None:
        length = row.prompt.length
        if self._max_prompt_tokens is not None and length > self._max_prompt_tokens:
            raise TrioError(
                f"the prompt has {length} tokens ({row.prompt.visual_tokens} of them visual), but "
                f"max_prompt_tokens is {self._max_prompt_tokens}"
            )
        needed = self._pipeline.running().needed([row])
        if self._max_kv_bytes is not None and needed > self._max_kv_bytes:
            raise TrioError(
                f"the request needs {needed} bytes of KV cache, but max_kv_bytes is "
                f"{self._max_kv_bytes}: ask for fewer tokens or a smaller budget"
            )

    # --- the worker -----------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            try:
                self._sweep()
                self._admit()
                if self._active:
                    self._step()
                self._note()
            except Exception as error:  # a fault of ours ends what runs, not the service
                _LOG.exception("the batch failed")
                self._fail_all(error)
                self._wake()  # there may be more to do

    def _wait(self) -> bool:
        """Until there is something to do; False once there will not be."""
        with self._changed:
            while not (self._news or self._active):
                if self._closing and not (self._preparing or self._ready or self._away):
                    return False
                if not self._changed.wait(_LOOK_S if self._queued else None):
                    break  # a deadline may have passed
            self._news = False
            return True

    def _sweep(self) -> None:
        """Let those go that were cancelled or whose time is up."""
        with self._changed:
            gone = [h for h in (*self._ready, *self._preparing) if self._overdue(h)]
            self._ready = deque(handle for handle in self._ready if handle not in gone)
            self._preparing.difference_update(gone)
            self._count_waits([self._waited(handle) for handle in gone])
        for handle in gone:
            if handle._cancelled:
                self._fail(handle, _cancelled())
            else:
                self._fail(handle, DeadlinePassed("the deadline passed before the first token"))
        ended = [row for row, handle in self._active.items() if self._overdue(handle)]
        if not ended:
            return
        texts = [self._end(row) for row in ended]
        self._running.release()
        for row, text in zip(ended, texts, strict=True):
            if isinstance(text, TrioError):
                self._fail(self._active[row], text)
            else:
                self._finish(row, Event(None, text))

    def _end(self, row: Row) -> str | TrioError:
        if self._active[row]._cancelled:
            row.finish = "cancelled"
            return _cancelled()
        try:
            return row.end("deadline")
        except Exception as error:  # of the request's own `stream`
            return _failed(error)

    def _admit(self) -> None:
        """Have waiting requests prefilled, and let those that were join the rows in decoding."""
        while self._busy < max(1, self._prefillers) and (handles := self._choose()):
            with self._changed:
                self._busy += 1
            self._away.update(handles)
            begun = threading.Lock()
            if not self._prefillers:
                self._prefill_away(handles, begun)
                break
            try:
                self._turns.submit(self._prefill_away, handles, begun)
            except Exception:
                _LOG.exception("no thread for a prefill: the worker does it")
                self._prefill_away(handles, begun)
        while self._arrived:
            with self._changed:
                handles, outcome = self._arrived.popleft()
            self._away.difference_update(handles)
            self._join(handles, outcome)

    def _prefill_away(self, handles: list[Handle], begun: threading.Lock) -> None:
        """Prefill, and leave what that gave or raised for `_admit` to find.

        Args:
            begun: held from the beginning on, since a pool that had no thread may get to it later.
        """
        if not begun.acquire(blocking=False):
            return
        try:
            parts = self._prefill(handles)
        except Exception as error:
            _LOG.exception("prefilling failed")
            parts = [(handles, error)]
        with self._changed:
            self._busy -= 1
            self._arrived.extend(parts)
            self._tell_worker()

    def _choose(self) -> list[Handle]:
        """Waiting requests, first come first served, within a turn's limits."""
        chosen: list[Handle] = []
        away = [handle._row for handle in self._away if handle._row is not None]
        rows: list[Row] = []
        longest = 0
        with self._changed:
            while self._ready and (row := self._ready[0]._row) is not None:
                padded = (len(rows) + 1) * max(longest, row.prompt.length)
                if len(self._active) + len(away) + len(rows) >= self._max_rows:
                    break
                if rows and (len(rows) >= self._prefill_rows or padded > self._prefill_tokens):
                    break
                try:
                    if not self._fits([*away, *rows, row]):
                        break
                except Exception as error:  # those chosen before it must not be forgotten
                    _LOG.exception("choosing a request failed")
                    self._fail(self._ready.popleft(), _failed(error))
                    continue
                longest = max(longest, row.prompt.length)
                rows.append(row)
                chosen.append(self._ready.popleft())
            if chosen:
                self._news = True  # there may be more for the next turn
        return chosen

    def _fits(self, rows: list[Row]) -> bool:
        """Whether keys and values of these rows may come to those of the active ones."""
        if self._max_kv_bytes is None or not (self._active or len(rows) > 1):
            return True
        return self._running.needed(rows) <= self._max_kv_bytes

    def _prefill(self, handles: list[Handle]) -> list[tuple[list[Handle], Prefilled | Exception]]:
        """Prefill together, or, if that fails, each alone: no request shall feel another's fault.

        Returns:
            Requests, and what their prefill gave or raised.
        """
        rows = [handle._row for handle in handles if handle._row is not None]
        clock = Clock()
        started = time.perf_counter()
        try:
            prefilled = self._pipeline.prefill(rows, clock)
        except Exception as error:
            if len(handles) == 1:
                return [(handles, error)]
            _LOG.warning("prefilling %d requests failed, each is tried alone", len(handles))
            return [part for handle in handles for part in self._prefill([handle])]
        for row in rows:
            prepared = row.timings["preprocess"]
            row.timings["queue"] = started - row.start - prepared
            row.timings |= clock.seconds
            row.timings["preprocess"] += prepared
        return [(handles, prefilled)]

    def _join(self, handles: list[Handle], outcome: Prefilled | Exception) -> None:
        if isinstance(outcome, Exception):
            for handle in handles:
                self._fail(handle, _failed(outcome))
            return
        rows = [handle._row for handle in handles if handle._row is not None]
        joined = time.perf_counter()
        for handle in handles:
            handle._joined = joined
        self._active |= zip(rows, handles, strict=True)  # whatever happens now, they are known
        pieces = [self._take(row, logits) for row, logits in zip(rows, outcome.logits, strict=True)]
        try:
            self._running.join(rows, outcome)
        except Exception as error:  # the caches may be half changed
            _LOG.exception("joining the batch failed")
            self._fail_all(error)
            return
        with self._changed:
            metrics = self._metrics
            self._metrics = replace(
                metrics,
                prefills=metrics.prefills + 1,
                first_tokens=metrics.first_tokens + len(rows),
                first_token_s=metrics.first_token_s + sum(row.first_s for row in rows),
                visual_tokens=metrics.visual_tokens + sum(r.prompt.visual_tokens for r in rows),
                kept_tokens=metrics.kept_tokens + sum(_kept(row) for row in rows),
            )
            self._count_waits([row.timings["queue"] for row in rows])
        self._tell(rows, pieces)

    def _step(self) -> None:
        try:
            nexts = self._running.step()
        except Exception as error:  # no row can be told to be at fault
            _LOG.exception("a decode step failed")
            self._fail_all(error)
            return
        rows = [row for row, _ in nexts]
        pieces = [self._take(row, logits) for row, logits in nexts]
        self._running.release()
        with self._changed:
            steps, step_rows = self._metrics.steps + 1, self._metrics.step_rows + len(rows)
            self._metrics = replace(self._metrics, steps=steps, step_rows=step_rows)
        self._tell(rows, pieces)
        # The next step may run while this one's events are delivered, and no further ahead: what
        # a listener cancels ends with the next token.
        delivered = threading.Event()
        self._events.put(delivered)
        self._delivered.wait()
        self._delivered = delivered

    def _take(self, row: Row, logits: np.ndarray) -> str | Exception:
        try:
            return row.take(logits)
        except Exception as error:
            row.finish = "failed"
            return error

    def _tell(self, rows: list[Row], pieces: list[str | Exception]) -> None:
        """Send each row's token, and the end of those that ended."""
        for row, piece in zip(rows, pieces, strict=True):
            handle = self._active[row]
            if isinstance(piece, Exception):
                self._fail(handle, _failed(piece))
            elif row.finish:
                self._finish(row, Event(row.ids[-1], piece))
            else:
                self._send(handle, Event(row.ids[-1], piece))

    def _finish(self, row: Row, event: Event) -> None:
        handle = self._active[row]
        row.timings["decode"] = time.perf_counter() - handle._joined
        event = replace(event, generation=row.report())
        del self._active[row]
        with self._changed:
            self._news = True  # there is a place for another
            self._count(row.finish)
            self._metrics = replace(self._metrics, tokens=self._metrics.tokens + len(row.ids))
        self._send(handle, event)

    def _fail(self, handle: Handle, error: TrioError) -> None:
        """End a request with an error, wherever it is."""
        made = 0
        if handle._row is not None:
            self._active.pop(handle._row, None)
            made = len(handle._row.ids)
        with self._changed:
            self._count(_outcome(error))
            self._metrics = replace(self._metrics, tokens=self._metrics.tokens + made)
            self._news = True
        self._send(handle, Event(error=error))

    def _fail_all(self, error: Exception) -> None:
        for handle in list(self._active.values()):
            self._fail(handle, _failed(error))
        self._running.reset()

    def _note(self) -> None:
        with self._changed:
            self._metrics = replace(
                self._metrics,
                active=len(self._active),
                kv_bytes=self._running.kv_bytes,
                kv_bytes_allocated=self._running.kv_bytes_allocated,
            )

    # --- shared ---------------------------------------------------------------------------------

    def _deliver(self) -> None:
        while (item := self._events.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            handle, event = item
            try:
                if handle._on_event is not None and (event.last or not handle._deaf):
                    handle._on_event(event)
            except Exception:
                _LOG.exception("the listener of a request failed; the request is cancelled")
                handle._deaf = True
                handle.cancel()
            if event.last:
                # A listener often holds its handle: let go of it, and of the pictures, at once.
                handle._on_event, handle._request, handle._row = None, None, None
                with self._changed:
                    self._open.discard(handle)
                handle._last = event
                handle._done.set()

    def _send(self, handle: Handle, event: Event) -> None:
        self._events.put((handle, event))

    def _wake(self) -> None:
        with self._changed:
            self._tell_worker()

    def _tell_worker(self) -> None:
        self._news = True
        self._changed.notify_all()

    def _cancel_all(self) -> None:
        for handle in self._open:
            handle._cancelled = True

    @staticmethod
    def _overdue(handle: Handle) -> bool:
        return handle._cancelled or time.perf_counter() >= handle._until

    @property
    def _queued(self) -> int:
        return len(self._preparing) + len(self._ready)

    @staticmethod
    def _waited(handle: Handle) -> float:
        """Seconds that a request waited which gets no prefill."""
        prepared = 0.0 if handle._row is None else handle._row.timings["preprocess"]
        return time.perf_counter() - handle._submitted - prepared

    def _count_waits(self, seconds: list[float]) -> None:
        metrics = self._metrics
        waits, queue_s = metrics.waits + len(seconds), metrics.queue_s + sum(seconds)
        self._metrics = replace(metrics, waits=waits, queue_s=queue_s)

    def _count(self, outcome: str) -> None:
        outcomes = self._metrics.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled")


def _failed(error: Exception) -> Failed:
    return Failed(str(error) if isinstance(error, TrioError) else f"{error!r:.300}")


def _outcome(error: TrioError) -> str:
    kinds: dict[type[TrioError], str] = {
        Cancelled: "cancelled",
        DeadlinePassed: "deadline",
        Failed: "failed",
    }
    return kinds.get(type(error), "invalid")


def _kept(row: Row) -> int:
    """Visual tokens after the last pruning point."""
    kept = row.kept[-1] if row.kept else np.arange(row.prompt.length)
    return int(row.prompt.visual[kept].sum())
