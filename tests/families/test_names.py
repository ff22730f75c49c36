"""Tensor names: three layouts of one model map to the same tensors of the same shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import LAYOUTS, make_llava, make_llava_next, read_tensor
from trio_deploy import TrioError
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.checkpoint.safetensors import Checkpoint
from trio_deploy.families.names import map_checkpoint_names
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors

VARIANTS = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "mistral": {"mistral": True},
    "biases": {"bias": True, "mlp_bias": True},
    "no projector bias": {"projector_bias": False},
    "tied": {"tie": True},
    "wide heads": {"head_dim": 32},
    "two feature layers": {"feature_layer": [-1, 1]},
}


@pytest.mark.parametrize("make", [make_llava, make_llava_next])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_hold_the_same_tensors(tmp_path: Path, make, variant):
    read = []
    for layout in LAYOUTS:
        folder = make(tmp_path / layout, layout=layout, layers=2, **VARIANTS[variant])
        checkpoint = Checkpoint.from_path(folder)
        config = parse_config(checkpoint.config)
        shapes = canonical_tensors(config)
        names = map_checkpoint_names(config, checkpoint.tensors)
        assert list(names) == list(shapes)
        assert {n: e.shape for n, e in checkpoint.verify(config).items()} == shapes
        tensors = checkpoint.tensors
        read.append({name: read_tensor(tensors[theirs]) for name, theirs in names.items()})
        left = set(checkpoint.tensors) - set(names.values())
        assert all("post_layernorm" in n or "encoder.layers" in n for n in left), left
    for other in read[1:]:
        assert all(np.array_equal(read[0][name], other[name]) for name in read[0])


def test_names_are_the_canonical_ones(llava_next_checkpoint: Path):
    names = canonical_tensors(parse_config(Checkpoint.from_path(llava_next_checkpoint).config))
    assert "vision_tower.embeddings.class_embedding" in names
    assert "vision_tower.pre_layrnorm.bias" in names
    assert "vision_tower.encoder.layers.1.self_attn.out_proj.bias" in names
    assert "multi_modal_projector.linear_2.weight" in names
    assert "image_newline" in names
    assert "language_model.layers.3.mlp.gate_proj.weight" in names
    assert "lm_head.weight" in names


def test_vision_layers_above_the_features_are_left_out():
    config = parse_config(load_recipe("llava-1.5-7b").architecture)
    names = canonical_tensors(config)
    assert "vision_tower.encoder.layers.22.mlp.fc1.weight" in names
    assert "vision_tower.encoder.layers.23.mlp.fc1.weight" not in names
    assert "image_newline" not in names


def test_tied_embeddings_need_no_head(tmp_path: Path):
    checkpoint = Checkpoint.from_path(make_llava(tmp_path / "c", tie=True, layers=1))
    assert "lm_head.weight" not in canonical_tensors(parse_config(checkpoint.config))


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
def test_recipes_have_as_many_parameters_as_the_models(recipe, billions):
    shapes = canonical_tensors(parse_config(load_recipe(recipe).architecture))
    assert sum(int(np.prod(s)) for s in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.02)


class TestBadNames:
    @pytest.fixture
    def known(self, llava_checkpoint: Path):
        checkpoint = Checkpoint.from_path(llava_checkpoint)
        return parse_config(checkpoint.config), list(checkpoint.tensors)

    def test_position_buffers_are_ignored(self, known):
        config, names = known
        extra = ["vision_tower.vision_model.embeddings.position_ids", "rotary_emb.inv_freq"]
        assert map_checkpoint_names(config, names + extra)

    def test_a_missing_tensor_is_named(self, known):
        config, names = known
        names.remove("language_model.model.layers.2.mlp.up_proj.weight")
        with pytest.raises(TrioError, match=r"language_model\.layers\.2\.mlp\.up_proj\.weight"):
            map_checkpoint_names(config, names)

    def test_no_known_tensor_at_all(self, known):
        with pytest.raises(TrioError, match="class_embedding' and [0-9]+ more"):
            map_checkpoint_names(known[0], ["transformer.wte.weight"])

    def test_a_tensor_under_two_names_is_refused(self, known):
        config, names = known
        with pytest.raises(TrioError, match="twice"):
            map_checkpoint_names(config, [*names, "lm_head.weight"])

    def test_an_unmerged_adapter_is_refused(self, known):
        config, names = known
        with pytest.raises(TrioError, match="merge"):
            map_checkpoint_names(config, [*names, "language_model.q_proj.lora_A.weight"])
