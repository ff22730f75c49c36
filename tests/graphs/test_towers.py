"""vision.onnx and embed.onnx against transformers' tower, projector and merging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from tests.support.run_graph import filled, run
from tests.support.transformers_models import VISION, clip_config, model_config, randomise, relative
from trio_deploy import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_embed, build_vision

TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]
targets = pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava_next": {"family": "llava_next", "grid_pinpoints": ((28, 56), (56, 28))},
    "several feature layers, CLS kept, gelu, no projector bias": {
        "vision": replace(VISION, feature_layers=(1, 3), drop_cls=False, hidden_act="gelu"),
        "projector_bias": False,
    },
    "embeddings as features": {"vision": replace(VISION, feature_layers=(0,))},
}


def tower(config: ModelConfig) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """transformers' vision tower and projector, and their weights under canonical names."""
    layers = list(config.vision.feature_layers)
    shared = {
        "vision_config": clip_config(config.vision),
        "text_config": LlamaConfig(hidden_size=config.text.hidden_size, num_attention_heads=4),
        "projector_hidden_act": config.projector_act,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers if len(layers) > 1 else layers[0],
    }
    torch.manual_seed(0)
    clip = randomise(CLIPVisionModel(shared["vision_config"]))
    if config.family == "llava_next":
        projector = randomise(LlavaNextMultiModalProjector(LlavaNextConfig(**shared)))
    else:
        projector = randomise(LlavaMultiModalProjector(LlavaConfig(**shared)))
    weights = {
        "vision_tower." + name.removeprefix("vision_model."): tensor.numpy()
        for name, tensor in clip.state_dict().items()
    }
    weights |= {
        f"multi_modal_projector.{name}": tensor.numpy()
        for name, tensor in projector.state_dict().items()
    }
    return clip, projector, weights


def features(clip: Any, projector: Any, config: ModelConfig, pixels: np.ndarray) -> np.ndarray:
    """[T·p, d] as transformers computes them."""
    with torch.no_grad():
        hidden = clip(torch.tensor(pixels), output_hidden_states=True).hidden_states
        first = 1 if config.vision.drop_cls else 0
        chosen = [hidden[i][:, first:] for i in config.vision.feature_layers]
        return projector(torch.cat(chosen, -1)).flatten(0, 1).numpy()


@targets
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_equals_transformers(dialect: str, runtime: str, family: str) -> None:
    config = model_config(**FAMILIES[family])
    clip, projector, weights = tower(config)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 28, 28)).astype(np.float32)
    model = build_vision(config, GraphOptions(dialect=dialect))
    got = run(model, weights, {"pixel_values": pixels}, runtime)["image_features"]
    assert got.shape[0] == 3 * config.vision.rows_per_tile
    assert relative(got, features(clip, projector, config, pixels)) < 1e-5


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_vision_in_half_precision_stays_within_one_percent(dialect: str) -> None:
    config = model_config()
    clip, projector, weights = tower(config)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 28, 28)).astype(np.float16)
    model = build_vision(config, GraphOptions(dialect=dialect, dtype="float16"))
    got = run(model, weights, {"pixel_values": pixels})["image_features"]
    assert got.dtype == np.float16
    clip, projector = clip.half().float(), projector.half().float()
    want = features(clip, projector, config, pixels.astype(np.float32))
    assert relative(got, want) < 1e-2


def test_vision_builds_no_layer_above_the_features() -> None:
    names = build_vision(model_config(), GraphOptions()).graph.initializers
    assert any("encoder.layers.1." in name for name in names)
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in names)


SIDES = {"ragged windows": 8, "whole windows": 12, "one window": 4}


