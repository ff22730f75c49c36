"""Inputs of a request of Triton's python backend, and its responses."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trio_deploy.serve.triton_server.request import INPUTS

_LOG = logging.getLogger(__name__)


class TritonSender:
    """Sends responses to Triton's client until the last one, from any thread, and none after it.

    The server frees a request's memory once its last response is there, and reads it without a
    check when it is asked whether the request was cancelled: in Triton 2.51 a query that coincides
    with or follows the last response ends the whole server with a segmentation fault. So a lock
    keeps the two apart, and there is no query afterwards.
    """

    def __init__(self, request: Any, outputs: Collection[str]) -> None:
        """Args:
        outputs: names of the outputs that the model's configuration has; others are left out.
        """
        self._outputs = outputs
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    def send(self, outputs: Mapping[str, np.ndarray], *, last: bool) -> None:
        """Send a response: outputs by name, strings as bytes in object arrays."""
        tensors = [
            pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._outputs
        ]
        self._send(pb_utils.InferenceResponse(tensors), last)

    def fail(self, text: str, code: str) -> None:
        """Send an error as the last response; `code` is the name of an error code of Triton's."""
        # By name, since `pb_utils` has no errors yet when Triton looks for auto_complete_config.
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(error=error), last=True)

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled; false once the last response is sent."""
        with self._lock:
            return not self._ended and self._sender.is_cancelled()

    def _send(self, response: Any, last: bool) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = last
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
            try:
                self._sender.send(response, flags=flags)
            except Exception:  # the backend has closed it: no other response could be sent
                _LOG.exception("a response could not be sent")


def configured_outputs(args: Mapping[str, str]) -> frozenset[str]:
    """Names of a model's outputs in its configuration, which an older version may have written.

    Args:
        args: what Triton passes to the model's `initialize`.
    """
    return frozenset(output["name"] for output in json.loads(args["model_config"])["output"])


def input_arrays(request: Any) -> dict[str, np.ndarray]:
    """Inputs of a request by name; arrays of numbers are valid until the request is released."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
