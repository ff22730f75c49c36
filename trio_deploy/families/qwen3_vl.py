"""Qwen3-VL: pictures of any size; layers of the tower also feed the first decoder layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Family, ModelConfig, PatchTowerConfig, TowerSizes
from trio_deploy.families.hf_config import activation_of
from trio_deploy.families.qwen import (
    PREFIXES,
    TINY_TEXT,
    TINY_TOP,
    arrange,
    counts,
    layer_indexes,
    patch_settings,
    qwen_config,
    read_qwen_text,
    request_limits,
    text_section,
    top_level,
    tower_count,
    vision_section,
)
from trio_deploy.families.qwen_hub import mrope, quarters, qwen_hub, qwen_json

_NAME = "qwen3_vl"
_ARCHITECTURE = "Qwen3VLForConditionalGeneration"
_MROPE = (24, 20, 20)
_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "sliding_window": None,
}
_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json to sizes and options."""
    token, tied = top_level(raw)
    section, part = text_section(raw, "qwen3_vl_text", _TEXT)
    section["mlp_bias"] = False
    text = read_qwen_text(section, part, tied, _MROPE, interleaved=True)
    vision = vision_section(raw, ("qwen3_vl_vision", _NAME), _VISION)
    depth, positions = tower_count(vision, "depth"), tower_count(vision, "num_position_embeddings")
    side = math.isqrt(positions)
    if side * side != positions:
        raise TrioError(
            f"config.json: vision_config.num_position_embeddings {positions} is no square"
        )
    tower = PatchTowerConfig(
        hidden_size=tower_count(vision, "hidden_size"),
        intermediate_size=tower_count(vision, "intermediate_size"),
        num_layers=depth,
        num_heads=tower_count(vision, "num_heads"),
        patch_size=tower_count(vision, "patch_size"),
        norm="layer",
        mlp="linear_fc",
        hidden_act=activation_of(vision["hidden_act"], "vision_config.hidden_act"),
        temporal_patch_size=tower_count(vision, "temporal_patch_size"),
        merge=tower_count(vision, "spatial_merge_size"),
        in_channels=tower_count(vision, "in_channels"),
        patch_bias=True,
        position_side=side,
        deepstack_layers=layer_indexes(vision, "deepstack_visual_indexes", depth),
    )
    width = tower_count(vision, "out_hidden_size")
    return qwen_config(_NAME, tower, width, replace(text, qk_norm=True), token)


def tiny() -> dict[str, Any]:
    """A config.json of small sizes."""
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    text = {**TINY_TEXT, "model_type": "qwen3_vl_text", "head_dim": 16, "rope_parameters": rope}
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 2],
    }
    top = {**TINY_TOP, "model_type": _NAME, "architectures": [_ARCHITECTURE]}
    return {**top, "text_config": text, "vision_config": vision}


def _sized(tower: TowerSizes, text: Mapping[str, Any]) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": mrope(text["head_dim"], interleaved=True),
    }
    vision = {
        "depth": tower.layers,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_heads": tower.heads,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": text["hidden_size"],
        "patch_size": tower.patch,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": quarters(tower.layers, 3),
    }
    more = {"attention_bias": False, "rope_scaling": rope}
    return qwen_json(_NAME, _ARCHITECTURE, {**text, **more}, vision)


FAMILY = Family(
    name=_NAME,
    architecture=_ARCHITECTURE,
    prefixes=PREFIXES,
    settings=patch_settings,
    read=read,
    arrange=arrange,
    counts=counts,
    request_limits=request_limits,
    reference="qwen",
    tiny=tiny,
    hub=qwen_hub(
        _sized,
        (("visual.", "model.visual."), ("language_model.", "model.language_model.")),
    ),
    positions=("original",),
)
