"""config.json in every style gives the sizes that transformers' own classes would have."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from transformers import LlavaConfig, LlavaNextConfig

from tests.support.checkpoints import LAYOUTS, make_llava, make_llava_next
from trio_deploy import TrioError
from trio_deploy.families.base import RopeConfig
from trio_deploy.families.registry import parse_config

#: For a key that config.json does not have.
ABSENT = object()

CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

#: As the hub has them: nearly everything is left to transformers' defaults.
HUB_LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {**CLIP_336, "projection_dim": 768, "vocab_size": 32000},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
HUB_MISTRAL = {
    **HUB_LLAVA,
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
}


def _agrees_with_transformers(raw: dict) -> None:
    """Compare `parse_config` with what transformers makes of the same file."""
    kind = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}[raw["model_type"]]
    ours, theirs = parse_config(raw), kind(**json.loads(json.dumps(raw)))
    text, vision = theirs.text_config, theirs.vision_config
    assert ours.family == theirs.model_type
    assert ours.image_token_id == theirs.image_token_index
    assert ours.projector_bias == theirs.multimodal_projector_bias
    assert ours.projector_act == theirs.projector_hidden_act
    t = ours.text
    assert t.hidden_size == text.hidden_size
    assert t.intermediate_size == text.intermediate_size
    assert t.num_layers == text.num_hidden_layers
    assert t.num_heads == text.num_attention_heads
    assert t.num_kv_heads == text.num_key_value_heads
    assert t.head_dim == (text.head_dim or text.hidden_size // text.num_attention_heads)
    assert t.vocab_size == text.vocab_size
    assert t.max_positions == text.max_position_embeddings
    assert t.rms_norm_eps == text.rms_norm_eps
    assert t.rope.theta == text.rope_parameters["rope_theta"]
    assert t.rope.scaling == text.rope_parameters["rope_type"]
    assert t.qkv_bias == t.o_bias == getattr(text, "attention_bias", False)
    assert t.mlp_bias == getattr(text, "mlp_bias", False)
    assert t.tie_word_embeddings == theirs.tie_word_embeddings
    v = ours.vision
    assert v.hidden_size == vision.hidden_size
    assert v.intermediate_size == vision.intermediate_size
    assert v.num_layers == vision.num_hidden_layers
    assert v.num_heads == vision.num_attention_heads
    assert v.image_size == vision.image_size
    assert v.patch_size == vision.patch_size
    assert v.layer_norm_eps == vision.layer_norm_eps
    assert v.hidden_act == vision.hidden_act
    if ours.family == "llava_next":
        assert [list(pair) for pair in ours.grid_pinpoints] == theirs.image_grid_pinpoints
    else:
        assert ours.grid_pinpoints == ()


MINIMAL_MISTRAL = {"model_type": "mistral", "sliding_window": None}


@pytest.mark.parametrize(
    "raw",
    [
        HUB_LLAVA,
        HUB_MISTRAL,
        {"model_type": "llava"},
        {"model_type": "llava_next"},
        {"model_type": "llava", "vision_config": {}, "text_config": {}},
        {"model_type": "llava", "vision_config": {"hidden_size": 36}},
        {"model_type": "llava", "text_config": MINIMAL_MISTRAL},
        {"model_type": "llava", "text_config": {"tie_word_embeddings": True}},
        {"model_type": "llava_next", "text_config": {"tie_word_embeddings": True}},
        {"model_type": "llava_next", "tie_word_embeddings": True},
        {"model_type": "llava", "text_config": {"hidden_size": 64, "num_attention_heads": 4}},
        {"model_type": "llava", "text_config": {"rope_theta": 7.0}},
        {"model_type": "llava", "text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    ],
    ids=range(13),
)
def test_missing_keys_get_transformers_defaults(raw):
    # transformers' default image token lies outside its default vocabulary, which we refuse.
    _agrees_with_transformers({"image_token_index": 7, **raw})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [make_llava, make_llava_next])
@pytest.mark.parametrize(
    "options",
    [{}, {"mistral": True}, {"llama3_rope": True}, {"bias": True, "mlp_bias": True}, {"tie": True}],
    ids=["plain", "mistral", "llama3", "biases", "tied"],
)
def test_styles_of_saved_checkpoints(tmp_path: Path, make, layout, options):
    folder = make(tmp_path / "c", layout=layout, layers=1, **options)
    raw = json.loads((folder / "config.json").read_text())
    _agrees_with_transformers(raw)
    styles = [parse_config(raw)]
    folder = make(tmp_path / "d", layers=1, **options)
    styles.append(parse_config(json.loads((folder / "config.json").read_text())))
    assert styles[0] == styles[1], "one model, two styles"


def _with(part: str, **keys) -> dict:
    raw = json.loads(json.dumps(HUB_MISTRAL if keys.pop("mistral", False) else HUB_LLAVA))
    (raw if part == "top" else raw[part]).update(keys)
    return raw


def test_rope_of_both_styles():
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    old = _with("text_config", rope_theta=500000.0, rope_scaling=llama3)
    new = _with("text_config", rope_parameters={**llama3, "rope_theta": 500000.0})
    assert parse_config(old).text.rope == wanted
    assert parse_config(new).text.rope == wanted
    none = _with("text_config", rope_scaling=None)
    assert parse_config(none).text.rope == RopeConfig(10000.0)


def test_rope_of_both_styles_at_once_is_what_transformers_makes_of_it():
    linear = {"rope_type": "linear", "factor": 4.0}
    whole, other = {**linear, "rope_theta": 5e5}, {"type": "linear", "factor": 2.0}
    choices = {
        "rope_theta": (ABSENT, 1e6),
        "rope_parameters": (ABSENT, None, {}, {"rope_theta": 7e4}, whole, linear),
        "rope_scaling": (ABSENT, None, {}, whole, linear, other),
    }
    for values in product(*choices.values()):
        given = {
            key: value for key, value in zip(choices, values, strict=True) if value is not ABSENT
        }
        raw = _with("text_config", **given)
        theirs = LlavaConfig.from_dict(json.loads(json.dumps(raw))).text_config.rope_parameters
        wanted = (theirs["rope_theta"], theirs["rope_type"], theirs.get("factor", 1.0))
        rope = parse_config(raw).text.rope
        assert (rope.theta, rope.scaling, rope.factor) == wanted, given


@pytest.mark.parametrize(
    ("layer", "resolved"), [(-2, (23,)), (-1, (24,)), (0, (0,)), ([-2, -5, 3], (23, 20, 3))]
)
def test_feature_layers_count_the_embeddings_as_zero(layer, resolved):
    assert parse_config(_with("top", vision_feature_layer=layer)).vision.feature_layers == resolved


def test_feature_strategies():
    assert parse_config(_with("top")).vision.drop_cls
    full = parse_config(_with("top", vision_feature_select_strategy="full"))
    assert not full.vision.drop_cls
    assert full.vision.rows_per_tile == 577


def test_an_inactive_sliding_window_is_fine():
    assert parse_config(_with("text_config", mistral=True, sliding_window=32768))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"model_type": "internvl"}, "'internvl'.*use one of llava, llava_next, "),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlamaForCausalLM"),
        ({}, "no model_type"),
        ([], "object"),
        (_with("text_config", model_type="qwen2"), "'qwen2'.*llama, mistral"),
        (_with("vision_config", model_type="siglip_vision_model"), "siglip_vision_model"),
        (_with("text_config", mistral=True, sliding_window=4096), "sliding-window.*4096 of 32768"),
        (_with("text_config", rope_scaling={"rope_type": "yarn", "factor": 2}), "'yarn'"),
        (_with("text_config", rope_scaling={"type": "dynamic", "factor": 2}), "'dynamic'"),
        (_with("text_config", rope_parameters={"rope_type": "longrope"}), "'longrope'"),
        (_with("text_config", rope_scaling={"type": "linear"}), "needs 'factor'"),
        (_with("text_config", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (_with("text_config", hidden_act="gelu"), "silu"),
        (_with("text_config", num_key_value_heads=5), "cannot share"),
        (_with("text_config", hidden_size=4095), "not divisible"),
        (_with("text_config", head_dim=127), "odd"),
        (_with("text_config", vocab_size=0), r"text_config\.vocab_size must be .* not 0"),
        (_with("text_config", num_hidden_layers="many"), "whole number from 1 to 512, not 'many'"),
        (_with("vision_config", hidden_act="relu"), "'relu'"),
        (_with("vision_config", num_channels=1), "num_channels"),
        (_with("vision_config", image_size=[336, 224]), "image_size"),
        (_with("top", projector_hidden_act="relu"), "'relu'"),
        (_with("top", vision_feature_layer=25), "25.*24 layers"),
        (_with("top", vision_feature_layer=[]), "empty"),
        (_with("top", vision_feature_select_strategy="cls"), "'cls'"),
        (_with("top", mistral=True, vision_feature_select_strategy="full"), "'full'"),
        (_with("top", mistral=True, image_grid_pinpoints=[[336, 500]]), "whole 336-pixel tiles"),
        (_with("top", mistral=True, image_grid_pinpoints=[336]), "pairs"),
        (_with("top", mistral=True, image_grid_pinpoints=[]), "empty"),
        (_with("top", image_token_index=32064), "outside the vocabulary"),
        (_with("top", text_config=3), "text_config must be an object"),
        (_with("top", quantization_config={"bits": 4}), "quantised"),
    ],
)
def test_what_is_not_supported_is_named(raw, says):
    with pytest.raises(TrioError, match=says):
        parse_config(raw)
