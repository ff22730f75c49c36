"""Parameters of a served model: limits of requests and of the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.families.pixels import MAX_PIXELS
from trio_deploy.runtimes.registry import check_options

# Beyond these a number is a slip of the pen, and would end in a machine without threads or memory.
_MOST = {
    "threads": 1024,
    "prefillers": 256,
    "preparers": 256,
    "max_rows": 4096,
    "max_queue": 65_536,
    "max_images": 4096,
    "max_timeout_s": 86_400.0,
}


@dataclass(frozen=True)
class Settings:
    """Parameters of a `trio_vlm` model, from the strings of its config.pbtxt.

    Attributes:
        bundle: its folder, absolute or relative to the model's.
        runtime, target, provider, precision, threads, low_memory: as in
            `Pipeline.open`; a target's file may be relative to the model's folder, too.
        budget: of requests that name none; None is the bundle's own schedule.
        default_max_tokens: of requests that name none, at most `max_tokens`.
        max_tokens: of an answer.
        max_images, max_image_bytes, max_image_pixels: pictures of a request, the bytes of each
            file, and its pixels once decoded.
        max_request_pixels: of all pictures of a request.
        max_queue_bytes: of texts, pictures and their tiles of all requests that wait or run.
        max_prompt_bytes: of the prompt, or of the messages' JSON.
        max_prompt_tokens: visual ones included; None is the model's context.
        max_stop, max_stop_bytes: stop strings of a request, and the length of each.
        max_timeout_s: the longest deadline, and that of requests that name none.
        max_rows, max_queue, prefill_rows, prefill_tokens, max_kv_bytes, prefillers, preparers: as
            in `Batcher`.
        warm_up: answer questions, within these limits, before the model is ready.
        watch: end the server when the model's process dies; see `triton/watch.py`.
    """

    bundle: str
    runtime: str | None = None
    target: str | None = None
    provider: str | None = None
    precision: str | None = None
    threads: int | None = None
    low_memory: bool = False
    budget: float | None = None
    default_max_tokens: int = 128
    max_tokens: int = 1024
    max_images: int = 8
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 25_000_000
    max_request_pixels: int = 100_000_000
    max_prompt_bytes: int = 2**16
    max_prompt_tokens: int | None = None
    max_stop: int = 8
    max_stop_bytes: int = 256
    max_timeout_s: float = 300.0
    max_rows: int = 16
    max_queue: int = 64
    max_queue_bytes: int = 512 * 2**20
    prefill_rows: int = 4
    prefill_tokens: int = 4096
    max_kv_bytes: int | None = None
    prefillers: int = 0
    preparers: int = 2
    warm_up: bool = True
    watch: bool = True

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Settings:
        """Read parameters; an empty string is as good as none.

        Raises:
            TrioError: an unknown name, a value that is not of its kind or out of range.
        """
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        unknown = sorted(set(parameters) - set(kinds))
        if unknown:
            raise TrioError(
                f"unknown parameter {unknown[0]!r}: there are {', '.join(sorted(kinds))}"
            )
        if not parameters.get("bundle"):
            raise TrioError("the parameter 'bundle' must name the folder of the bundle")
        values = {
            name: _READERS[kinds[name].removesuffix(" | None")](name, value)
            for name, value in parameters.items()
            if value != ""
        }
        for name, most in _MOST.items():
            if values.get(name, 0) > most:
                raise TrioError(f"{name} must be at most {most:g}, got {values[name]}")
        asked = (field.name for field in dataclasses.fields(RuntimeOptions))
        check_options(RuntimeOptions(**{name: values[name] for name in asked if name in values}))
        if values.get("budget", 1.0) > 1.0:
            raise TrioError(f"budget must be at most 1, got {values['budget']}")
        if values.get("max_image_pixels", 1) > MAX_PIXELS:
            raise TrioError(f"max_image_pixels must be at most {MAX_PIXELS}")
        tokens = values.get("max_tokens", cls.max_tokens)
        if values.setdefault("default_max_tokens", min(cls.default_max_tokens, tokens)) > tokens:
            raise TrioError(f"default_max_tokens must be at most max_tokens = {tokens}")
        return cls(**values)


def check_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """The same parameters, once they are known to be right.

    Raises:
        TrioError: as `Settings.parse`.
    """
    Settings.parse(parameters)
    return dict(parameters)


def _text(name: str, value: str) -> str:
    return value


def _count(name: str, value: str) -> int:
    least = 0 if name == "prefillers" else 1
    try:
        number = int(value)
    except ValueError:
        raise TrioError(f"{name} must be a whole number, got {value!r:.40}") from None
    if not least <= number < 2**63:
        raise TrioError(f"{name} must be {least} or more, got {value:.40}")
    return number


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise TrioError(f"{name} must be a number, got {value!r:.40}") from None
    if not (math.isfinite(number) and number > 0):
        raise TrioError(f"{name} must be above 0, got {value:.40}")
    return number


def _flag(name: str, value: str) -> bool:
    flags = {"true": True, "false": False}
    if value.lower() not in flags:
        raise TrioError(f"{name} must be true or false, got {value!r:.40}")
    return flags[value.lower()]


_READERS: dict[str, Callable[[str, str], Any]] = {
    "str": _text,
    "int": _count,
    "float": _number,
    "bool": _flag,
}
