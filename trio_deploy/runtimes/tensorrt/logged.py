"""Scratch memory that NVIDIA's compiler logged for a model's engines: data/tensorrt/compiled.json.

`scripts/compile_stages.py --out` writes it, without a GPU. A figure belongs to one model, schedule,
form of the graphs and limits; elsewhere only the bound of `memory.py` is known.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import resources

import msgspec

from trio_deploy.config.target import Target
from trio_deploy.families.base import ModelConfig
from trio_deploy.schedule.schedule import Schedule

FILE = "data/tensorrt/compiled.json"


class Logged(msgspec.Struct, frozen=True):
    """What was logged for one model.

    Attributes:
        about: the model, its graphs and the limits, in words.
        compiler: name and version.
        scratch_bytes: of the engine that needs the most.
        key: `key_of` the model, its schedule and the target.
    """

    about: str
    compiler: str
    scratch_bytes: int
    key: str


def key_of(config: ModelConfig, schedule: Schedule, target: Target) -> str:
    """A digest of all that decides how large the intermediate results of engines are."""
    form = (
        target.dialect,
        target.dtype,
        target.decode_layout,
        target.weights,
        target.quantize,
        *((target.selections,) if target.selections == "float" else ()),
    )
    facts = msgspec.json.encode([config, schedule.points, form, target.limits], order="sorted")
    return hashlib.sha256(facts).hexdigest()[:16]


def logged(config: ModelConfig, schedule: Schedule, target: Target) -> Logged | None:
    """What was logged for a model on a target; None: nothing."""
    return _table().get(key_of(config, schedule, target))


def written(known: str, entry: Logged) -> str:
    """The table `known` with an entry in the place of what was logged for the same."""
    entries = {each.key: each for each in msgspec.json.decode(known, type=list[Logged])}
    entries[entry.key] = entry
    ordered = sorted(entries.values(), key=lambda each: each.about)
    return msgspec.json.format(msgspec.json.encode(ordered), indent=1).decode() + "\n"


@lru_cache(maxsize=1)
def _table() -> dict[str, Logged]:
    text = resources.files("trio_deploy").joinpath(FILE).read_bytes()
    return {each.key: each for each in msgspec.json.decode(text, type=list[Logged])}
