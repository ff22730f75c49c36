"""transformers' Qwen models with random, lively weights; their sizes as ours; inputs of a tower.

Weights as they are initialised (0.02, norms 1) hide most mistakes, so these are drawn anew.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from trio_deploy.families.base import ModelConfig, PatchTowerConfig, RopeConfig, TextConfig

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
IMAGE = 290
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 3, "embed_dim": 48, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
    "qwen2_5_vl": {
        "depth": 6,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [2, 5],
    },
    "qwen3_vl": {
        "depth": 6,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 16,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [1, 3, 4],
        "num_position_embeddings": 144,
    },
}


def config_json(family: str, *, text: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A config.json of small sizes."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    more: dict[str, Any] = {}
    if family == "qwen3_vl":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        more = {"head_dim": 16, "attention_bias": False}
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "text_config": {
            **TEXT,
            "model_type": f"{family}_text",
            "rope_parameters": rope,
            **more,
            **(text or {}),
        },
        "vision_config": {"model_type": f"{family}_vision", **VISION[family]},
        "image_token_id": IMAGE,
        "video_token_id": 291,
        "vision_start_token_id": 288,
        "vision_end_token_id": 289,
        "tie_word_embeddings": False,
        **top,
    }


def model_config(family: str, **text: Any) -> ModelConfig:
    """The same sizes as graphs take them; `text` replaces fields of `TextConfig`."""
    vision = VISION[family]
    shared: dict[str, Any] = {"num_layers": vision["depth"], "num_heads": vision["num_heads"]}
    shared |= {"patch_size": vision["patch_size"], "hidden_size": vision["hidden_size"]}
    if family == "qwen2_vl":
        shared |= {"hidden_size": vision["embed_dim"], "intermediate_size": 4 * vision["embed_dim"]}
        tower = PatchTowerConfig(**shared, norm="layer", mlp="fc", hidden_act="quick_gelu")
    elif family == "qwen2_5_vl":
        shared["intermediate_size"] = vision["intermediate_size"]
        full = tuple(vision["fullatt_block_indexes"])
        tower = PatchTowerConfig(
            **shared, norm="rms", mlp="gated", hidden_act="silu", window=4, full_layers=full
        )
    else:
        shared |= {"intermediate_size": vision["intermediate_size"], "patch_bias": True}
        shared |= {"deepstack_layers": tuple(vision["deepstack_visual_indexes"])}
        tower = PatchTowerConfig(
            **shared,
            norm="layer",
            mlp="linear_fc",
            hidden_act="gelu_pytorch_tanh",
            position_side=12,
        )
    axes = (0, 0, 1, 1, 1, 2, 2, 2)
    if family == "qwen3_vl":
        axes = (0, 1, 2, 0, 1, 2, 0, 0)
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_positions": 4096,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(1e6, axes=axes),
        "qkv_bias": family != "qwen3_vl",
        "qk_norm": family == "qwen3_vl",
    }
    return ModelConfig(family, tower, TextConfig(**(fields | text)), "gelu", True, IMAGE)


def new_model(family: str, *, seed: int = 0, text: dict[str, Any] | None = None) -> Any:
    """transformers' model with weights that matter, fp32, in eval mode."""
    architecture = getattr(transformers, ARCHITECTURES[family])
    raw = config_json(family, text=text)
    config = architecture.config_class.from_dict(raw, attn_implementation="sdpa")
    return lively(architecture(config), seed)


def lively(model: Any, seed: int = 0) -> Any:
    """Matrices N(0, 1.4/√fan_in), norms 1 + 0.4 N, biases 0.5 N."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.4 * noise)
            elif "embed_tokens" in name or "pos_embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.4 * noise / math.sqrt(parameter[0].numel()))
    return model.eval()


@cache
def shared_model(family: str) -> Any:
    """`new_model` with its defaults, made once: not to be changed."""
    return new_model(family)


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Weights under canonical names."""
    return {
        name.removeprefix("model."): tensor.detach().float().numpy()
        for name, tensor in model.state_dict().items()
    }


def tower_feeds(config: ModelConfig, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Inputs of the tower but for pixels, for (frames, rows, columns) of patches.

    By their definition, patch by patch: neither by transformers' functions, which the oracle's
    adapter takes, nor by those of the families. What comes of them is compared with transformers'
    towers, which find the places of patches themselves.
    """
    vision, (_, rows, columns) = config.patch_tower, grid
    merge = vision.merge
    places = [
        (top + row, left + column)
        for top in range(0, rows, merge)
        for left in range(0, columns, merge)
        for row in range(merge)
        for column in range(merge)
    ]
    feeds = {"patch_position": np.array(places, np.int64)}
    if vision.position_side is not None:
        side = vision.position_side
        index, weight = np.zeros((len(places), 4), np.int64), np.zeros((len(places), 4), np.float32)
        for n, place in enumerate(places):
            # The corners of table and grid coincide.
            exact = [
                at * (side - 1) / max(size - 1, 1)
                for at, size in zip(place, (rows, columns), strict=True)
            ]
            corner = [min(math.floor(value), side - 2) for value in exact]
            for tap, (down, across) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                entry = (corner[0] + down, corner[1] + across)
                index[n, tap] = entry[0] * side + entry[1]
                weight[n, tap] = math.prod(
                    1 - abs(value - tapped) for value, tapped in zip(exact, entry, strict=True)
                )
        feeds |= {"position_taps": index, "position_weights": weight}
    if vision.window is not None:
        reach = vision.window * merge
        windows: dict[tuple[int, int], list[int]] = {}
        for n, (row, column) in enumerate(places):
            windows.setdefault((row // reach, column // reach), []).append(n)
        members = [windows[place] for place in sorted(windows)]
        table = np.full((len(members), vision.window_slots), -1, np.int64)
        slot = np.zeros(len(places), np.int64)
        for number, patches in enumerate(members):
            for at, patch in enumerate(patches):
                table[number, at] = patch
                slot[patch] = number * vision.window_slots + at
        feeds |= {"window_index": table, "window_slot": slot}
    return feeds


def pixels(config: ModelConfig, grid: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Random patches, float32 [T, L, c]."""
    shape = (grid[0], grid[1] * grid[2], config.patch_tower.patch_values)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
