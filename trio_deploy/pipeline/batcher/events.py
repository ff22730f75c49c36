"""What a submitted request gives back: a handle, and events delivered by a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.request import Generation
from trio_deploy.pipeline.sampling import TokenLogprobs

_LOG = logging.getLogger(__name__)


class Refused(TrioError):
    """The queue is full, the batcher is closing, or no thread can be started."""


class Cancelled(TrioError):
    """The request was cancelled."""


class DeadlinePassed(TrioError):
    """The deadline passed before the first token."""


class Failed(TrioError):
    """Answering failed through no fault of the request."""


def failed(error: Exception) -> Failed:
    """What a request is told of an error that is not its fault."""
    return Failed(str(error) if isinstance(error, TrioError) else f"{error!r:.300}")


def outcome(error: TrioError) -> str:
    """How a request that ended with an error is counted in `Metrics.outcomes`."""
    kinds: dict[type[TrioError], str] = {
        Cancelled: "cancelled",
        DeadlinePassed: "deadline",
        Failed: "failed",
        Refused: "refused",
    }
    return kinds.get(type(error), "invalid")


@dataclass(frozen=True)
class Event:
    """A step of an answer; exactly one event has `generation` or `error`, and it is the last.

    Attributes:
        token_id: the token generated; None where the event adds none (an error, a deadline).
        text: the text that it completes.
        logprobs: how likely the token was, where the request asks for it.
        generation: the whole answer. Its `finish_reason` may also be `deadline`; its `timings`
            have `queue` (from `submit` to the prefill, preparing left out) and its own time in
            `decode`; stages of the prefill count all rows prefilled together. It has no `images`.
        error: a `TrioError` if the request was at fault, otherwise one of this module's kinds.
    """

    token_id: int | None = None
    text: str = ""
    generation: Generation | None = None
    error: TrioError | None = None
    logprobs: TokenLogprobs | None = None

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.generation is not None or self.error is not None


OnEvent = Callable[[Event], None]


class Handle:
    """A submitted request."""

    def __init__(self, on_event: OnEvent | None, wake: Callable[[], None]) -> None:
        """Use `Batcher.submit`.

        Args:
            wake: called when the request has been cancelled.
        """
        self._on_event = on_event
        self._wake = wake
        self._cancelled = False
        self._callback_failed = False
        self._last: Event | None = None
        self._done = threading.Event()

    def cancel(self) -> None:
        """End the answer before its next token, with `Cancelled`; no effect once it has ended."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

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

    def deliver(self, event: Event) -> None:
        """Call the listener; the batcher's event thread does."""
        try:
            if self._on_event is not None and (event.last or not self._callback_failed):
                self._on_event(event)
        except BaseException:  # SystemExit would end the thread, and with it all other answers
            _LOG.exception("the listener of a request failed; the request is cancelled")
            self._callback_failed = True
            self.cancel()
        if event.last:
            # A listener often refers to its handle: free both at once, without waiting for a
            # garbage collection.
            self._on_event = None
            self._last = event
            self._done.set()


class EventThread:
    """Delivers events to listeners, so that slow ones do not delay the model."""

    def __init__(self) -> None:
        """Start the thread."""
        self._items: queue.SimpleQueue[tuple[Handle, Event] | threading.Event | None]
        self._items = queue.SimpleQueue()
        self._delivered = threading.Event()
        self._delivered.set()
        self._thread = threading.Thread(target=self._run, name="trio-events", daemon=True)
        self._thread.start()

    def send(self, handle: Handle, event: Event) -> None:
        """Have an event delivered, after all that were sent before."""
        self._items.put((handle, event))

    def wait_one_step_behind(self) -> None:
        """Wait until everything sent before the previous call is delivered.

        Called after each decode step: the next step may run while this step's events are
        delivered, but no further ahead, so that what a listener cancels ends with the next token.
        """
        delivered = threading.Event()
        self._items.put(delivered)
        self._delivered.wait()
        self._delivered = delivered

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Deliver what was sent, and end the thread."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                handle, event = item
                handle.deliver(event)
                del handle, event
            del item
