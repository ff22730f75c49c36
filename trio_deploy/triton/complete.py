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


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the parameters: `model`, whom to ask; `max_requests`, how many at once; `watch`.

        Raises:
            TritonModelException: `max_requests` is not a number above 0.
        """
        given = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in given.items()}
        self._model = values.get("model", "trio_vlm")
        try:
            self._most = int(values.get("max_requests", "256"))
        except ValueError:
            self._most = 0
        if self._most < 1:
            raise pb_utils.TritonModelException("max_requests must be a whole number above 0")
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="trio-forward")
        self._open: dict[str, Any] = {}
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
                key = uuid.uuid4().hex
                asked = self._asked(request, key)
                self._open[key] = sender
                self._pool.submit(self._forward, key, asked)
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

    def _asked(self, request: Any, key: str) -> Any:
        """The request to pass on, with tensors of its own: this one's go when `execute` ends."""
        inputs = []
        for name in INPUTS:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                inputs.append(pb_utils.Tensor(name, np.array(tensor.as_numpy())))
        parameters = json.loads(request.parameters() or "{}")
        return pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(OUTPUTS),
            inputs=inputs,
            timeout=request.timeout(),
            parameters={**parameters, "stream": False, "key": key},
        )

    def _forward(self, key: str, asked: Any) -> None:
        try:
            response = self._answer(asked)
        except Exception as error:
            _LOG.exception("asking %s failed", self._model)
            response = _error(f"{self._model} could not be asked: {error!r:.200}")
        _send(self._open.pop(key), response)

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
            for key, sender in list(self._open.items()):
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


def _error(text: str, code: str = "INTERNAL") -> Any:
    # By its name: where Triton looks for auto_complete_config, `pb_utils` has no errors yet.
    error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(error=error)


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
