"""Cases that take long, which `make tests` leaves out and `make tests ALL=1` runs."""

from __future__ import annotations

import os

import pytest


def only_in_full_runs(what: str) -> pytest.MarkDecorator:
    """A mark for cases that are skipped otherwise; `what` says how all are run."""
    return pytest.mark.skipif(not os.environ.get("ALL"), reason=f"{what} ALL=1 runs this case, too")
