"""transformers' models with random weights, and those weights under canonical names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from trio_deploy.families.base import ModelConfig, RopeConfig, TextConfig, VisionConfig

VISION = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=2,
    image_size=28,
    patch_size=7,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    feature_layers=(2,),
    drop_cls=True,
)


def model_config(**changes: Any) -> ModelConfig:
    """A tiny configuration; `changes` go to TextConfig, but for `vision`, `family` and the like."""
    outer = {
        "family": "llava",
        "vision": VISION,
        "projector_act": "gelu",
        "projector_bias": True,
        "image_token_id": 4,
        "grid_pinpoints": (),
        "newline": changes.get("family") == "llava_next",
    }
    outer |= {key: changes.pop(key) for key in list(changes) if key in outer}
    text = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "max_positions": 256,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=10000.0),
    } | changes
    return ModelConfig(text=TextConfig(**text), **outer)


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """transformers' form of a RopeConfig."""
    raw: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "llama3":
        raw |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return raw


def language_model(config: ModelConfig, *, mistral: bool = False, seed: int = 0) -> Any:
    """LlamaForCausalLM (or Mistral's) in fp32 with weights large enough to tell errors apart."""
    text = config.text
    shared = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": rope_parameters(text.rope),
        "tie_word_embeddings": text.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    if mistral:
        model = MistralForCausalLM(MistralConfig(**shared, sliding_window=None))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(**shared, attention_bias=text.qkv_bias, mlp_bias=text.mlp_bias)
        )
    return randomise(model)


def randomise(model: Any) -> Any:
    """Norm scales near one, everything else of a size that matters; eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2)
    return model.eval()


def text_weights(model: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """The language model's weights under canonical names."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.text.tie_word_embeddings:
            continue
        weights[name.replace("model.", "language_model.", 1)] = tensor.numpy()
    return weights


def clip_config(vision: VisionConfig) -> CLIPVisionConfig:
    """transformers' form of a VisionConfig."""
    return CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act=vision.hidden_act,
    )


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """max|Δ| / max|want|."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
