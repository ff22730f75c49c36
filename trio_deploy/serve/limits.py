"""Limits of a service: per request, of all requests together, and of the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.families.pixels import MAX_PIXELS
from trio_deploy.files import brief, read_yaml
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.runtimes.registry import MAX_THREADS
from trio_deploy.schedule.budget import check_budget, read_budget

_BUDGET = "budget"

# A larger number is a typing error, and would exhaust the machine's threads or memory.
_MAXIMA = {
    "threads": MAX_THREADS,
    "prefillers": 256,
    "preparers": 256,
    "max_rows": 4096,
    "max_queue": 65_536,
    "max_images": 4096,
    "max_timeout_s": 86_400,
    "max_image_pixels": MAX_PIXELS,
}

# Types that a number may have in Python by the kind of its setting, and what they are called.
_NUMBERS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


@dataclass(frozen=True)
class ServiceLimits:
    """What a service accepts.

    Attributes:
        budget: budget of requests that name none; None: the bundle's own schedule.
        default_max_tokens: tokens of answers to requests that name no number; its default is
            lowered to `max_tokens`.
        max_tokens: tokens per answer.
        max_images: pictures per request.
        max_image_bytes, max_image_pixels: bytes per picture's file, pixels per decoded picture.
        max_request_pixels: pixels of all pictures of a request.
        max_prompt_bytes: bytes of the prompt, or of the messages' JSON.
        max_stop, max_stop_bytes: stop strings per request, bytes per stop string or bad word.
        max_banned: most tokens in suppress_tokens and logit_bias, and most bad words, per request.
        max_schema_bytes: bytes of the form that a request asks of its answer.
        max_timeout_s: longest deadline, and the deadline of requests that name none, seconds.
        max_queue_bytes: bytes of texts, pictures and what the tower takes of them, of all requests
            that wait or run.
        vision_cache_bytes: bytes of what the vision tower made of pictures, kept for other
            questions about them, beside `max_queue_bytes`; 0 keeps nothing.
        batcher: limits of the batch and its queue.
    """

    budget: float | None = None
    default_max_tokens: int = 128
    max_tokens: int = 1024
    max_images: int = 8
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 25_000_000
    max_request_pixels: int = 100_000_000
    max_prompt_bytes: int = 2**16
    max_stop: int = 8
    max_stop_bytes: int = 256
    max_banned: int = 256
    max_schema_bytes: int = 2**16
    max_timeout_s: float = 300.0
    max_queue_bytes: int = 512 * 2**20
    vision_cache_bytes: int = 256 * 2**20
    batcher: BatcherLimits = field(default_factory=BatcherLimits)

    def __post_init__(self) -> None:
        """Raises TrioError for limits out of range, of a wrong type, or that contradict others."""
        for name, kind in setting_kinds(type(self)).items():
            if (value := getattr(self, name)) is not None:
                types, what = _NUMBERS[kind]
                if type(value) not in types:
                    raise TrioError(f"{name} must be {what}, got {brief(value)}")
                if name == _BUDGET:
                    check_budget(value)
                else:
                    _check_range(name, value)
        if self.default_max_tokens <= self.max_tokens:
            return
        if self.default_max_tokens != type(self).default_max_tokens:
            raise TrioError(f"default_max_tokens must be at most max_tokens = {self.max_tokens}")
        object.__setattr__(self, "default_max_tokens", self.max_tokens)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any]) -> ServiceLimits:
        """Limits from values by name, those of the batcher among them.

        Raises:
            TrioError: a value is out of range.
        """
        own = {name: values[name] for name in setting_kinds(cls) if name in values}
        batcher = {name: values[name] for name in setting_kinds(BatcherLimits) if name in values}
        return cls(**own, batcher=BatcherLimits(**batcher))


def setting_kinds(*structs: type) -> dict[str, str]:
    """Settings that the fields of dataclasses make: kind by name, `str`, `int`, `float` or `bool`.

    Fields of other kinds are left out.
    """
    kinds = {
        each.name: str(each.type).split(" | ")[0]
        for struct in structs
        for each in dataclasses.fields(struct)
    }
    return {name: kind for name, kind in kinds.items() if kind in _READERS}


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, str]:
    """Read settings from a YAML file of names and values and from `NAME=VALUE` texts.

    The texts override the file. Names and values are checked by what they are for.

    Raises:
        TrioError: the file cannot be read, or a text does not have that form.
    """
    settings: dict[str, str] = {}
    if file is not None:
        try:
            raw = read_yaml(file, "correct the file")
        except FileNotFoundError:
            raise TrioError(f"there is no file {file}: name one that exists") from None
        if not isinstance(raw, dict) or any(isinstance(v, dict | list) for v in raw.values()):
            raise TrioError(f"{file} must have one name and value per line: write max_tokens: 512")
        for name, value in raw.items():
            settings[str(name)] = str(value).lower() if isinstance(value, bool) else str(value)
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise TrioError(f"--set takes NAME=VALUE, as in --set max_tokens=512, not {text!r}")
        settings[name] = value
    return settings


def parse_settings(settings: Mapping[str, str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Values of settings given as text; an empty text counts as not given.

    Args:
        kinds: as from `setting_kinds`.

    Raises:
        TrioError: an unknown name, or a value that is not of its kind or out of range.
    """
    unknown = sorted(set(settings) - set(kinds))
    if unknown:
        raise TrioError(f"unknown parameter {unknown[0]!r}: there are {', '.join(sorted(kinds))}")
    return {name: _READERS[kinds[name]](name, text) for name, text in settings.items() if text}


def _check_range(name: str, value: float) -> None:
    """Raises TrioError for a number that a setting of this name cannot have."""
    if isinstance(value, float) and not (math.isfinite(value) and value > 0):
        raise TrioError(f"{name} must be above 0, got {value}")
    minimum = 0 if name in ("prefillers", "vision_cache_bytes") else 1
    if isinstance(value, int) and not minimum <= value < 2**63:
        raise TrioError(f"{name} must be {minimum} or more, got {brief(value)}")
    if value > _MAXIMA.get(name, value):
        raise TrioError(f"{name} must be at most {_MAXIMA[name]}, got {value:.12g}")


def _text(name: str, text: str) -> str:
    return text


def _count(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise TrioError(f"{name} must be a whole number, got {text!r:.40}") from None
    _check_range(name, number)
    return number


def _number(name: str, text: str) -> float:
    if name == _BUDGET:
        return read_budget(text)
    try:
        number = float(text)
    except ValueError:
        raise TrioError(f"{name} must be a number, got {text!r:.40}") from None
    _check_range(name, number)
    return number


def _flag(name: str, text: str) -> bool:
    flags = {"true": True, "false": False}
    if text.lower() not in flags:
        raise TrioError(f"{name} must be true or false, got {text!r:.40}")
    return flags[text.lower()]


_READERS: dict[str, Callable[[str, str], Any]] = {
    "str": _text,
    "int": _count,
    "float": _number,
    "bool": _flag,
}
