"""What commands print: text from outside, such as an answer, cannot steer the terminal."""

from __future__ import annotations

import re
import sys
from typing import TextIO

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def printable(text: str) -> str:
    """A text with U+FFFD for each control character but tabs and line feeds.

    An escape sequence in an answer, a file's name or a bundle could else clear the screen, hide
    what was printed before, or set the clipboard.
    """
    return _CONTROL.sub("\ufffd", text)


def say(
    text: object = "",
    *,
    end: str = "\n",
    file: TextIO | None = None,
    flush: bool = False,
    dim: bool = False,
) -> None:
    """Print a text, without its control characters.

    Args:
        file: where to; None: standard output.
        dim: whether a terminal shows it dimmed.
    """
    shown = printable(str(text))
    shown = f"{_DIM}{shown}{_PLAIN}" if dim else shown
    print(shown, end=end, file=sys.stdout if file is None else file, flush=flush)
