"""The supported model families, and config.json to `ModelConfig` by the family it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.families import llava, llava_next
from trio_deploy.families.base import Family, Limits, ModelConfig
from trio_deploy.families.hf_config import (
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    _activation,
    _given,
    _pinpoints,
    _section,
    _text,
    _vision,
)

FAMILIES: dict[str, Family] = {f.name: f for f in (llava.FAMILY, llava_next.FAMILY)}


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        TrioError: there is none.
    """
    if name not in FAMILIES:
        raise TrioError(
            f"Model family {name!r} is not supported; the supported ones are {_families()}."
        )
    return FAMILIES[name]


def request_limits(config: ModelConfig) -> Limits:
    """The most that one image can bring to a model."""
    return get_family(config.family).request_limits(config)


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
        raise TrioError("config.json must hold an object.")
    family = _family(raw)
    if raw.get("quantization_config"):
        raise TrioError(
            "The checkpoint is quantised (quantization_config in config.json); use the fp32, fp16 "
            "or bf16 checkpoint it was made from."
        )
    top = {**family.defaults, **_given(raw)}
    text_raw = _section(raw, "text_config", "llama", TEXT_DEFAULTS, {})
    vision = _vision(
        _section(
            raw, "vision_config", "clip_vision_model", VISION_DEFAULTS, family.vision_defaults
        ),
        top,
    )
    if family.tiled and not vision.drop_cls:
        raise TrioError(
            f"vision_feature_select_strategy 'full' does not work with the tiles of {family.name}; "
            "only 'default' does."
        )
    tied = bool(top["tie_word_embeddings"]) or (
        family.tie_from_text and bool(text_raw["tie_word_embeddings"])
    )
    text = _text(text_raw, tied)
    image_token_id = top.get("image_token_id", top["image_token_index"])
    if not isinstance(image_token_id, int) or not 0 <= image_token_id < text.vocab_size:
        raise TrioError(
            f"config.json: image_token_index {image_token_id} lies outside the vocabulary of "
            f"{text.vocab_size}."
        )
    return ModelConfig(
        family=family.name,
        vision=vision,
        text=text,
        projector_act=_activation(top["projector_hidden_act"], "projector_hidden_act"),
        projector_bias=bool(top["multimodal_projector_bias"]),
        image_token_id=image_token_id,
        grid_pinpoints=_pinpoints(top["image_grid_pinpoints"], vision) if family.tiled else (),
    )


def _families() -> str:
    return ", ".join(f"{f.name} ({f.architecture})" for f in FAMILIES.values())


def _family(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    architectures = raw.get("architectures") or []
    for family in FAMILIES.values():
        if model_type == family.name or (
            model_type is None and family.architecture in architectures
        ):
            return family
    found = model_type or ", ".join(map(str, architectures)) or "no model_type"
    raise TrioError(
        f"config.json describes {found!r}, which is not supported; the supported families are "
        f"{_families()}. (Checkpoints in the original LLaVA format have converted twins on the "
        "hub under llava-hf.)"
    )
