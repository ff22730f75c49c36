"""Inputs of Triton's as a request of the service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.files import brief, parse_json
from trio_deploy.serve.requests import ClientRequest

#: Inputs by name, all of them optional: (kind, elements); −1: any number.
INPUTS: dict[str, tuple[str, int]] = {
    "prompt": ("string", 1),
    "messages": ("string", 1),
    "images": ("string", -1),
    "images_base64": ("string", -1),
    "max_tokens": ("int32", 1),
    "min_tokens": ("int32", 1),
    "temperature": ("float64", 1),
    "top_k": ("int32", 1),
    "top_p": ("float64", 1),
    "min_p": ("float64", 1),
    "repetition_penalty": ("float64", 1),
    "presence_penalty": ("float64", 1),
    "frequency_penalty": ("float64", 1),
    "no_repeat_ngram_size": ("int32", 1),
    "suppress_tokens": ("int64", -1),
    "bad_words": ("string", -1),
    "seed": ("int64", 1),
    "stop": ("string", -1),
    "budget": ("float64", 1),
    "timeout_s": ("float64", 1),
}

#: Outputs, likewise.
OUTPUTS: dict[str, tuple[str, int]] = {
    "text": ("string", 1),
    "token_ids": ("int64", -1),
    "finish_reason": ("string", 1),
    "timings": ("string", 1),
    "warnings": ("string", -1),
    "id": ("string", 1),
}

_MAX_ID = 256  # characters


@dataclass(frozen=True)
class Delivery:
    """How a request wants its answer.

    Attributes:
        stream: a response per token rather than one for all.
        id: what the client calls the request, sent back with each response; empty: nothing.
    """

    stream: bool = True
    id: str = ""


def read(
    tensors: Mapping[str, np.ndarray], parameters: str, timeout_us: int
) -> tuple[ClientRequest, Delivery]:
    """Read a request.

    Args:
        tensors: inputs by name; strings as Triton gives them, bytes in an object array.
        parameters: the request's own parameters, a JSON object.
        timeout_us: Triton's timeout of the request, microseconds; 0: none.

    Returns:
        The request, and how it wants its answer.

    Raises:
        TrioError: an input is unknown, or of the wrong kind.
    """
    for name in tensors:
        if name not in INPUTS:
            raise TrioError(f"unknown input {name!r}: there are {', '.join(INPUTS)}")
    client = ClientRequest(
        **{name: _value(name, array) for name, array in tensors.items()},
        transport_timeout_s=timeout_us / 1e6 if timeout_us else None,
    )
    return client, _delivery(parameters)


def _value(name: str, array: np.ndarray) -> Any:
    kind, count = INPUTS[name]
    if kind != "string":
        wrong = array.ndim != 1 if count == -1 else array.size != 1
        if wrong or array.dtype != np.dtype(kind):
            needed = f"a list of {kind}" if count == -1 else f"one {kind}"
            raise TrioError(f"{name} must be {needed}, got {array.dtype} {list(array.shape)}")
        return array.tolist() if count == -1 else array.item()
    if array.ndim != 1 or (count != -1 and array.size != count):
        shape = "a list of strings" if count == -1 else "one string"
        raise TrioError(f"{name} must be {shape}, got shape {list(array.shape)}")
    values = array.tolist()
    if not all(isinstance(value, bytes) for value in values):
        raise TrioError(f"{name} must be bytes, got {array.dtype}")
    return values if count == -1 else values[0]


def _delivery(parameters: str) -> Delivery:
    given = parse_json(parameters or "{}", "the request's parameters", "send an object")
    if not isinstance(given, dict):
        raise TrioError(f"the request's parameters must be an object, not {brief(given)}")
    stream = given.pop("stream", True)
    if not isinstance(stream, bool):
        raise TrioError(f"the parameter stream must be true or false, got {stream!r:.40}")
    # Triton makes a parameter of the "id" of a generate request.
    name = given.pop("id", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise TrioError(f"id must be a whole number or a text, got {brief(name)}")
    if given:
        raise TrioError(
            f"unknown parameter {sorted(given)[0]!r:.80}: inputs are {', '.join(INPUTS)}, and the "
            "only parameters are id and stream"
        )
    text = str(name)
    if len(text) > _MAX_ID:
        raise TrioError(f"id has {len(text)} characters, but it may have {_MAX_ID}")
    return Delivery(stream, text)
