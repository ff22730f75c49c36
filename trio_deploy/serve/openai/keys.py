"""Keys as whoever starts a server gives them. Loads nothing, for the start of the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from trio_deploy.errors import TrioError

API_KEY = "TRIO_API_KEY"
"""Environment variable with a key that clients need."""


def with_environment(keys: Sequence[str] = ()) -> list[str]:
    """The environment's key, if it has one, then these.

    Raises:
        TrioError: no client could send one of them.
    """
    every = [*filter(None, [os.environ.get(API_KEY, "").strip()]), *keys]
    if not all(map(str.isascii, every)):
        raise TrioError("a key has letters that no header can carry: make keys of ASCII letters")
    return every
