"""What every server needs: checked and admitted requests, answers, metrics, an orderly end.

A server turns what its clients send into a `ClientRequest`, and events into what they get:

>>> service = Service(pipeline, ServiceLimits(max_tokens=256))
>>> handle = service.submit(ClientRequest(prompt=b"What is this?", images=[file]), on_event)
>>> service.close(timeout=30.0)
"""

from __future__ import annotations

import contextlib
import io
import math
import queue
import sys
import threading
from collections import Counter
from dataclasses import replace

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.batcher import Batcher
from trio_deploy.pipeline.batcher.events import Cancelled, Event, Handle, OnEvent, Refused
from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request
from trio_deploy.pipeline.sequence import SequenceState
from trio_deploy.serve.admission import Admission
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest, check_request


def switch_threads_often() -> None:
    """Let threads hand the interpreter over often: the model's thread never waits for long then."""
    sys.setswitchinterval(0.0005)


class Service:
    """Answers the requests of clients on one pipeline, within limits."""

    def __init__(
        self, pipeline: Pipeline, limits: ServiceLimits | None = None, *, warm_up: bool = True
    ) -> None:
        """Start answering.

        Args:
            warm_up: answer questions, within the limits, before the first client is served.

        Raises:
            TrioError: the warm-up failed, or the runtime cannot do what a limit asks for.
        """
        self._limits = limits or ServiceLimits()
        if warm_up:
            _warm_up(pipeline, self._limits)
        self._pipeline = pipeline
        pipeline.cache_features(self._limits.vision_cache_bytes)
        self._admission = Admission(self._limits, pipeline.bundle.config)
        self._batcher = Batcher(pipeline, self._limits.batcher)
        self._rejected: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards the counter

    @property
    def limits(self) -> ServiceLimits:
        """What is accepted."""
        return self._limits

    @property
    def used_bytes(self) -> int:
        """Bytes of the requests that wait or run, as `max_queue_bytes` counts them."""
        return self._admission.used

    @property
    def alive(self) -> bool:
        """Whether the threads that answer run."""
        return self._batcher.alive

    @property
    def retry_after_s(self) -> int:
        """Seconds after which there may be room for a request that is refused now, 1 to 30.

        The queue times the time that an answer takes on average, for as many at a time as there
        are rows.
        """
        metrics = self._batcher.metrics()
        mean = metrics.latency.total / max(1, metrics.latency.count)
        seconds = metrics.queued * mean / self._limits.batcher.max_rows
        return min(30, max(1, math.ceil(seconds)))

    def submit(
        self, client: ClientRequest, on_event: OnEvent | None = None, together: int = 1
    ) -> Handle:
        """Check a request and have it answered.

        Args:
            on_event: as in `Batcher.submit`.
            together: how many like it the client wants answers to, or none at all.

        Raises:
            Refused: too much waits already, or the service is closed: try again later.
            TrioError: what is wrong with the request.
        """
        try:
            self._admission.check_sent(client)
            request, timeout_s = check_request(client, self._limits)
            size = self._admission.admit(client, request, together)
        except Exception as error:
            self.count_rejected(error)
            raise

        def deliver(event: Event) -> None:
            if event.last:
                self._admission.release(size)
            if on_event is not None:
                on_event(event)

        try:
            return self._batcher.submit(request, deliver, timeout_s=timeout_s)
        except BaseException:
            self._admission.release(size)
            raise

    def prepare(self, client: ClientRequest) -> SequenceState:
        """Check and prepare a request, without having it answered; its bytes count meanwhile.

        Raises:
            Refused: too much waits already.
            TrioError: what is wrong with the request.
        """
        self._admission.check_sent(client)
        request, _ = check_request(client, self._limits)
        size = self._admission.admit(client, request)
        try:
            return self._pipeline.prepare(request)
        finally:
            self._admission.release(size)

    def count_rejected(self, error: Exception) -> None:
        """Count a request that did not become a `ClientRequest`, or that was not accepted."""
        with self._lock:
            self._rejected["refused" if isinstance(error, Refused) else "invalid"] += 1

    def metrics(self) -> Metrics:
        """A snapshot; `outcomes` has the requests that were not admitted, too."""
        metrics, cache = self._batcher.metrics(), self._pipeline.feature_counts
        with self._lock:
            return replace(
                metrics,
                outcomes=dict(Counter(metrics.outcomes) + self._rejected),
                vision_cache_hits=cache.hits,
                vision_cache_misses=cache.misses,
                vision_cache_bytes=cache.nbytes,
            )

    def close(self, *, timeout: float | None = None) -> bool:
        """Take no more requests, and finish those submitted.

        The cache of features stays with the pipeline, so that the last metrics are what was served.

        Args:
            timeout: seconds to finish; what is left then is cancelled.

        Returns:
            Whether every request could finish.
        """
        return self._batcher.close(timeout=timeout)


def _warm_up(pipeline: Pipeline, limits: ServiceLimits) -> None:
    """Begin two answers of the default length, with a picture and without.

    Every stage runs then, and limits that no request can keep show. The batcher is one of its own,
    so that this is not counted; there is no deadline, since the first run takes longer than others.

    Raises:
        TrioError: there was no answer.
    """
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), (127, 127, 127)).save(blank, "PNG")
    plain = ClientRequest(prompt=b"what is this?")
    pictured = replace(plain, images=[blank.getvalue()])
    with Batcher(pipeline, limits.batcher) as batcher:
        for client, what in ((pictured, "about a picture"), (plain, "without a picture")):
            try:
                request, _ = check_request(client, limits)
                Admission(limits, pipeline.bundle.config).admit(client, request)
                _begin(batcher, request)
            except TrioError as error:
                raise TrioError(f"the warm-up question {what} failed: {error}") from error


def _begin(batcher: Batcher, request: Request) -> None:
    """Get two tokens of an answer, which takes a decode step."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    handle = batcher.submit(request, events.put)
    if events.get().last or events.get().last:
        handle.result()
        return
    handle.cancel()
    with contextlib.suppress(Cancelled):
        handle.result()
