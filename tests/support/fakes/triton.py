"""As much of `triton_python_backend_utils` as the models use; the real one is Triton's own.

What the real one does beyond Python's rules is kept: tensors of the types that models send, error
codes of a type of their own, a sender of which nothing may be asked after the last response or
while it is sent.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.support.waiting import WAIT_S
from trio_deploy.serve.triton_server.request import OUTPUTS

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        assert array.dtype != np.object_ or all(isinstance(x, bytes) for x in array.ravel())
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    class Code(Enum):
        INTERNAL = 1
        INVALID_ARG = 3
        UNAVAILABLE = 4
        CANCELLED = 7

    INTERNAL = Code.INTERNAL
    INVALID_ARG = Code.INVALID_ARG
    UNAVAILABLE = Code.UNAVAILABLE
    CANCELLED = Code.CANCELLED

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        assert isinstance(message, str) and isinstance(code, TritonError.Code)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> Code:
        return self._code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """Gathers responses; `cancel` is what a client does."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.ended = threading.Event()
        self.cancelled = False
        self.on_send: Callable[[Sender], None] = lambda sender: None
        self.on_look: Callable[[], object] = lambda: None
        self.crashed = False
        self._looking = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "sent after the last response"
        self.crashed |= flags == FINAL and self._looking  # the real server frees what is looked at
        if response is not None:
            self.responses.append(response)
        self.on_send(self)
        if flags == FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        self.crashed |= self.ended.is_set()
        self._looking = True
        self.on_look()
        self._looking = False
        return self.cancelled

    def cancel(self) -> None:
        self.cancelled = True


class Asked:
    """A request as a model sees it."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout: int = 0,
    ) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in (tensors or {}).items()}
        self._parameters, self._timeout = dict(parameters or {}), timeout
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def timeout(self) -> int:
        return self._timeout

    def outputs(self, wait_s: float = WAIT_S) -> list[dict[str, Any]]:
        """Every response's tensors as Python values, once the last has come."""
        assert self.sender.ended.wait(wait_s), "no last response"
        found = []
        for response in self.sender.responses:
            assert not response.has_error(), self.error()
            found.append({t.name(): t.as_numpy().tolist() for t in response.output_tensors()})
        return found

    def token_ids(self) -> list[int]:
        """Of all responses."""
        return [token for response in self.outputs() for token in response["token_ids"]]

    def error(self, wait_s: float = WAIT_S) -> tuple[TritonError.Code, str]:
        """Code and message of the error that ended it."""
        assert self.sender.ended.wait(wait_s), "no last response"
        error = self.sender.responses[-1].error()
        assert error is not None, "it was answered"
        return error.code(), error.message()


class Metric:
    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.value = dict(labels), 0.0

    def increment(self, change: float) -> None:
        self.value += change


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    FAMILIES: dict[str, MetricFamily] = {}  # noqa: RUF012 (one server)

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.kind, self.metrics = kind, list[Metric]()
        self.FAMILIES[name] = self

    def Metric(self, labels: Mapping[str, str]) -> Metric:
        self.metrics.append(Metric(labels))
        return self.metrics[-1]


def get_input_tensor_by_name(request: Asked, name: str) -> Tensor | None:
    return request.tensors.get(name)


def module() -> ModuleType:
    """The module that models import."""
    made = ModuleType("triton_python_backend_utils")
    for value in (
        Tensor,
        TritonError,
        TritonModelException,
        InferenceResponse,
        MetricFamily,
        get_input_tensor_by_name,
    ):
        setattr(made, value.__name__, value)
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    return made


def arguments(folder: Path, name: str = "trio_vlm", **parameters: str) -> dict[str, str]:
    """What Triton passes to a model's `initialize`."""
    config = {
        "parameters": {name: {"string_value": v} for name, v in parameters.items()},
        "output": [{"name": name} for name in OUTPUTS],
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_name": name,
        "model_version": "1",
    }
