"""Tensor names: three layouts of one model map to the same tensors of the same shapes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support.checkpoints import LAYOUTS, make_llava, make_llava_next, read_tensor
from trio_deploy import TrioError
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.families.base import Family
from trio_deploy.families.names import map_checkpoint_names, refuse_adapters
from trio_deploy.families.registry import get_family, parse_config
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
        names = map_checkpoint_names(get_family(config.family), checkpoint.tensors, shapes)
        assert list(names) == list(shapes)
        assert {n: e.shape for n, e in checkpoint.verify(shapes).items()} == shapes
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


class Known(NamedTuple):
    family: Family
    names: list[str]
    wanted: list[str]


class TestBadNames:
    @pytest.fixture
    def known(self, llava_checkpoint: Path):
        checkpoint = Checkpoint.from_path(llava_checkpoint)
        config = parse_config(checkpoint.config)
        return Known(
            get_family(config.family), list(checkpoint.tensors), list(canonical_tensors(config))
        )

    def test_position_buffers_are_ignored(self, known):
        family, names, wanted = known
        extra = ["vision_tower.vision_model.embeddings.position_ids", "rotary_emb.inv_freq"]
        assert map_checkpoint_names(family, names + extra, wanted)

    def test_a_missing_tensor_is_named(self, known):
        family, names, wanted = known
        names.remove("language_model.model.layers.2.mlp.up_proj.weight")
        with pytest.raises(TrioError, match=r"language_model\.layers\.2\.mlp\.up_proj\.weight"):
            map_checkpoint_names(family, names, wanted)

    def test_no_known_tensor_at_all(self, known):
        with pytest.raises(TrioError, match="class_embedding' and [0-9]+ more"):
            map_checkpoint_names(known.family, ["transformer.wte.weight"], known.wanted)

    def test_a_tensor_under_two_names_is_refused(self, known):
        family, names, wanted = known
        with pytest.raises(TrioError, match="twice"):
            map_checkpoint_names(family, [*names, "lm_head.weight"], wanted)

    def test_an_unmerged_adapter_is_refused(self, known):
        with pytest.raises(TrioError, match="merge"):
            refuse_adapters([*known.names, "language_model.q_proj.lora_A.weight"])
