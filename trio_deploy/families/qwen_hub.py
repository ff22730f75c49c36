"""Checkpoints of Qwen's vision-language families, as the hub has them, of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trio_deploy.families.base import HubLayout, ModelConfig, TowerSizes
from trio_deploy.families.qwen import patch_settings

#: By the keys of config.json; the token of a picture comes first.
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

Prefixes = tuple[tuple[str, str], ...]


def qwen_hub(
    config: Callable[[TowerSizes, Mapping[str, Any]], dict[str, Any]],
    prefixes: Prefixes,
) -> HubLayout:
    """The layout of a family.

    Args:
        config, prefixes: as of `HubLayout`.
    """

    def files(model: ModelConfig) -> dict[str, dict[str, Any]]:
        settings, _ = patch_settings(_pixel_bounds(model), model)
        settings |= {"image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True}
        return {
            # Older releases of transformers, and OpenVINO GenAI, read the two bounds.
            "preprocessor_config.json": {**settings, **_pixel_bounds(model)},
            "processor_config.json": {},
        }

    return HubLayout(
        tokens=_TOKENS, picture=_PICTURE, prefixes=prefixes, config=config, files=files
    )


def _pixel_bounds(model: ModelConfig) -> dict[str, int]:
    assert model.pixels is not None
    return dict(zip(("min_pixels", "max_pixels"), model.pixels, strict=True))


def mrope(head_dim: int, *, interleaved: bool) -> list[int]:
    """Frequencies along time, rows and columns, in the proportions of the published models."""
    frequencies = head_dim // 2
    side = frequencies * (5 if interleaved else 6) // 16
    return [frequencies - 2 * side, side, side]


def quarters(layers: int, count: int) -> list[int]:
    """The last layer of each of the first `count` quarters."""
    return sorted({max(0, layers * quarter // 4 - 1) for quarter in range(1, count + 1)})


def qwen_json(
    name: str, architecture: str, text: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json of these parts."""
    return {
        "architectures": [architecture],
        "model_type": name,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": f"{name}_text",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "model_type": f"{name}_vision",
            "in_channels": 3,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }
