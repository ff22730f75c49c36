"""What a client sent, checked and turned into a request of the pipeline.

Pictures come as the bytes of a file and in no other way: no text of a client's becomes a path.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.families.pixels import image_size
from trio_deploy.pipeline.chat import Message
from trio_deploy.pipeline.request import Request
from trio_deploy.pipeline.sampling import Sampling
from trio_deploy.serve.limits import Settings

#: Inputs of both models by name, all of them optional: (kind, elements); −1 is any number.
INPUTS: dict[str, tuple[str, int]] = {
    "prompt": ("string", 1),
    "messages": ("string", 1),
    "images": ("string", -1),
    "images_base64": ("string", -1),
    "max_tokens": ("int32", 1),
    "temperature": ("float64", 1),
    "top_p": ("float64", 1),
    "seed": ("int64", 1),
    "stop": ("string", -1),
    "budget": ("float64", 1),
    "timeout_s": ("float64", 1),
}

#: Outputs of both models, likewise.
OUTPUTS: dict[str, tuple[str, int]] = {
    "text": ("string", 1),
    "token_ids": ("int64", -1),
    "finish_reason": ("string", 1),
    "timings": ("string", 1),
}

# A JPEG file may go over all of its picture again and again, with a few bytes a time: a hundred
# kilobytes can keep a decoder busy for many seconds. Cameras and tools make about ten scans; a
# hundred is what libtiff takes.
_MOST_SCANS = 100
_JPEG = b"\xff\xd8\xff"
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A request, and how it wants to be answered.

    Attributes:
        timeout_s: seconds until its deadline.
        stream: a response for each token, rather than one for all.
    """

    request: Request
    timeout_s: float
    stream: bool


def nbytes(array: np.ndarray) -> int:
    """Bytes of an input; strings are bytes in an object array."""
    return sum(map(len, array.ravel())) if array.dtype == np.object_ else array.nbytes


def read(
    tensors: Mapping[str, np.ndarray], parameters: str, timeout_us: int, settings: Settings
) -> Question:
    """Check a request.

    Args:
        tensors: inputs by name; strings as Triton gives them, bytes in an object array.
        parameters: the request's own parameters, a JSON object.
        timeout_us: Triton's timeout of the request, microseconds; 0 is none.

    Raises:
        TrioError: what is wrong; a limit is called by its name.
    """
    for name in tensors:
        if name not in INPUTS:
            raise TrioError(f"unknown input {name!r}: there are {', '.join(INPUTS)}")
    images = _images(tensors, settings)
    sampling = Sampling(
        _scalar(tensors, "temperature", 0.0),
        _scalar(tensors, "top_p", 1.0),
        _scalar(tensors, "seed", None),
    )
    request = Request(
        _prompt(tensors, settings),
        images,
        max_new_tokens=_max_tokens(tensors, settings),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=_stop(tensors, settings),
        budget=_budget(tensors, settings),
    )
    return Question(request, _timeout(tensors, timeout_us, settings), _streams(parameters))


def _prompt(tensors: Mapping[str, np.ndarray], settings: Settings) -> str | list[Message]:
    given = [name for name in ("prompt", "messages") if name in tensors]
    if len(given) != 1:
        raise TrioError("give either prompt or messages" + (", not both" if given else ""))
    name = given[0]
    (raw,) = _strings(tensors, name)
    if len(raw) > settings.max_prompt_bytes:
        raise TrioError(
            f"{name} has {len(raw)} bytes, but max_prompt_bytes is {settings.max_prompt_bytes}"
        )
    text = _decode(raw, name)
    return text if name == "prompt" else _messages(text)


