"""Checkpoints of a CLIP tower, two linear layers and Llama, as the hub has them, of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trio_deploy.families.base import HubLayout, ModelConfig, TowerSizes
from trio_deploy.families.clip_images import clip_processor_files
from trio_deploy.families.hf_config import clip_llama_json

_PREFIXES = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def clip_hub(
    name: str, architecture: str, top: Callable[[TowerSizes], Mapping[str, Any]]
) -> HubLayout:
    """The layout of a family.

    Args:
        name: `model_type` of config.json.
        architecture: transformers' class.
        top: further keys of config.json.
    """

    def config(tower: TowerSizes, text: Mapping[str, Any]) -> dict[str, Any]:
        vision = {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
        }
        return clip_llama_json(
            architecture,
            vision,
            text,
            tile=tower.image,
            patch=tower.patch,
            model_type=name,
            **top(tower),
        )

    return HubLayout(
        tokens={"image_token_index": "<image>"},
        picture="<image>",
        prefixes=_PREFIXES,
        config=config,
        files=clip_processor_files,
        whole=_whole,
        unread=_unread,
    )


def _whole(config: ModelConfig) -> ModelConfig:
    """As if features came from the last layer, so that the layers above the feature layer exist."""
    vision = config.clip
    layers = (*vision.feature_layers[:-1], vision.num_layers)
    return replace(config, vision=replace(vision, feature_layers=layers))


def _unread(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The norm of the class token behind the last layer."""
    return {
        f"vision_tower.post_layernorm.{part}": (config.clip.hidden_size,)
        for part in ("weight", "bias")
    }
