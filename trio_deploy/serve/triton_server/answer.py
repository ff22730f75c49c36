"""A service's answer as the responses to a request of Triton's."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable

import numpy as np

from trio_deploy.errors import PromptTooLong, TrioError
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    Failed,
    Handle,
    Refused,
)
from trio_deploy.pipeline.request import Generation
from trio_deploy.serve.requests import ClientRequest
from trio_deploy.serve.service import Service
from trio_deploy.serve.triton_server.backend import TritonSender
from trio_deploy.serve.triton_server.request import Delivery

_LOG = logging.getLogger(__name__)
_CODES: dict[type[Exception], str] = {
    TrioError: "INVALID_ARG",
    PromptTooLong: "INVALID_ARG",
    Refused: "UNAVAILABLE",
    DeadlinePassed: "UNAVAILABLE",
    Cancelled: "CANCELLED",
    Failed: "INTERNAL",
}


class Answer:
    """Sends the responses to one request.

    Attributes:
        begun: whether there was a token.
    """

    def __init__(self, sender: TritonSender, done: Callable[[Answer], None]) -> None:
        """Args:
        done: called before the last response.
        """
        self._sender = sender
        self._done = done
        self._handle: Handle | None = None
        self._submitting = threading.Lock()
        self._delivery = Delivery()
        self.begun = False

    def submit(self, service: Service, client: ClientRequest, delivery: Delivery) -> None:
        """Have the service answer; if it does not take the request, that is the answer."""
        self._delivery = delivery
        try:
            with self._submitting:
                self._handle = service.submit(client, self._on_event)
        except Exception as error:
            self.fail(error)

    def check_cancelled(self) -> None:
        """End the answer if the client has cancelled it."""
        with self._submitting:  # the first tokens may be there before the handle is
            handle = self._handle
        if handle is not None and not handle.done and self._sender.is_cancelled():
            handle.cancel()

    def fail(self, error: Exception) -> None:
        """Send an error as the last response."""
        code = _CODES.get(type(error), "INTERNAL")
        if code == "INTERNAL":
            _LOG.error("a request failed", exc_info=error)
        text = str(error) if isinstance(error, TrioError) else f"internal error: {error!r:.200}"
        self._done(self)
        self._sender.fail(text, code)

    def _on_event(self, event: Event) -> None:
        self.begun = True
        if event.error is not None:
            self.fail(event.error)
            return
        if event.generation is not None:
            self._done(self)
            self._send(self._last_outputs(event, event.generation), last=True)
            return
        self.check_cancelled()
        if self._delivery.stream:
            self._send(_outputs(event), last=False)

    def _send(self, outputs: dict[str, np.ndarray], *, last: bool) -> None:
        if self._delivery.id:
            outputs["id"] = _string(self._delivery.id)
        self._sender.send(outputs, last=last)

    def _last_outputs(self, event: Event, generation: Generation) -> dict[str, np.ndarray]:
        if self._delivery.stream:
            return _outputs(event) | _end(generation)
        text, ids = _string(generation.text), np.array(generation.token_ids, np.int64)
        return {"text": text, "token_ids": ids} | _end(generation)


def _outputs(event: Event) -> dict[str, np.ndarray]:
    ids = [] if event.token_id is None else [event.token_id]
    return {"text": _string(event.text), "token_ids": np.array(ids, np.int64)}


def _end(generation: Generation) -> dict[str, np.ndarray]:
    """Why the answer ended, what it took (JSON with seconds, counts and bytes), any warnings."""
    timings = {
        "first_token_s": generation.first_token_s,
        "tokens_per_s": generation.tokens_per_s,
        "stages": generation.timings,
        "prompt_tokens": generation.prompt_tokens,
        "visual_tokens": generation.visual_tokens,
        "kept_tokens": generation.keep_counts,
        "kv_bytes": generation.kv_bytes,
    }
    outputs = {
        "finish_reason": _string(generation.finish_reason),
        "timings": _string(json.dumps(timings)),
    }
    if generation.warnings:
        outputs["warnings"] = _string(*generation.warnings)
    return outputs


def _string(*texts: str) -> np.ndarray:
    # A tokenizer may produce half of a surrogate pair, which has no bytes: it is replaced.
    return np.array([text.encode(errors="replace") for text in texts], np.object_)
