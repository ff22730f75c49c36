"""Canonical tensors: the modules of all stages declare them, in a fixed order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.transformers_models import model_config
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors

BLOCK = """
    layer_norm1.weight layer_norm1.bias
    self_attn.q_proj.weight self_attn.q_proj.bias self_attn.k_proj.weight self_attn.k_proj.bias
    self_attn.v_proj.weight self_attn.v_proj.bias self_attn.out_proj.weight self_attn.out_proj.bias
    layer_norm2.weight layer_norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias
"""
LAYER = """
    input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
    self_attn.o_proj.weight post_attention_layernorm.weight
    mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight
"""
ORDER = [
    "vision_tower.embeddings.class_embedding",
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.position_embedding.weight",
    "vision_tower.pre_layrnorm.weight",
    "vision_tower.pre_layrnorm.bias",
    *(f"vision_tower.encoder.layers.{i}.{name}" for i in range(2) for name in BLOCK.split()),
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_1.bias",
    "multi_modal_projector.linear_2.weight",
    "multi_modal_projector.linear_2.bias",
    "image_newline",
    "language_model.embed_tokens.weight",
    *(f"language_model.layers.{i}.{name}" for i in range(2) for name in LAYER.split()),
    "language_model.norm.weight",
    "lm_head.weight",
]


def small(**text: object) -> ModelConfig:
    config = model_config()
    vision = replace(config.vision, num_layers=3, feature_layers=(2,))
    text = {"num_layers": 2, "tie_word_embeddings": False, **text}
    return replace(
        config,
        vision=vision,
        text=replace(config.text, **text),
        projector_bias=True,
        newline=True,
    )


def test_the_order_is_that_of_planned_weight_files() -> None:
    """Graphs exported without weights have places in it: another order would invalidate them."""
    assert list(canonical_tensors(small())) == ORDER


def test_shapes_are_those_of_checkpoints() -> None:
    config = small()
    shapes, text, vision = canonical_tensors(config), config.text, config.vision
    attention = "language_model.layers.1.self_attn"
    assert shapes[f"{attention}.q_proj.weight"] == (
        text.num_heads * text.head_dim,
        text.hidden_size,
    )
    assert shapes[f"{attention}.k_proj.weight"] == (
        text.num_kv_heads * text.head_dim,
        text.hidden_size,
    )
    assert shapes["language_model.layers.0.mlp.down_proj.weight"] == (
        text.hidden_size,
        text.intermediate_size,
    )
    patch = vision.patch_size
    assert shapes["vision_tower.embeddings.patch_embedding.weight"] == (
        vision.hidden_size,
        3,
        patch,
        patch,
    )


def test_biases_follow_their_weights() -> None:
    names = list(canonical_tensors(small(qkv_bias=True, o_bias=True, mlp_bias=True)))
    weights = [name for name in names if name.endswith("_proj.weight") and "language" in name]
    assert len(weights) == 14
    for name in weights:
        assert names[names.index(name) + 1] == name.replace(".weight", ".bias")


def test_a_model_without_newline_or_projector_bias_lacks_these() -> None:
    names = canonical_tensors(replace(small(), newline=False, projector_bias=False))
    assert set(ORDER) - set(names) == {
        "image_newline",
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_2.bias",
    }


def test_tied_embeddings_need_no_head() -> None:
    names = list(canonical_tensors(small(tie_word_embeddings=True)))
    assert names == [name for name in ORDER if name != "lm_head.weight"]


def test_vision_layers_above_the_features_are_left_out() -> None:
    config = parse_config(load_recipe("llava-1.5-7b").architecture)
    names = canonical_tensors(config)
    assert "vision_tower.encoder.layers.22.mlp.fc1.weight" in names
    assert "vision_tower.encoder.layers.23.mlp.fc1.weight" not in names
    assert "image_newline" not in names


@pytest.mark.parametrize(
    ("recipe", "billions"),
    [
        ("llava-1.5-7b", 7.05),
        ("llava-1.5-13b", 13.34),
        ("llava-next-7b", 7.05),
        ("llava-next-mistral-7b", 7.55),
        ("llama3-llava-next-8b", 8.35),
    ],
)
def test_recipes_have_as_many_parameters_as_the_models(recipe: str, billions: float) -> None:
    shapes = canonical_tensors(parse_config(load_recipe(recipe).architecture))
    assert sum(int(np.prod(s)) for s in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.02)
