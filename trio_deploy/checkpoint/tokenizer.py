"""tokenizer.json of a checkpoint or a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trio_deploy.errors import TrioError
from trio_deploy.files import brief, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_BYTES = 1 << 27  # Gemma's, the longest in use, has 33 MB


def load_tokenizer(file: Path, remedy: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        remedy: what to do about a bad file, for messages.

    Raises:
        TrioError: there is none, it is too large, or it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        content = read_bytes(file, remedy, _MAX_BYTES)
    except FileNotFoundError:
        raise TrioError(f"there is no {file}: {remedy}") from None
    try:
        return Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Exception, or a panic of Rust, which derives from none
        raise TrioError(f"{file} is no tokenizer ({brief(str(error))}): {remedy}") from None
