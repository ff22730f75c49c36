"""How much of what clients sent a model holds at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.runtime.continuous import Refused


class HeldBytes:
    """Counts the bytes of requests from their arrival to the end of their answers.

    Pictures are let go of before that, when they have been prepared; but then what was made of
    them waits in their place.
    """

    def __init__(self, most: int) -> None:
        """Args:
        most: bytes, `max_queue_bytes`.
        """
        self._most = most
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes at present."""
        return self._held

    def take(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Count a request's texts and pictures, base64 as the text that it is.

        Returns:
            Their bytes, to be given back once.

        Raises:
            Refused: too much is held for these to come to it.
            TrioError: the request alone is above the limit.
        """
        size = sum(_size(array) for array in tensors.values())
        if size > self._most:
            raise TrioError(f"the request has {size} bytes, but max_queue_bytes is {self._most}")
        with self._lock:
            if self._held + size > self._most:
                raise Refused(
                    f"the request has {size} bytes and those that wait or run have {self._held}, "
                    f"but max_queue_bytes is {self._most}; try again later"
                )
            self._held += size
        return size

    def give_back(self, size: int) -> None:
        """What `take` counted is gone."""
        with self._lock:
            self._held -= size


def _size(array: np.ndarray) -> int:
    return sum(map(len, array.ravel())) if array.dtype == np.object_ else array.nbytes
