"""A clock that a test moves by hand, in the place of the pipeline's."""

from __future__ import annotations

from typing import Any

import pytest

from trio_deploy.pipeline import prepare, sequence
from trio_deploy.pipeline.batcher import batcher, queue, worker


class HandClock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5000.0
        for module in (prepare, sequence, batcher, queue, worker):
            monkeypatch.setattr(module, "time", self)
        self._monkeypatch = monkeypatch

    def perf_counter(self) -> float:
        """What `time.perf_counter` returns meanwhile."""
        return self.now

    def before(self, owner: Any, name: str, seconds: float) -> None:
        """Let seconds pass before each call of a function or method."""
        call = getattr(owner, name)

        def later(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return call(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, later)
