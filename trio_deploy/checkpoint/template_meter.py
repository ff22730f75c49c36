"""What a chat template may still do while it is rendered: steps, and the size of its values."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

from trio_deploy.errors import TrioError

MAX_BITS = 4096  # of a whole number
CHARACTERS_PER_STEP = 8  # that an operation handles in the time that a node of a template takes

_MAX_DEPTH = 64  # of lists and mappings within each other
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


class Meter:
    """What one rendering may still do.

    Attributes:
        steps: nodes of the template that may still be evaluated.
        largest: most characters or items that a value may have.
    """

    def __init__(self, steps: int, largest: int) -> None:
        self.steps = steps
        self.largest = largest
        # Containers cannot be changed in this sandbox, so each is measured once; they are kept, so
        # that no other object gets the same identity.
        self._sizes: dict[int, tuple[Any, int, int]] = {}

    def spend(self, steps: int) -> bool:
        """Count work; returns True.

        Raises:
            TrioError: it is too much.
        """
        self.steps -= steps
        if self.steps < 0:
            raise TrioError(
                "the chat template takes too many steps: its loops or macros are far longer than "
                "the messages need; correct the template"
            )
        return True

    def read(self, value: Any) -> Any:
        """Count the work of reading a value; returns it."""
        if isinstance(value, (str, *_CONTAINERS)):
            self.spend(self.size(value) // CHARACTERS_PER_STEP)
        return value

    def allow(self, size: int | float) -> None:
        """Check the size that a value would have.

        Raises:
            TrioError: it is too large.
        """
        if size > self.largest:
            raise TrioError(
                f"the chat template makes a value of more than {self.largest} characters or items: "
                "correct the template"
            )

    def take(self, value: Any) -> Any:
        """Check and count the result of an operation; returns it, an iterator as a counting one."""
        if isinstance(value, (bytes, bytearray)):
            raise TrioError("the chat template makes bytes, but it may make text alone")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TrioError("the chat template computes a number of over 1,200 digits: correct it")
        if isinstance(value, Iterator):
            return self.counted(value)
        if isinstance(value, (str, *_CONTAINERS)):
            self.allow(self.size(value))
            self.read(value)
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items; each is counted."""
        for item in items:
            self.spend(1)
            yield item

    def size(self, value: Any) -> int:
        """Characters of a value as text, or a little more; what occurs twice counts twice."""
        if isinstance(value, str):
            return len(value) + 2
        if isinstance(value, int):
            return value.bit_length() // 3 + 2
        return self._measured(value)[0] if isinstance(value, _CONTAINERS) else 32

    def depth(self, value: Any) -> int:
        """Lists and mappings within each other."""
        return self._measured(value)[1] if isinstance(value, _CONTAINERS) else 0

    def _measured(self, value: Any) -> tuple[int, int]:
        """Size and depth of a container."""
        if (known := self._sizes.get(id(value))) is not None:
            return known[1:]
        size, depth = 2, 0
        parts = value.items() if isinstance(value, dict) else ((item,) for item in value)
        for item in (item for part in parts for item in part):
            if isinstance(item, _CONTAINERS):
                inner, below = self._measured(item)
                size, depth = size + inner + 2, max(depth, below)
            else:
                size += self.size(item) + 2
        if depth >= _MAX_DEPTH:
            raise TrioError(
                f"the chat template nests lists or mappings deeper than {_MAX_DEPTH}: correct it"
            )
        self._sizes[id(value)] = (value, size, depth + 1)
        return size, depth + 1


METER: ContextVar[Meter] = ContextVar("meter")
"""The meter of the rendering that runs in this thread."""


def metered(meter: Meter, render: Callable[[], str]) -> str:
    """Call `render`, within which templates of a `LimitedEnvironment` use up the meter.

    Raises:
        TrioError: the template does too much.
    """
    token = METER.set(meter)
    try:
        text = render()
        meter.allow(len(text))
        return text
    finally:
        METER.reset(token)
