"""A cache of what the vision tower makes of pictures, for follow-up questions about them.

Features depend on a picture's pixels alone, so what is found here is what the tower would compute.
Keys and values of a prompt are no such thing: which visual tokens stay depends on the question.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from math import prod

from trio_deploy.families.base import Layout
from trio_deploy.runtimes.arrays import duplicate
from trio_deploy.runtimes.base import Array

Outputs = Mapping[str, Array]
"""Outputs of the vision graph for one picture, by name."""


@dataclass(frozen=True)
class KeyedLayout(Layout):
    """A picture's layout that is known by its file.

    Attributes:
        key: SHA-256 of the file.
        encoded: the tower's outputs, if they are known; there are no feeds then.
    """

    key: bytes = b""
    encoded: Outputs | None = None

    @classmethod
    def of(cls, layout: Layout, key: bytes) -> KeyedLayout:
        """The same layout with a key."""
        return cls(**{each.name: getattr(layout, each.name) for each in fields(Layout)}, key=key)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs and of what says where their tokens lie."""
        arrays = [self.rows, self.boxes, *(self.encoded or {}).values()]
        return sum(prod(array.shape) * array.dtype.itemsize for array in arrays)


@dataclass(frozen=True)
class CacheCounts:
    """How often pictures were found, how often the tower ran for one, and bytes held."""

    hits: int = 0
    misses: int = 0
    nbytes: int = 0


class FeatureCache:
    """Outputs of the vision tower by the picture's file; those used last stay.

    A layout that was found keeps its outputs alive until its prefill, whatever is dropped here
    meanwhile.
    """

    def __init__(self, limit: int) -> None:
        """Args:
        limit: bytes of all outputs together.
        """
        self._limit = limit
        self._lock = threading.Lock()  # guards all that follows
        self._known: OrderedDict[bytes, KeyedLayout] = OrderedDict()
        self._running: dict[bytes, threading.Event] = {}
        self._counts = CacheCounts()

    @property
    def counts(self) -> CacheCounts:
        """The counts at present."""
        return self._counts

    def find(self, key: bytes) -> KeyedLayout | None:
        """The layout of a picture with its outputs, if they are known."""
        with self._lock:
            return self._find(key)

    def encode(
        self, layouts: Sequence[KeyedLayout], run: Callable[[list[Layout]], list[Outputs]]
    ) -> dict[bytes, Outputs]:
        """Outputs of pictures by their keys; the tower runs for those that nobody knows.

        A picture for which another thread runs it already is waited for.

        Args:
            layouts: of which several may be of one picture.
            run: runs the tower, for distinct pictures.
        """
        found = {each.key: each.encoded for each in layouts if each.encoded is not None}
        pending = {each.key: each for each in layouts if each.key not in found}
        misses = 0
        while pending:
            mine, theirs = self._claim(pending, found)
            try:
                for layout, outputs in zip(mine, run(list(mine)) if mine else (), strict=True):
                    own = {name: duplicate(array) for name, array in outputs.items()}
                    found[layout.key] = own
                    self._keep(replace(layout, feeds={}, encoded=own))
            finally:
                self._release(mine)
            for event in theirs:
                event.wait()
            misses += len(mine)
            pending = {key: each for key, each in pending.items() if key not in found}
        with self._lock:
            self._count(hits=len(layouts) - misses, misses=misses)
        return found

    def _claim(
        self, pending: Mapping[bytes, KeyedLayout], found: dict[bytes, Outputs]
    ) -> tuple[list[KeyedLayout], list[threading.Event]]:
        """Pictures to run the tower for, and ends of others' runs; what is known is added."""
        mine, theirs = [], []
        with self._lock:
            for key, layout in pending.items():
                known = self._find(key)
                if known is not None and known.encoded is not None:
                    found[key] = known.encoded
                elif key in self._running:
                    theirs.append(self._running[key])
                else:
                    self._running[key] = threading.Event()
                    mine.append(layout)
        return mine, theirs

    def _release(self, mine: Sequence[KeyedLayout]) -> None:
        with self._lock:
            for layout in mine:
                self._running.pop(layout.key).set()

    def _find(self, key: bytes) -> KeyedLayout | None:
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def _keep(self, layout: KeyedLayout) -> None:
        """Add a picture, and drop those that were not used for the longest time."""
        with self._lock:
            if layout.nbytes > self._limit:
                return
            self._known[layout.key] = layout
            self._count(nbytes=layout.nbytes)
            while self._counts.nbytes > self._limit:
                _, dropped = self._known.popitem(last=False)
                self._count(nbytes=-dropped.nbytes)

    def _count(self, hits: int = 0, misses: int = 0, nbytes: int = 0) -> None:
        old = self._counts
        self._counts = CacheCounts(old.hits + hits, old.misses + misses, old.nbytes + nbytes)


def key_of(file: bytes) -> bytes:
    """Key of a picture's file: preprocessing and weights are the same for all of a pipeline."""
    return sha256(file).digest()
