"""Continuous batching: requests join the batch that is being decoded, and leave when they end."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.events import EventThread, Handle, OnEvent, Refused
from trio_deploy.pipeline.batcher.metrics import Metrics, Recorder
from trio_deploy.pipeline.batcher.queue import Job, Preparer, RequestQueue
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits, Entry
from trio_deploy.pipeline.batcher.worker import Worker
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request


class Batcher:
    """Answers requests as they come, many at once, on one pipeline.

    A worker thread decodes all rows together. Between steps, waiting requests are prefilled, a
    bounded number at a time, and join; rows that have ended leave at once. If the runtime may be
    called from several threads, prefills can have threads of their own, beside the decoding. Each
    request gets the answer that `Pipeline.generate` gives (within the arithmetic's rounding),
    whatever else is in the batch. Pictures are opened and prompts tokenised by other threads, and
    events are delivered by another, so that none of it delays the model.

    >>> with Batcher(pipeline, max_rows=8) as batcher:
    ...     handle = batcher.submit(Request("What is this?", ["cat.png"]), on_event=print)
    ...     handle.result().text
    """

    def __init__(
        self, pipeline: Pipeline, limits: BatcherLimits | None = None, **keywords: Any
    ) -> None:
        """Start the threads.

        Args:
            limits: what to use of the machine; None: the defaults.
            keywords: fields of `BatcherLimits`, in the place of those of `limits`.

        Raises:
            TrioError: a limit is too small, or `prefillers` are asked for where the runtime takes
                one call at a time.
        """
        limits = replace(limits or BatcherLimits(), **keywords)
        if limits.prefillers and not pipeline.concurrent:
            raise TrioError(
                "this runtime takes one call at a time, so prefills cannot have threads of their "
                "own: set prefillers to 0"
            )
        limits = replace(
            limits, max_rows=min(limits.max_rows, pipeline.max_rows or limits.max_rows)
        )
        self._keys = itertools.count()
        self._recorder = Recorder()
        self._events = EventThread()
        self._queue = RequestQueue(limits, self._events, self._recorder)
        self._preparer = Preparer(pipeline, limits, self._queue)
        self._worker = Worker(pipeline, limits, self._queue, self._events, self._recorder)

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
                quick. If it raises, its request is cancelled, and it gets the last event only.
            timeout_s: seconds from now until the answer ends with what there is (finish reason
                `deadline`), or with `DeadlinePassed` if that is nothing.

        Raises:
            Refused: the queue is full, the batcher is closed, or no thread can be started.
        """
        now = time.perf_counter()
        deadline = math.inf if timeout_s is None else now + timeout_s
        handle = Handle(on_event, self._queue.wake)
        job = Job(Entry(next(self._keys), deadline), request, handle, now)
        try:
            self._queue.add(job, self._preparer.submit)
        except Refused:
            self._recorder.record_outcome("refused")
            raise
        return handle

    def metrics(self) -> Metrics:
        """A snapshot."""
        return self._recorder.snapshot(self._queue.queued)

    @property
    def alive(self) -> bool:
        """Whether the threads that answer run; they end by `close` alone, or by a fault of ours."""
        return self._worker.alive and self._events.alive

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and stop the threads; not to be called from `on_event`.

        Args:
            drain: finish what was submitted; otherwise it is cancelled.
            timeout: seconds to drain; what is left then is cancelled.

        Returns:
            Whether every request could finish.
        """
        self._queue.close()
        if not drain:
            self._queue.cancel_all()
        finished = self._worker.join(timeout)
        if not finished:
            self._queue.cancel_all()
            self._worker.join()
        self._preparer.close()
        self._events.close()
        return drain and finished
