"""What takes the responses to one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Sender(Protocol):
    """Takes responses until the last one; of what is sent after that, nothing goes out."""

    def send(self, outputs: Mapping[str, np.ndarray], *, last: bool) -> None:
        """Send a response: outputs by name, strings as bytes in an object array."""

    def fail(self, text: str, code: str) -> None:
        """Send an error as the last response; `code` is the name of one of Triton's."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for an answer that has not ended."""