@targets
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("drop_cls", [True, False])
def test_the_class_tokens_attention_is_transformers(
    dialect: str, runtime: str, side: int, drop_cls: bool
) -> None:
    vision = replace(VISION, image_size=7 * side, drop_cls=drop_cls)
    config = model_config(vision=vision)
    clip, _, weights = tower(config)
    clip.set_attn_implementation("eager")
    pixels = np.random.default_rng(0).standard_normal((3, 3, 7 * side, 7 * side))
    pixels = pixels.astype(np.float32)
    model = build_vision(config, GraphOptions(dialect=dialect), ["prior", "prior_local"])
    got = run(model, weights, {"pixel_values": pixels}, runtime)
    with torch.no_grad():
        attentions = clip(torch.tensor(pixels), output_attentions=True).attentions
    shallow, top = (attentions[layer].mean(1)[:, 0].numpy() for layer in (0, 1))
    first = 1 if drop_cls else 0
    assert relative(got["prior"], top[:, first:].flatten()) < 1e-5
    order = got["prior_local"].reshape(3, -1)
    if not drop_cls:
        assert (order[:, 0] == 36).all()
        order = order[:, 1:]
    shallow = shallow[:, 1:]
    for tile in range(3):
        for y in range(0, side, 6):
            for x in range(0, side, 6):
                window = np.arange(side * side).reshape(side, side)[y : y + 6, x : x + 6].ravel()
                ranks = np.argsort(np.argsort(-shallow[tile, window]))
                want = 36 - ranks + 0.999 * shallow[tile, window] / shallow[tile].max()
                assert relative(order[tile, window], want) < 1e-6


def test_without_an_encoder_layer_there_is_no_attention_to_go_by() -> None:
    config = model_config(**FAMILIES["embeddings as features"])
    with pytest.raises(TrioError, match="another method"):
        build_vision(config, GraphOptions(), ["prior"])


def embed_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.text.vocab_size, config.text.hidden_size)
    return {
        "language_model.embed_tokens.weight": rng.standard_normal(shape).astype(np.float32),
        "image_newline": rng.standard_normal(shape[1]).astype(np.float32),
    }


@targets
def test_embed_picks_text_of_its_own_row_image_rows_and_newline(dialect: str, runtime: str) -> None:
    config = model_config(**FAMILIES["llava_next"])
    weights = embed_weights(config)
    table, newline = weights["language_model.embed_tokens.weight"], weights["image_newline"]
    rows = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    # Ids under an image may lie outside the vocabulary: they are not looked up.
    ids = np.array([[5, 1000, 1000, 7], [8, 9, 10, 1000]])
    source = np.array([[0, 4, 7, 3], [2, 0, 6, 1]])
    model = build_embed(config, GraphOptions(dialect=dialect))
    feeds = {"input_ids": ids, "image_features": rows, "source_index": source}
    got = run(model, weights, feeds, runtime)["inputs_embeds"]
    want = np.stack(
        [
            np.stack([table[5], rows[0], newline, table[7]]),
            np.stack([table[10], table[8], rows[2], table[9]]),
        ]
    )
    np.testing.assert_array_equal(got, want)


@targets
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_embed_of_text_alone_takes_no_image_rows(dialect: str, runtime: str, family: str) -> None:
    config = model_config(**FAMILIES[family])
    weights = embed_weights(config)
    ids = np.array([[3, 100, 0]])
    feeds = {
        "input_ids": ids,
        "image_features": np.zeros((0, 48), np.float32),
        "source_index": np.arange(3)[None],
    }
    got = run(build_embed(config, GraphOptions(dialect=dialect)), weights, feeds, runtime)
    np.testing.assert_array_equal(
        got["inputs_embeds"], weights["language_model.embed_tokens.weight"][ids]
    )


def test_embed_has_a_newline_row_of_zeros_where_the_family_has_none() -> None:
    config = model_config()
    model = build_embed(config, GraphOptions())
    assert "image_newline" not in model.graph.initializers
    feeds = {
        "input_ids": np.array([[3]]),
        "image_features": np.ones((2, 48), np.float32),
        "source_index": np.array([[3]]),
    }
    got = run(model, embed_weights(config), feeds)["inputs_embeds"]
    np.testing.assert_array_equal(got, np.zeros((1, 1, 48), np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_graphs_pass_the_checker_with_strict_shape_inference(dialect: str, dtype: str) -> None:
    options = GraphOptions(dialect=dialect, dtype=dtype)
    config = model_config(**FAMILIES["llava_next"])
    weights = tower(config)[2] | embed_weights(config)
    for model in (build_vision(config, options), build_embed(config, options)):
        proto = filled(model, weights)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
