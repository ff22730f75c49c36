"""A bound on the memory of all requests that wait or run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ImageCounts, ModelConfig
from trio_deploy.families.pixels import encoded_size
from trio_deploy.families.registry import get_family
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.pipeline.request import Request
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest


class Admission:
    """Counts the bytes of requests from their arrival to the end of their answers.

    A picture's file is freed before that, when it has been prepared; but then the vision tower's
    inputs take its place, which can be a thousand times as large. So both count. How large they
    are follows from the picture's size, which its header says: no picture is decoded for it.
    """

    def __init__(self, limits: ServiceLimits, config: ModelConfig) -> None:
        """Args:
        config: configuration of the model, which decides what a picture of some size becomes.
        """
        self._limits, self._config = limits, config
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes counted at present."""
        return self._used

    def check_sent(self, client: ClientRequest) -> None:
        """Raise TrioError where what was sent exceeds the limit before anything is made of it."""
        if client.nbytes > self._limits.max_queue_bytes:
            raise self._never_fits(client.nbytes, "")

    def admit(self, client: ClientRequest, request: Request, together: int = 1) -> int:
        """Count a request's texts and pictures as they were sent, and what its pictures become.

        Args:
            request: the same, checked: its pictures are the bytes of files.
            together: how many like it are to be answered together, or none of them.

        Returns:
            Their bytes, to be released once.

        Raises:
            Refused: they do not fit beside those of other requests.
            TrioError: the requests alone exceed the limit, or a prompt's tokens; a picture has a
                shape that the model does not take.
        """
        pictures = cast("list[bytes]", request.image_list)
        found = [self._counts(number, picture) for number, picture in enumerate(pictures)]
        # A picture may be stored lying on its side: at most, or at least, what either way brings.
        size = client.nbytes + sum(max(each.input_bytes for each in ways) for ways in found)
        patches = sum(max(each.patches for each in ways) for ways in found)
        tokens = sum(min(each.visual_tokens for each in ways) for ways in found)
        self._check_tokens(tokens)
        what = (
            f" with its {len(found)} picture{'s' * (len(found) > 1)}, which become {patches} "
            f"patches and {tokens} visual tokens"
        ) * bool(found)
        limit = self._limits.max_queue_bytes
        if size * together > limit:
            raise self._never_fits(size, what, together)
        with self._lock:
            if self._used + size > limit:
                raise Refused(
                    f"the request needs {size} bytes{what}, and those that wait or run have "
                    f"{self._used}, but max_queue_bytes is {limit}: try again later"
                )
            self._used += size
        return size

    def release(self, size: int) -> None:
        """Stop counting what was counted."""
        with self._lock:
            self._used -= size

    def _counts(self, number: int, picture: bytes) -> Sequence[ImageCounts]:
        """What a picture brings, as its header says and turned."""
        counts = get_family(self._config.family).counts
        size = encoded_size(picture)  # (width, height)
        try:
            return [counts(each, self._config) for each in (size[::-1], size)]
        except TrioError as error:
            raise TrioError(f"image {number}: {error}") from error

    def _check_tokens(self, tokens: int) -> None:
        most = self._limits.batcher.max_prompt_tokens
        if most is not None and tokens >= most:
            raise TrioError(
                f"the pictures have {tokens} visual tokens, but max_prompt_tokens is {most}: send "
                "fewer or smaller ones"
            )

    def _never_fits(self, size: int, what: str, together: int = 1) -> TrioError:
        times = f", {together} times" * (together > 1)
        fewer = "ask for fewer answers, " * (together > 1)
        return TrioError(
            f"the request needs {size} bytes{what}{times}, but max_queue_bytes is "
            f"{self._limits.max_queue_bytes}: {fewer}send fewer or smaller pictures, or less text"
        )
