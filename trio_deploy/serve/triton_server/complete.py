"""`trio_vlm_complete`, for Triton's python backend: one whole answer for a plain inference request.

It holds no model. Each request goes on to `trio_vlm`, in whose batch it is answered, on a thread of
its own, so that one instance serves many at once.
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

from trio_deploy.serve.triton_server.backend import TritonSender, input_arrays
from trio_deploy.serve.triton_server.local_socket import Ask, LocalClient, Reply
from trio_deploy.serve.triton_server.request import nbytes
from trio_deploy.serve.triton_server.sender import Sender
from trio_deploy.serve.triton_server.watch import Watch

_LOG = logging.getLogger(__name__)
_GRACE_S = 10.0  # after a request's deadline, for the model to say that it is over
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
        self._open: dict[Sender, int] = {}  # bytes of the requests under way
        self._client = LocalClient(self._model)
        watched = values.get("watch", "true").lower() != "false"
        self._watch = Watch(args["model_name"]) if watched else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Pass requests on; each is answered when its answer is there."""
        for request in requests:
            sender = TritonSender(request)
            try:
                if len(self._open) >= self._most:
                    text = f"max_requests = {self._most} requests are under way; try again later"
                    sender.fail(text, "UNAVAILABLE")
                    continue
                # Arrays of our own, since the request's go when `execute` ends.
                arrays = {name: np.array(array) for name, array in input_arrays(request).items()}
                size = sum(map(nbytes, arrays.values()))
                held = sum(list(self._open.values()))
                # A single one that is larger is for the other model to judge.
                if self._open and held + size > self._most_bytes:
                    text = (
                        f"the request has {size} bytes and those under way {held}, but max_bytes "
                        f"is {self._most_bytes}; try again later"
                    )
                    sender.fail(text, "UNAVAILABLE")
                    continue
                parameters = json.loads(request.parameters() or "{}")
                ask = Ask(arrays, json.dumps({**parameters, "stream": False}), request.timeout())
                self._open[sender] = size
                try:
                    self._pool.submit(self._forward, sender, ask)
                except Exception:  # there is no thread to be had
                    del self._open[sender]
                    raise
            except Exception as error:  # nothing that a client sends may end the instance
                _LOG.exception("a request failed")
                sender.fail(f"internal error: {error!r:.200}", "INTERNAL")

    def finalize(self) -> None:
        """Wait for what is under way."""
        if self._watch is not None:
            self._watch.close()
        self._pool.shutdown()

    def _forward(self, sender: Sender, ask: Ask) -> None:
        try:
            reply = self._client.ask(ask, sender.is_cancelled, _deadline_s(ask) + _GRACE_S)
        except (EOFError, OSError) as error:
            text = f"{self._model} could not be asked: {error or 'it has ended'}"
            reply = Reply({}, text, "UNAVAILABLE")
        except Exception as error:
            _LOG.exception("asking %s failed", self._model)
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


def _deadline_s(ask: Ask) -> float:
    """What the request itself names; the model has a limit of its own."""
    given = [ask.timeout_us / 1e6] if ask.timeout_us else []
    if "timeout_s" in ask.tensors and ask.tensors["timeout_s"].size == 1:
        given.append(float(ask.tensors["timeout_s"].item()))
    return min((seconds for seconds in given if seconds > 0), default=math.inf)
