"""How much of what clients sent a model holds at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.serve.triton_server.request import nbytes

_PICTURES = ("images", "images_base64")


class HeldBytes:
    """Counts the bytes of requests from their arrival to the end of their answers.

    A picture's file is let go of before that, when it has been prepared; but then its tiles wait in
    its place, which of a small file can be a thousand times as much. So both count.
    """

    def __init__(self, most: int, config: ModelConfig, max_images: int) -> None:
        """Args:
        most: bytes, `max_queue_bytes`.
        config: of the model, which says how large the tiles of a picture are.
        max_images: more are refused by the checks that follow.
        """
        self._most = most
        largest = request_limits(config)
        self._tiles = 4 * largest.tile_values * largest.tiles
        self._max_images = max_images
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes at present."""
        return self._held

    def take(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Count a request's texts and pictures, base64 as the text that it is, and their tiles.

        Returns:
            Their bytes, to be given back once.

        Raises:
            Refused: too much is held for these to come to it.
            TrioError: the request alone is above the limit.
        """
        pictures = sum(tensors[name].size for name in _PICTURES if name in tensors)
        size = sum(nbytes(array) for array in tensors.values())
        size += min(pictures, self._max_images) * self._tiles
        if size > self._most:
            raise TrioError(
                f"the request needs {size} bytes with its pictures' tiles, but max_queue_bytes is "
                f"{self._most}"
            )
        with self._lock:
            if self._held + size > self._most:
                raise Refused(
                    f"the request needs {size} bytes with its pictures' tiles, and those that wait "
                    f"or run hold {self._held}, but max_queue_bytes is {self._most}: try again "
                    "later"
                )
            self._held += size
        return size

    def give_back(self, size: int) -> None:
        """What `take` counted is gone."""
        with self._lock:
            self._held -= size
