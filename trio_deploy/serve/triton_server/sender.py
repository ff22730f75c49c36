"""Where the responses to a request go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Sender(Protocol):
    """Sends responses until the last one, and nothing after that."""

    def send(self, outputs: Mapping[str, np.ndarray], *, last: bool) -> None:
        """Send a response: outputs by name, strings as bytes in object arrays."""

    def fail(self, text: str, code: str) -> None:
        """Send an error as the last response; `code` is the name of an error code of Triton's."""

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request; false once the last response is sent."""