def _messages(text: str) -> list[Message]:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrioError(f"messages is not JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(messages, list) or not messages:
        raise TrioError('messages must be a JSON list of {"role": ..., "content": ...}')
    return [_message(message) for message in messages]


def _message(message: Any) -> Message:
    """Rebuilt from what a chat template may see, so that nothing else gets there."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise TrioError('a message must be {"role": ..., "content": ...} and nothing else')
    content = message["content"]
    if isinstance(content, list):
        return {"role": _unicode(message["role"], "role"), "content": [*map(_item, content)]}
    return {
        "role": _unicode(message["role"], "role"),
        "content": _unicode(content, "content (or a list of items)"),
    }


def _item(item: Any) -> dict[str, str]:
    if isinstance(item, dict) and item.get("type") == "image" and len(item) == 1:
        return {"type": "image"}
    if isinstance(item, dict) and item.get("type") == "text" and set(item) == {"type", "text"}:
        return {"type": "text", "text": _unicode(item["text"], "text")}
    raise TrioError(
        'a content item must be {"type": "text", "text": "..."} or {"type": "image"}; pictures '
        "themselves go into the input images or images_base64"
    )


def _unicode(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TrioError(f"a message's {what} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise TrioError(f"a message's {what} is not valid Unicode") from None
    return value


def _images(tensors: Mapping[str, np.ndarray], settings: Settings) -> list[bytes]:
    if "images" in tensors and "images_base64" in tensors:
        raise TrioError("give either images or images_base64, not both")
    name = "images_base64" if "images_base64" in tensors else "images"
    files = _strings(tensors, name) if name in tensors else []
    if len(files) > settings.max_images:
        raise TrioError(f"{len(files)} images, but max_images is {settings.max_images}")
    images, pixels = [], 0
    for number, data in enumerate(files):
        size = len(data) if name == "images" else len(data) // 4 * 3 - data[-2:].count(b"=")
        if size > settings.max_image_bytes:
            raise TrioError(
                f"image {number} has {size} bytes, but max_image_bytes is "
                f"{settings.max_image_bytes}"
            )
        if name == "images_base64":
            try:
                data = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise TrioError(
                    f"image {number} is not base64 (without line breaks or a data: prefix): {error}"
                ) from None
        try:
            width, height = image_size(data)
        except TrioError as error:
            raise TrioError(f"image {number}: {error}") from None
        if width * height > settings.max_image_pixels:
            raise TrioError(
                f"image {number} has {width} x {height} pixels, but max_image_pixels is "
                f"{settings.max_image_pixels}"
            )
        pixels += width * height
        if pixels > settings.max_request_pixels:
            raise TrioError(
                f"images 0 to {number} have {pixels} pixels, but max_request_pixels is "
                f"{settings.max_request_pixels} of all images together"
            )
        if (scans := _jpeg_scans(data)) > _MOST_SCANS:
            raise TrioError(
                f"image {number} is a JPEG file of {scans} scans, but at most {_MOST_SCANS} are "
                "decoded: save it as a baseline JPEG"
            )
        images.append(data)
    return images


def _jpeg_scans(data: bytes) -> int:
    """Scans of a JPEG file up to its end (phones put a film behind it); 0 for other files."""
    if not data.startswith(_JPEG):
        return 0
    scans, at = 0, 2
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        # A segment says how long it is, two bytes for that included; a scan's data follows its own.
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _max_tokens(tensors: Mapping[str, np.ndarray], settings: Settings) -> int:
    tokens = _scalar(tensors, "max_tokens", settings.default_max_tokens)
    if not 1 <= tokens <= settings.max_tokens:
        raise TrioError(f"max_tokens must be 1 to {settings.max_tokens}, got {tokens}")
    return tokens


def _stop(tensors: Mapping[str, np.ndarray], settings: Settings) -> list[str]:
    stops = _strings(tensors, "stop") if "stop" in tensors else []
    if len(stops) > settings.max_stop:
        raise TrioError(f"{len(stops)} stop strings, but max_stop is {settings.max_stop}")
    for stop in stops:
        if not 0 < len(stop) <= settings.max_stop_bytes:
            raise TrioError(
                f"a stop string has {len(stop)} bytes, but it must have 1 to max_stop_bytes = "
                f"{settings.max_stop_bytes}"
            )
    return [_decode(stop, "stop") for stop in stops]


def _budget(tensors: Mapping[str, np.ndarray], settings: Settings) -> float | None:
    budget = _scalar(tensors, "budget", settings.budget)
    if budget is not None and not 0.0 < budget <= 1.0:
        raise TrioError(f"budget must be above 0 and at most 1, got {budget}")
    return budget


def _timeout(tensors: Mapping[str, np.ndarray], timeout_us: int, settings: Settings) -> float:
    most = settings.max_timeout_s
    timeout = _scalar(tensors, "timeout_s", most)
    if not 0.0 < timeout <= most:
        raise TrioError(f"timeout_s must be above 0 and at most max_timeout_s = {most}")
    return min(timeout, timeout_us / 1e6) if timeout_us else timeout


def _streams(parameters: str) -> bool:
    try:
        given = json.loads(parameters) if parameters else {}
    except ValueError as error:
        raise TrioError(f"the request's parameters are not JSON: {error}") from None
    stream = given.pop("stream", True)
    if not isinstance(stream, bool):
        raise TrioError(f"the parameter stream must be true or false, got {stream!r:.40}")
    if given:
        raise TrioError(
            f"unknown parameter {sorted(given)[0]!r:.80}: inputs are {', '.join(INPUTS)}, and the "
            "only parameter is stream"
        )
    return stream


def _scalar(tensors: Mapping[str, np.ndarray], name: str, default: Any) -> Any:
    if name not in tensors:
        return default
    array, kind = tensors[name], INPUTS[name][0]
    if array.size != 1 or array.dtype != np.dtype(kind):
        raise TrioError(f"{name} must be one {kind}, got {array.dtype} {list(array.shape)}")
    value = array.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise TrioError(f"{name} must be a finite number, got {value}")
    return value


def _strings(tensors: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    array, count = tensors[name], INPUTS[name][1]
    if array.ndim != 1 or (count != -1 and array.size != count):
        shape = "a list of strings" if count == -1 else "one string"
        raise TrioError(f"{name} must be {shape}, got shape {list(array.shape)}")
    values = array.tolist()
    if not all(isinstance(value, bytes) for value in values):
        raise TrioError(f"{name} must hold bytes, got {array.dtype}")
    return values


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TrioError(f"{name} is not UTF-8") from None
