"""Requests of a batcher until their last event, and the threads that prepare them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from trio_deploy.errors import OutOfMemory, PromptTooLong, TrioError
from trio_deploy.pipeline.batcher.events import Event, EventThread, Failed, Handle, Refused, outcome
from trio_deploy.pipeline.batcher.metrics import Recorder
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits, Entry, refusal
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request
from trio_deploy.pipeline.sequence import SequenceState

_LOG = logging.getLogger(__name__)


class _NobodyWaits(Exception):
    """A request that is being prepared was cancelled, or its deadline has passed."""


@dataclass(eq=False)
class Job:
    """A submitted request.

    Attributes:
        entry: what the scheduler knows of it.
        request: None once it has been prepared, so that its pictures can be freed.
        submitted, joined: `time.perf_counter()` when it was submitted and joined the batch.
        row: its row; None until it has been prepared.
    """

    entry: Entry
    request: Request | None
    handle: Handle
    submitted: float
    row: SequenceState | None = None
    joined: float = 0.0

    @property
    def expired(self) -> bool:
        """Whether it was cancelled or its deadline has passed."""
        return self.handle.cancelled or time.perf_counter() >= self.entry.deadline

    @property
    def queue_s(self) -> float:
        """Seconds that it has waited for its prefill, preparing left out."""
        prepared = 0.0 if self.row is None else self.row.timings["preprocess"]
        return time.perf_counter() - self.submitted - prepared


@dataclass(frozen=True)
class Snapshot:
    """The queue at one moment: jobs by where they are, keys of cancelled ones."""

    preparing: list[Job]
    waiting: list[Job]
    cancelled: frozenset[int]
    closing: bool


class RequestQueue:
    """All requests that have not ended; used by every thread."""

    def __init__(self, limits: BatcherLimits, events: EventThread, recorder: Recorder) -> None:
        self._limits = limits
        self._events = events
        self._recorder = recorder
        self._changed = threading.Condition()  # guards all that follows
        self._dirty = False
        self._closing = False
        self._open: dict[int, Job] = {}
        self._preparing: dict[int, Job] = {}
        self._waiting: dict[int, Job] = {}

    @property
    def queued(self) -> int:
        """Requests that wait for their prefill, those being prepared included."""
        with self._changed:
            return len(self._preparing) + len(self._waiting)

    def add(self, job: Job, prepare: Callable[[Job], object]) -> None:
        """Take in a request.

        Args:
            prepare: has a thread prepare it.

        Raises:
            Refused: the queue is full or closed, or there is no thread to be had.
        """
        with self._changed:
            if reason := refusal(self.queued, self._closing, self._limits):
                raise Refused(reason)
            key = job.entry.key
            self._open[key] = self._preparing[key] = job
            try:
                prepare(job)
            except Exception as error:
                job.handle.cancel()  # a thread may still come to it
                del self._open[key], self._preparing[key]
                raise Refused(f"the request cannot be prepared: {error!r:.200}") from error
            self.wake()  # it may have a deadline

    def prepared(self, job: Job, row: SequenceState | None) -> bool:
        """Let a prepared request wait for its prefill.

        Args:
            row: None if preparing stopped because nobody waits for the answer.

        Returns:
            Whether it was still wanted.
        """
        with self._changed:
            if self._preparing.pop(job.entry.key, None) is None:
                return False
            if row is not None:
                job.row = row
                job.entry = replace(job.entry, tokens=row.prompt.length)
            self._waiting[job.entry.key] = job
            self.wake()
            return True

    def remove(self, keys: Collection[int]) -> list[Job]:
        """Take requests out of the queue, whether they are prepared or not; skip other keys."""
        with self._changed:
            return [
                jobs.pop(key)
                for key in keys
                for jobs in (self._preparing, self._waiting)
                if key in jobs
            ]

    def end(self, job: Job, event: Event) -> None:
        """Count a request as ended and send its last event."""
        with self._changed:
            if self._open.pop(job.entry.key, None) is None:
                return  # there is one last event
            self.wake()
        job.request = None  # a pool may keep the job for longer, but not its pictures
        reason, latency = outcome(event.error) if event.error else "", None
        if event.generation is not None:
            reason, latency = event.generation.finish_reason, time.perf_counter() - job.submitted
        tokens = 0 if job.row is None else len(job.row.token_ids)
        self._recorder.record_outcome(reason, tokens, latency)
        self._events.send(job.handle, event)

    def snapshot(self) -> Snapshot:
        """Requests by where they are, in order."""
        with self._changed:
            return Snapshot(
                list(self._preparing.values()),
                list(self._waiting.values()),
                frozenset(key for key, job in self._open.items() if job.handle.cancelled),
                self._closing,
            )

    def close(self) -> None:
        """Take in no more requests."""
        with self._changed:
            self._closing = True
            self.wake()

    def cancel_all(self) -> None:
        """Cancel every request that has not ended."""
        with self._changed:
            for job in self._open.values():
                job.handle.cancel()

    def wake(self) -> None:
        """Tell the worker that something has changed."""
        with self._changed:
            self._dirty = True
            self._changed.notify_all()

    def wait(self, until: float | None) -> None:
        """Wait for a change since the last call, at most until a `time.perf_counter()`."""
        with self._changed:
            while not self._dirty:
                seconds = None if until is None else until - time.perf_counter()
                if seconds is not None and seconds <= 0:
                    break
                self._changed.wait(None if seconds is None else min(seconds, 3600.0))
            self._dirty = False


class Preparer:
    """Threads that open pictures, tokenise prompts and check what they need against the limits."""

    def __init__(self, pipeline: Pipeline, limits: BatcherLimits, queue: RequestQueue) -> None:
        self._pipeline = pipeline
        self._limits = limits
        self._queue = queue
        self._pool = ThreadPoolExecutor(limits.preparers, thread_name_prefix="trio-prepare")

    def submit(self, job: Job) -> None:
        """Have a request prepared.

        Raises:
            Exception: no thread can be started.
        """
        self._pool.submit(self._prepare, job)

    def close(self) -> None:
        """End the threads when they have done what was submitted."""
        self._pool.shutdown()

    def _prepare(self, job: Job) -> None:
        error: TrioError | None = None
        row: SequenceState | None = None
        request, job.request = job.request, None
        if request is not None and not job.expired:
            try:
                row = self._pipeline.prepare(request, lambda: _check_wanted(job))
                # Only drawing needs pictures, and those of all that wait could fill the memory.
                row.images, row.request = [], replace(request, images=())
                row.timings["preprocess"] = time.perf_counter() - row.started
                row.started = job.submitted
                self._check(row)
            except _NobodyWaits:
                pass  # the worker finds it among those that wait
            except OutOfMemory as caught:
                error = Failed(str(caught))
            except TrioError as caught:
                error = caught
            except Exception as caught:
                _LOG.exception("preparing a request failed")
                error = Failed(f"preparing the request failed: {caught!r:.200}")
        request = None
        if error is None:
            self._queue.prepared(job, row)
        elif self._queue.remove([job.entry.key]):
            self._queue.end(job, Event(error=error))

    def _check(self, row: SequenceState) -> None:
        length, limits = row.prompt.length, self._limits
        if limits.max_prompt_tokens is not None and length > limits.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {length} tokens ({row.prompt.visual_tokens} of them visual), but "
                f"max_prompt_tokens is {limits.max_prompt_tokens}"
            )
        needed = self._pipeline.decode_batch().required_bytes([row])
        if limits.max_kv_bytes is not None and needed > limits.max_kv_bytes:
            raise TrioError(
                f"the request needs {needed} bytes of KV cache, but max_kv_bytes is "
                f"{limits.max_kv_bytes}: ask for fewer tokens or a smaller budget"
            )


def _check_wanted(job: Job) -> None:
    """Stop preparing in vain: pictures of one request may take many seconds to decode."""
    if job.expired:
        raise _NobodyWaits
