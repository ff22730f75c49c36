"""`trio_vlm_complete`, for Triton's python backend: one whole answer for a plain inference request.

It holds no model. Each request goes on to `trio_vlm`, in whose batch it is answered, on a thread of
its own, so that one instance serves many at once.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trio_deploy.triton.request import INPUTS, OUTPUTS, REFUSAL
from trio_deploy.triton.watch import Watch

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.05  # between looks at whether requests were cancelled
_MAX_REQUESTS = 80  # as many as `trio_vlm` takes by default: 16 rows and a queue of 64
_MAX_BYTES = 512 * 2**20  # two of the largest requests by default: 8 pictures of 20 MiB in base64


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the parameters.

        `model`, whom to ask; `max_requests`, how many at once, and `max_bytes`, of their inputs
        together, which are kept until they are answered; `watch`.

        Raises:
            TritonModelException: a limit is not a number above 0.
        """
        given = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in given.items()}
        self._model = values.get("model", "trio_vlm")
        self._most = _limit(values, "max_requests", _MAX_REQUESTS)
        self._most_bytes = _limit(values, "max_bytes", _MAX_BYTES)
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="trio-forward")
        self._open: dict[str, tuple[Any, int]] = {}  # response sender and bytes, by key
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="trio-keep", daemon=True)
        self._keeper.start()
        watched = values.get("watch", "true").lower() != "false"
        self._watch = Watch(args["model_name"]) if watched else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Pass requests on; each is answered when its answer is there."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                if len(self._open) >= self._most:
                    text = f"max_requests = {self._most} requests are under way; try again later"
                    _send(sender, _error(text, "UNAVAILABLE"))
                    continue
                tensors, size = _inputs(request)
                held = sum(size for _, size in list(self._open.values()))
                # A single one that is larger is for the other model to judge.
                if self._open and held + size > self._most_bytes:
                    text = (
                        f"the request has {size} bytes and those under way {held}, but max_bytes "
                        f"is {self._most_bytes}; try again later"
                    )
                    _send(sender, _error(text, "UNAVAILABLE"))
                    continue
                key = uuid.uuid4().hex
                asked = self._asked(request, tensors, key)
                self._open[key] = sender, size
                try:
                    self._pool.submit(self._forward, key, asked)
                except Exception:  # there is no thread to be had
                    del self._open[key]
                    raise
            except Exception as error:  # nothing that a client sends may end the instance
                _LOG.exception("a request failed")
                _send(sender, _error(f"internal error: {error!r:.200}"))

    def finalize(self) -> None:
        """Wait for what is under way."""
        if self._watch is not None:
            self._watch.close()
        self._pool.shutdown()
        self._stop.set()
        self._keeper.join()

    def _asked(self, request: Any, tensors: Mapping[str, np.ndarray], key: str) -> Any:
        """The request to pass on."""
        parameters = json.loads(request.parameters() or "{}")
        return pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(OUTPUTS),
            inputs=[pb_utils.Tensor(name, array) for name, array in tensors.items()],
            timeout=request.timeout(),
            parameters={**parameters, "stream": False, "key": key},
        )

    def _forward(self, key: str, asked: Any) -> None:
        try:
            response = self._answer(asked)
        except Exception as error:
            _LOG.exception("asking %s failed", self._model)
            response = _error(f"{self._model} could not be asked: {error!r:.200}")
        _send(self._open.pop(key)[0], response)

    def _answer(self, asked: Any) -> Any:
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            outputs = {tensor.name(): tensor for tensor in response.output_tensors()}
            if not outputs:
                continue
            reason = outputs["finish_reason"].as_numpy()[0].decode()
            if reason.startswith(REFUSAL):
                text = outputs["text"].as_numpy()[0].decode()
                return _error(text, reason.removeprefix(REFUSAL))
            return pb_utils.InferenceResponse([*outputs.values()])
        return _error(f"{self._model} sent no answer")

    def _keep(self) -> None:
        """Pass on that requests were cancelled, which a request of this kind does not do itself."""
        while not self._stop.wait(_LOOK_S):
            for key, (sender, _) in list(self._open.items()):
                try:
                    # Said until it is heard: with several instances it may reach another one.
                    if sender.is_cancelled():
                        self._cancel(key)
                except Exception:  # it was answered in this moment
                    _LOG.debug("looking after a request failed", exc_info=True)

    def _cancel(self, key: str) -> None:
        asked = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(OUTPUTS),
            inputs=[],
            parameters={"cancel": key},
        )
        list(asked.exec(decoupled=True))


def _limit(values: Mapping[str, str], name: str, default: int) -> int:
    try:
        number = int(values.get(name, default))
    except ValueError:
        number = 0
    if number < 1:
        raise pb_utils.TritonModelException(f"{name} must be a whole number above 0")
    return number


def _inputs(request: Any) -> tuple[dict[str, np.ndarray], int]:
    """Tensors of our own, since the request's go when `execute` ends, and their bytes."""
    tensors, size = {}, 0
    for name in INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            tensors[name] = array = np.array(tensor.as_numpy())
            texts = array.dtype == np.object_
            size += sum(map(len, array.ravel())) if texts else array.nbytes
    return tensors, size


def _error(text: str, code: str = "INTERNAL") -> Any:
    # By its name: where Triton looks for auto_complete_config, `pb_utils` has no errors yet.
    error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(error=error)


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
