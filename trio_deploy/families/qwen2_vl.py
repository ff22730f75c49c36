"""Qwen2-VL and Qwen2.5-VL: pictures of any size; the newer tower attends within windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Family, HubLayout, ModelConfig, PatchTowerConfig, TowerSizes
from trio_deploy.families.hf_config import activation_of, flag_of
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
from trio_deploy.families.qwen_hub import Prefixes, mrope, quarters, qwen_hub, qwen_json
from trio_deploy.files import brief

_MROPE = (16, 24, 24)
_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}
_VISION = {
    "depth": 32,
    "num_heads": 16,
    "hidden_size": 3584,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_VISION_2 = {**_VISION, "embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
_VISION_2_5 = {
    **_VISION,
    "intermediate_size": 3420,
    "hidden_act": "silu",
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _tower(section: Mapping[str, Any]) -> tuple[PatchTowerConfig, int]:
    """Qwen2-VL's, which calls the language model's width its hidden_size; and that width."""
    width = tower_count(section, "embed_dim")
    tower = PatchTowerConfig(
        hidden_size=width,
        intermediate_size=width * tower_count(section, "mlp_ratio"),
        num_layers=tower_count(section, "depth"),
        num_heads=tower_count(section, "num_heads"),
        patch_size=tower_count(section, "patch_size"),
        norm="layer",
        mlp="fc",
        hidden_act=activation_of(section["hidden_act"], "vision_config.hidden_act"),
        temporal_patch_size=tower_count(section, "temporal_patch_size"),
        merge=tower_count(section, "spatial_merge_size"),
        in_channels=tower_count(section, "in_channels"),
    )
    return tower, tower_count(section, "hidden_size")


def _windowed_tower(section: Mapping[str, Any]) -> tuple[PatchTowerConfig, int]:
    """Qwen2.5-VL's, and the width of its features."""
    if section["hidden_act"] != "silu":
        raise TrioError(
            f"config.json: vision_config.hidden_act {brief(section['hidden_act'])} is not "
            "supported: silu is"
        )
    depth, patch = tower_count(section, "depth"), tower_count(section, "patch_size")
    merge, window = tower_count(section, "spatial_merge_size"), tower_count(section, "window_size")
    side = window // merge // patch
    if not side:
        raise TrioError(
            f"config.json: vision_config.window_size {window} is smaller than the {merge} x "
            f"{merge} patches of {patch} pixels of one visual token"
        )
    tower = PatchTowerConfig(
        hidden_size=tower_count(section, "hidden_size"),
        intermediate_size=tower_count(section, "intermediate_size"),
        num_layers=depth,
        num_heads=tower_count(section, "num_heads"),
        patch_size=patch,
        norm="rms",
        mlp="gated",
        hidden_act="silu",
        temporal_patch_size=tower_count(section, "temporal_patch_size"),
        merge=merge,
        in_channels=tower_count(section, "in_channels"),
        window=side,
        full_layers=layer_indexes(section, "fullatt_block_indexes", depth),
    )
    return tower, tower_count(section, "out_hidden_size")


def _read(raw: Mapping[str, Any], name: str) -> ModelConfig:
    token, tied = top_level(raw)
    section, part = text_section(raw, f"{name}_text", _TEXT)
    # Of both models only queries, keys and values have biases, and heads divide the width.
    section |= {"attention_bias": False, "mlp_bias": False, "head_dim": None}
    tied = tied or flag_of(section, "tie_word_embeddings", part)
    text = read_qwen_text(section, part, tied, _MROPE, interleaved=False)
    text = replace(text, qkv_bias=True)
    kinds = (f"{name}_vision", name)
    if name == "qwen2_vl":
        tower, width = _tower(vision_section(raw, kinds, _VISION_2))
    else:
        tower, width = _windowed_tower(vision_section(raw, kinds, _VISION_2_5))
    return qwen_config(name, tower, width, text, token)


def read_2(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json of Qwen2-VL to sizes and options."""
    return _read(raw, "qwen2_vl")


def read_2_5(raw: Mapping[str, Any]) -> ModelConfig:
    """config.json of Qwen2.5-VL to sizes and options."""
    return _read(raw, "qwen2_5_vl")


def tiny_2() -> dict[str, Any]:
    """A config.json of Qwen2-VL of small sizes."""
    vision = {
        "model_type": "qwen2_vl_vision",
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_heads": 2,
    }
    return _tiny("qwen2_vl", "Qwen2VLForConditionalGeneration", vision)


def tiny_2_5() -> dict[str, Any]:
    """A config.json of Qwen2.5-VL of small sizes."""
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
    }
    return _tiny("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", vision)


def _tiny(name: str, architecture: str, vision: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TINY_TEXT, "model_type": f"{name}_text", "rope_parameters": rope}
    top = {**TINY_TOP, "model_type": name, "architectures": [architecture]}
    return {**top, "text_config": text, "vision_config": dict(vision)}


_ON_THE_HUB: Prefixes = (("language_model.", "model."),)


def _sized_text(text: Mapping[str, Any]) -> dict[str, Any]:
    sections = mrope(text["head_dim"], interleaved=False)
    return {**text, "rope_scaling": {"type": "mrope", "mrope_section": sections}}


def _sized_2(tower: TowerSizes, text: Mapping[str, Any]) -> dict[str, Any]:
    if tower.mlp % tower.width:
        raise TrioError("the vision tower's MLP must be a multiple of its width in this family")
    vision = {
        "depth": tower.layers,
        "embed_dim": tower.width,
        "hidden_size": text["hidden_size"],
        "mlp_ratio": tower.mlp // tower.width,
        "num_heads": tower.heads,
        "hidden_act": "quick_gelu",
        "patch_size": tower.patch,
    }
    return qwen_json("qwen2_vl", "Qwen2VLForConditionalGeneration", _sized_text(text), vision)


def _sized_2_5(tower: TowerSizes, text: Mapping[str, Any]) -> dict[str, Any]:
    vision = {
        "depth": tower.layers,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_heads": tower.heads,
        "hidden_act": "silu",
        "out_hidden_size": text["hidden_size"],
        "patch_size": tower.patch,
        "window_size": 8 * tower.patch,
        "fullatt_block_indexes": quarters(tower.layers, 4),
        "tokens_per_second": 2,
    }
    return qwen_json("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _sized_text(text), vision)


def _family(
    name: str,
    architecture: str,
    read: Callable[[Mapping[str, Any]], ModelConfig],
    tiny: Callable[[], dict[str, Any]],
    hub: HubLayout,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        prefixes=PREFIXES,
        settings=patch_settings,
        read=read,
        arrange=arrange,
        counts=counts,
        request_limits=request_limits,
        reference="qwen",
        tiny=tiny,
        hub=hub,
        positions=("original",),
    )


FAMILIES = (
    _family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        read_2,
        tiny_2,
        qwen_hub(_sized_2, _ON_THE_HUB),
    ),
    _family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        read_2_5,
        tiny_2_5,
        qwen_hub(_sized_2_5, _ON_THE_HUB),
    ),
)
