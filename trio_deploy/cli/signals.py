"""Signals that end a command raise an exception, as an interrupt does.

The default action of SIGTERM and SIGHUP ends a process at once: what it was writing would stay
half-written, and its children would go on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Stopped(BaseException):
    """A signal asked the process to end; derives from no `Exception`, like KeyboardInterrupt.

    Attributes:
        status: exit status, 128 + the signal's number, as shells report it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Stopped` in the main thread, once; others change nothing.

    A signal that is ignored (`nohup`) or handled by others stays so. After the first one further
    ones are ignored, so that what it interrupts can put things in order.
    """
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
