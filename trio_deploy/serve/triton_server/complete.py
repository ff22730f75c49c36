"""`trio_vlm_complete`, for Triton's python backend: one whole answer per plain inference request.

It loads no model. A thread per request forwards it to `trio_vlm`, whose batch answers it, so that
one instance serves many at once.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trio_deploy.errors import TrioError
from trio_deploy.serve.triton_server.backend import (
    TritonSender,
    configured_outputs,
    input_arrays,
)
from trio_deploy.serve.triton_server.local_socket import InferRequest, LocalClient, Reply
from trio_deploy.serve.triton_server.request import nbytes, read_parameters
from trio_deploy.serve.triton_server.sender import Sender
from trio_deploy.serve.triton_server.watch import Watch

_LOG = logging.getLogger(__name__)
_GRACE_S = 10.0  # after a request's deadline, for the model to report it
_MAX_REQUESTS = 80  # what `trio_vlm` takes by default: 16 rows and a queue of 64
_MAX_BYTES = 512 * 2**20  # two of the largest requests by default: 8 pictures of 20 MiB in base64


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the parameters.

        `model`: the model that answers; `max_requests`: requests forwarded at once; `max_bytes`:
        bytes of their inputs together, which are kept until they are answered; `watch`.

        Raises:
            TritonModelException: a limit is not a number above 0.
        """
        given = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in given.items()}
        self._model = values.get("model", "trio_vlm")
        self._max_requests = _limit(values, "max_requests", _MAX_REQUESTS)
        self._max_bytes = _limit(values, "max_bytes", _MAX_BYTES)
        self._outputs = configured_outputs(args)
        self._pool = ThreadPoolExecutor(self._max_requests, thread_name_prefix="trio-forward")
        self._open: dict[Sender, int] = {}  # bytes of the requests under way
        self._client = LocalClient(self._model)
        watched = values.get("watch", "true").lower() != "false"
        self._watch = Watch(args["model_name"]) if watched else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Forward requests; each is answered when its answer is there."""
        for request in requests:
            sender = TritonSender(request, self._outputs)
            try:
                arrays = input_arrays(request)
                size = sum(map(nbytes, arrays.values()))
                if refusal := self._refusal(size):
                    sender.fail(refusal, "UNAVAILABLE")
                    continue
                parameters = read_parameters(request.parameters()) | {"stream": False}
                # Copies, since the request's arrays are freed when `execute` ends.
                copies = {name: np.array(array) for name, array in arrays.items()}
                forwarded = InferRequest(copies, json.dumps(parameters), request.timeout())
                self._open[sender] = size
                try:
                    self._pool.submit(self._forward, sender, forwarded)
                except Exception:  # no thread can be started
                    del self._open[sender]
                    raise
            except TrioError as error:
                sender.fail(str(error), "INVALID_ARG")
            except Exception as error:  # nothing that a client sends may end the instance
                _LOG.exception("a request failed")
                sender.fail(f"internal error: {error!r:.200}", "INTERNAL")

    def finalize(self) -> None:
        """Wait for the requests under way."""
        if self._watch is not None:
            self._watch.close()
        self._pool.shutdown()

    def _refusal(self, size: int) -> str | None:
        """Why a request of so many bytes is refused; None if it is forwarded."""
        open_sizes = list(self._open.values())
        if len(open_sizes) >= self._max_requests:
            return f"max_requests = {self._max_requests} requests are under way: try again later"
        # A single larger request is checked by the other model.
        if open_sizes and sum(open_sizes) + size > self._max_bytes:
            return (
                f"the request has {size} bytes and those under way {sum(open_sizes)}, but "
                f"max_bytes is {self._max_bytes}: try again later"
            )
        return None

    def _forward(self, sender: Sender, request: InferRequest) -> None:
        try:
            timeout_s = _deadline_s(request) + _GRACE_S
            reply = self._client.infer(request, sender.is_cancelled, timeout_s)
        except (EOFError, OSError) as error:
            text = f"{self._model} could not be reached: {error or 'it has ended'}"
            reply = Reply({}, text, "UNAVAILABLE")
        except Exception as error:
            _LOG.exception("forwarding to %s failed", self._model)
            reply = Reply({}, f"internal error: {error!r:.200}", "INTERNAL")
        del self._open[sender]
        if reply.error:
            sender.fail(reply.error, reply.code)
        else:
            sender.send(reply.outputs, last=True)


def _limit(values: Mapping[str, str], name: str, default: int) -> int:
    try:
        number = int(values.get(name, default))
    except ValueError:
        number = 0
    if number < 1:
        raise pb_utils.TritonModelException(f"{name} must be a whole number above 0")
    return number


def _deadline_s(request: InferRequest) -> float:
    """Seconds until the deadline that the request asks for; the model has a limit of its own."""
    given = [request.timeout_us / 1e6] if request.timeout_us else []
    asked = request.tensors.get("timeout_s")
    if asked is not None and asked.size == 1:
        given.append(float(asked.item()))
    return min((seconds for seconds in given if seconds > 0), default=math.inf)
