"""A bounded cache of freed device memory."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence

SLACK = 1.25
"""A cached block serves requests of its own size and down to 1/SLACK of it."""
_SMALL, _LARGE = 512, 2 << 20  # bytes that sizes are rounded up to, so that blocks can be reused
_ALWAYS = 8 * _SMALL  # bytes that a block may be too large by, however small the request


class Pool:
    """Blocks in use, and cached blocks for later requests.

    Both together never exceed `cache_limit` or the peak in use since the last `release`, whichever
    is larger: the blocks that were cached longest are freed. A block is returned by a finalizer,
    which may run at any time and in any thread, so it only joins a queue while the pool is busy.

    Attributes:
        cache_limit: bytes, see above.
        recording: while true, nothing is freed, since a stream is being recorded.
    """

    def __init__(self, free: Callable[[Sequence[int]], None], cache_limit: int) -> None:
        """Create an empty pool.

        Args:
            free: frees addresses, even while the device still uses them.
        """
        self.cache_limit, self.recording = cache_limit, False
        self._free = free
        self._cached: list[tuple[int, int, int]] = []  # (size, -time of return, address)
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._clock = 0
        self._in_use = self._peak = self._cached_bytes = 0

    @property
    def cached_bytes(self) -> int:
        """Bytes of cached blocks."""
        with self._lock:
            self._settle()
        return self._cached_bytes

    @staticmethod
    def rounded(nbytes: int) -> int:
        """Size of a new block for `nbytes` bytes."""
        unit = _LARGE if nbytes >= _LARGE else _SMALL
        return max(1, -(-nbytes // unit)) * unit

    def reuse(self, size: int) -> tuple[int, int] | None:
        """Address and size of the smallest cached block of `size` bytes that is not much larger.

        None if there is none; space for a new one is then freed.
        """
        with self._lock:
            self._settle()
            place = bisect_left(self._cached, (size,))
            if place < len(self._cached):
                found, _, address = self._cached[place]
                if found <= max(size * SLACK, size + _ALWAYS):
                    del self._cached[place]
                    self._cached_bytes -= found
                    self._count(found)
                    return address, found
            self._shrink(size)
            return None

    def add(self, size: int) -> None:
        """Count a new block as in use."""
        with self._lock:
            self._count(size)

    def give_back(self, address: int, size: int) -> None:
        """Return a block that is no longer used."""
        self._returned.append((address, size))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def release(self) -> None:
        """Free all cached blocks, and reset the peak to what is in use now."""
        with self._lock:
            self._settle()
            self._peak = self._in_use
            addresses = [address for _, _, address in self._cached]
            self._cached, self._cached_bytes = [], 0
            if addresses:
                self._free(addresses)

    def _count(self, size: int) -> None:
        self._in_use += size
        self._peak = max(self._peak, self._in_use)

    def _settle(self) -> None:
        """Move returned blocks from the queue to the cache."""
        while self._returned:
            address, size = self._returned.popleft()
            self._clock += 1
            insort(self._cached, (size, -self._clock, address))
            self._in_use -= size
            self._cached_bytes += size
        self._shrink(0)

    def _shrink(self, wanted: int) -> None:
        """Free cached blocks until `wanted` more bytes are within the limit."""
        excess = self._in_use + self._cached_bytes + wanted - max(self.cache_limit, self._peak)
        if excess <= 0 or self.recording or not self._cached:
            return
        oldest = sorted(self._cached, key=lambda block: block[1], reverse=True)
        freed = []
        while oldest and excess > 0:
            block = oldest.pop(0)
            freed.append(block)
            excess -= block[0]
        for block in freed:
            self._cached.remove(block)
            self._cached_bytes -= block[0]
        self._free([address for _, _, address in freed])
