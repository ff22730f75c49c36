"""A bound on the memory of all requests that wait or run."""

from __future__ import annotations

import threading

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest


class Admission:
    """Counts the bytes of requests from their arrival to the end of their answers.

    A picture's file is freed before that, when it has been prepared; but then its tiles take its
    place, which can be a thousand times as large. So both count.
    """

    def __init__(self, limits: ServiceLimits, config: ModelConfig) -> None:
        """Args:
        config: configuration of the model, which decides how large the tiles of a picture are.
        """
        self._limit = limits.max_queue_bytes
        largest = request_limits(config)
        self._image_bytes = 4 * largest.tile_values * largest.tiles
        self._max_images = limits.max_images
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes counted at present."""
        return self._used

    def admit(self, request: ClientRequest) -> int:
        """Count a request's texts and pictures as they were sent, and the pictures' tiles.

        Returns:
            Their bytes, to be released once.

        Raises:
            Refused: they do not fit beside those of other requests.
            TrioError: the request alone exceeds the limit.
        """
        pictures = min(request.pictures, self._max_images)  # the checks that follow refuse more
        size = request.nbytes + pictures * self._image_bytes
        if size > self._limit:
            raise TrioError(
                f"the request needs {size} bytes with its pictures' tiles, but max_queue_bytes is "
                f"{self._limit}"
            )
        with self._lock:
            if self._used + size > self._limit:
                raise Refused(
                    f"the request needs {size} bytes with its pictures' tiles, and those that wait "
                    f"or run have {self._used}, but max_queue_bytes is {self._limit}: try again "
                    "later"
                )
            self._used += size
        return size

    def release(self, size: int) -> None:
        """Stop counting what `admit` counted."""
        with self._lock:
            self._used -= size
