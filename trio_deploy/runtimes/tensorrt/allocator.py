"""Memory of a device that is given out again: what is kept of it has a bound."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence

SLACK = 1.25
"""A spare block serves requests for as much as it has, and for down to 1/SLACK of it."""
_SMALL, _LARGE = 512, 2 << 20  # bytes that requests are rounded up to, so that they fit again
_ALWAYS = 8 * _SMALL  # that a block may be too large by, however little is asked for


class Pool:
    """Blocks that are in use, and spare ones for what comes next.

    Both together never take more than `most` or than what was in use at once since the last
    `release`: spare blocks that were not asked for the longest are freed. A block comes back by a
    finalizer, which may run at any time and in any thread, so it only waits in a queue where the
    pool is busy.

    Attributes:
        most: bytes, see above.
        held: while it is true nothing is freed (a stream is being recorded).
    """

    def __init__(self, free: Callable[[Sequence[int]], None], most: int) -> None:
        """An empty pool.

        Args:
            free: frees addresses, whatever the device still does with them.
        """
        self.most, self.held = most, False
        self._free = free
        self._spare: list[tuple[int, int, int]] = []  # (size, -time of its return, address)
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._clock = 0
        self._in_use = self._peak = self._kept = 0

    @property
    def kept(self) -> int:
        """Bytes of spare blocks."""
        with self._lock:
            self._settle()
        return self._kept

    @staticmethod
    def rounded(nbytes: int) -> int:
        """The size of a new block for `nbytes` bytes."""
        unit = _LARGE if nbytes >= _LARGE else _SMALL
        return max(1, -(-nbytes // unit)) * unit

    def reuse(self, size: int) -> tuple[int, int] | None:
        """Address and size of a spare block, the smallest that has `size` bytes and is not much
        larger; None where there is none, and then room for a new one is made."""
        with self._lock:
            self._settle()
            place = bisect_left(self._spare, (size,))
            if place < len(self._spare):
                found, _, address = self._spare[place]
                if found <= max(size * SLACK, size + _ALWAYS):
                    del self._spare[place]
                    self._kept -= found
                    self._count(found)
                    return address, found
            self._shrink(size)
            return None

    def add(self, size: int) -> None:
        """Count a new block that is in use."""
        with self._lock:
            self._count(size)

    def give_back(self, address: int, size: int) -> None:
        """A block that nobody needs any more."""
        self._returned.append((address, size))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def release(self) -> None:
        """Free all spare blocks, and forget what was in use at once before."""
        with self._lock:
            self._settle()
            self._peak = self._in_use
            addresses = [address for _, _, address in self._spare]
            self._spare, self._kept = [], 0
            if addresses:
                self._free(addresses)

    def _count(self, size: int) -> None:
        self._in_use += size
        self._peak = max(self._peak, self._in_use)

    def _settle(self) -> None:
        """Take in what came back."""
        while self._returned:
            address, size = self._returned.popleft()
            self._clock += 1
            insort(self._spare, (size, -self._clock, address))
            self._in_use -= size
            self._kept += size
        self._shrink(0)

    def _shrink(self, wanted: int) -> None:
        """Free spare blocks until `wanted` more bytes are within the bound."""
        excess = self._in_use + self._kept + wanted - max(self.most, self._peak)
        if excess <= 0 or self.held or not self._spare:
            return
        oldest = sorted(self._spare, key=lambda block: block[1], reverse=True)
        gone = []
        while oldest and excess > 0:
            block = oldest.pop(0)
            gone.append(block)
            excess -= block[0]
        for block in gone:
            self._spare.remove(block)
            self._kept -= block[0]
        self._free([address for _, _, address in gone])
