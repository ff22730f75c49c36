"""Errors in the form that OpenAI's clients read, and the status of each."""

from __future__ import annotations

import re
from typing import Any

from trio_deploy.errors import OutOfMemory, PromptTooLong, TrioError
from trio_deploy.pipeline.batcher.events import Cancelled, DeadlinePassed, Failed, Refused

INVALID = "invalid_request_error"
_RATE = "rate_limit_error"
_SERVER = "server_error"

# Names in the words of errors, where the API's own field is another.
_FIELDS = {
    "image": "messages",
    "images": "messages",
    "message": "messages",
    "prompt": "messages",
    "chat": "messages",
    "stop": "stop",
    "budget": "trio.budget",
    "timeout_s": "trio.timeout_s",
    "min_new_tokens": "min_tokens",
}
_OWN = (
    "messages max_tokens min_tokens temperature top_p top_k min_p seed repetition_penalty "
    "presence_penalty frequency_penalty logit_bias top_logprobs response_format structured_outputs"
).split()
_WORD = re.compile(r"(?:\d+ |an? |the )?([a-z_]+)")


class ApiError(Exception):
    """What a client is told, with a status.

    Attributes:
        kind: OpenAI's `type`.
        retry_after: seconds after which trying again may help; None: it will not.
        close: whether the connection is of no more use.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.close = close

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        return {
            "error": {
                "message": str(self).encode(errors="replace").decode(),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found | ({"Connection": "close"} if self.close else {})


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the client's."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: int) -> ApiError:
    """The server takes nothing at present, because it starts or ends."""
    return ApiError(503, message, _SERVER, code="unavailable", retry_after=retry_after, close=True)


def busy(message: str, retry_after: int) -> ApiError:
    """Too much waits already."""
    return ApiError(429, message, _RATE, code="overloaded", retry_after=retry_after)


def of_exception(error: Exception, request_id: str, retry_after: int) -> ApiError:
    """What a client is told of an exception.

    Args:
        retry_after: seconds after which there may be room again.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return busy(str(error), retry_after)
    if isinstance(error, Cancelled):
        return unavailable("the server is shutting down: ask another one", 1)
    if isinstance(error, DeadlinePassed):
        return ApiError(504, str(error), _SERVER, code="deadline_passed")
    if isinstance(error, PromptTooLong):
        return invalid(str(error), "messages", "context_length_exceeded")
    if isinstance(error, TrioError) and not isinstance(error, Failed | OutOfMemory):
        return invalid(str(error), _param(str(error)))
    return ApiError(
        500,
        f"the server failed to answer: its log has the reason at the request {request_id}",
        _SERVER,
        code="internal_error",
    )


def _param(message: str) -> str | None:
    """The field that an error's words begin with, if it is one of the API's."""
    found = _WORD.match(message)
    if found is None:
        return None
    return found[1] if found[1] in _OWN else _FIELDS.get(found[1])
