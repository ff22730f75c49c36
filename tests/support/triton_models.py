"""Questions to the models that Triton loads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.support.fakes.triton import Asked
from tests.support.tensors import one, texts
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline
from trio_deploy.serve.triton_server.request import INPUTS

QUESTION = "what color is the circle ?"


def ask(
    model: Any, parameters: dict[str, Any] | None = None, timeout: int = 0, **inputs: Any
) -> Asked:
    """Send a request; plain values become tensors of the kind that the input has."""
    tensors = {}
    for name, value in inputs.items():
        if not isinstance(value, np.ndarray):
            kind = INPUTS[name][0]
            value = texts(value) if kind == "string" else one(value, kind)
        tensors[name] = value
    request = Asked(tensors, parameters, timeout)
    model.execute([request])
    return request


def served_pipeline(model: Any) -> Pipeline:
    """The pipeline of a loaded model."""
    return model._service._batcher._worker._pipeline  # type: ignore[no-any-return]


def hold(model: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keep the model's prefills waiting until the event is set."""
    go = threading.Event()
    prefill = served_pipeline(model).prefill
    monkeypatch.setattr(
        served_pipeline(model),
        "prefill",
        lambda *given: go.wait(WAIT_S) and prefill(*given),
    )
    return go


def wait_for_prefill(model: Any) -> None:
    """Wait until nothing waits to be prepared or chosen, in one look: requests move in between."""
    wait_for(lambda: model._service.metrics().queued == 0)
