"""What both models need of Triton's python backend: a request's inputs, and where answers go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trio_deploy.serve.triton_server.request import INPUTS

_LOG = logging.getLogger(__name__)


class TritonSender:
    """Sends to Triton's client, from any thread.

    The server frees what belongs to a request once its last response is there, and looks it up
    without a check when it is asked whether the request was cancelled: in Triton 2.51 a question
    that meets or follows the last response ends the whole server with a segmentation fault. So a
    lock keeps the two apart, and nothing is asked afterwards.
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    def send(self, outputs: Mapping[str, np.ndarray], *, last: bool) -> None:
        """As `sender.Sender.send`."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._send(pb_utils.InferenceResponse(tensors), last)

    def fail(self, text: str, code: str) -> None:
        """As `sender.Sender.fail`."""
        # By its name: where Triton looks for auto_complete_config, `pb_utils` has no errors yet.
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(error=error), last=True)

    def is_cancelled(self) -> bool:
        """As `sender.Sender.is_cancelled`."""
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
            except Exception:  # nothing else can be sent either: the backend has closed it
                _LOG.exception("a response could not be sent")


def input_arrays(request: Any) -> dict[str, np.ndarray]:
    """What a request of Triton's holds, by name; arrays of numbers are gone when it is released."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
