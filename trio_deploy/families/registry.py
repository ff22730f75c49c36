"""The supported model families, and config.json to `ModelConfig` by the family it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trio_deploy.config.recipe import POSITIONS
from trio_deploy.errors import TrioError
from trio_deploy.families import llava, llava_next, qwen2_vl, qwen3_vl
from trio_deploy.families.base import Family, Limits, ModelConfig, PatchTowerConfig
from trio_deploy.files import brief
from trio_deploy.quant.quantization_config import read_quantization_config
from trio_deploy.schedule.methods import encoder_scores

FAMILIES: dict[str, Family] = {
    f.name: f for f in (llava.FAMILY, llava_next.FAMILY, *qwen2_vl.FAMILIES, qwen3_vl.FAMILY)
}


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        TrioError: there is none.
    """
    if name not in FAMILIES:
        raise TrioError(f"model family {name!r} is not supported: use one of {_families()}")
    return FAMILIES[name]


def request_limits(config: ModelConfig) -> Limits:
    """The most that one image can bring to a model."""
    return get_family(config.family).request_limits(config)


def check_positions(config: ModelConfig, positions: str | None) -> str:
    """Position ids after pruning: as asked for, or None: what the family prefers.

    Raises:
        TrioError: the family has no such positions.
    """
    known = get_family(config.family).positions
    if positions is None:
        return known[0]
    if positions not in POSITIONS:
        raise TrioError(f"unknown positions {positions!r}: choose {' or '.join(known)}")
    if positions not in known:
        raise TrioError(
            f"positions {positions!r} have no meaning for {config.family}, whose tokens have a "
            f"time, a row and a column: choose {' or '.join(known)}"
        )
    return positions


def check_methods(config: ModelConfig, methods: Iterable[str]) -> None:
    """Raises TrioError where a method reads what the model's vision tower cannot tell."""
    for method in methods:
        if isinstance(config.vision, PatchTowerConfig) and encoder_scores([method]):
            raise TrioError(
                f"the method {method} reads the attention of the vision tower's class token, which "
                f"{config.family} does not have: choose another one, such as divprune"
            )


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json, whichever transformers wrote it.

    Keys that are missing get the values that transformers assumes: sub-configurations were saved
    as differences from the defaults of their model type.

    Args:
        raw: the parsed config.json.

    Raises:
        TrioError: a family, rope type, activation or option that is not supported, or a value
            that makes no sense.
    """
    if not isinstance(raw, Mapping):
        raise TrioError("config.json must hold an object")
    family = family_of(raw)
    read_quantization_config(raw)  # a form that cannot be read is known before any weight is
    return family.read(raw)


def _families() -> str:
    return ", ".join(FAMILIES)


def family_of(raw: Mapping[str, Any]) -> Family:
    """Find the family that a config.json names.

    Raises:
        TrioError: it names none that is supported.
    """
    model_type = raw.get("model_type")
    named = raw.get("architectures")
    architectures = named if isinstance(named, list) else []
    for family in FAMILIES.values():
        if model_type == family.name or (
            model_type is None and family.architecture in architectures
        ):
            return family
    found = model_type or ", ".join(map(str, architectures)) or "no model_type"
    raise TrioError(
        f"config.json describes {brief(found)}, which is not supported: use one of {_families()}; "
        "checkpoints in the original LLaVA format have converted copies on the hub under llava-hf"
    )
