"""config.json against the tensors: an output head is the one that transformers would take."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from tests.support.checkpoints import VOCAB_SIZE, make_llava, make_llava_next, read_tensor
from trio_deploy import TrioError
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.export.checkpoint import read_checkpoint
from trio_deploy.families.names import EMBEDDINGS, HEAD

MAKERS = {
    "llava": (make_llava, LlavaForConditionalGeneration),
    "llava_next": (make_llava_next, LlavaNextForConditionalGeneration),
}
#: Layout of each family's checkpoints here, and the head's name in it.
LAYOUTS = {"llava": "5.x", "llava_next": "4.52"}
HEADS = {"5.x": "language_model.lm_head.weight", "4.52": "lm_head.weight"}
WEIGHTS = ("both, different", "both, equal", "embeddings", "head")
SAYS = (None, True, False)


def _edit(folder: Path, change) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def _reweigh(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _hold(folder: Path, weights: str, head: str) -> None:
    """Let a checkpoint saved with tied weights hold a head, embeddings, or both."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        (table,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
        if weights == "both, different":
            generator = torch.Generator().manual_seed(1)
            tensors[head] = torch.randn(tensors[table].shape, generator=generator) * 0.2
        elif weights == "both, equal":
            tensors[head] = tensors[table].clone()
        elif weights == "head":
            tensors[head] = tensors.pop(table)

    _reweigh(folder, change)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder by family and what the weights hold; made when first asked for."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, weights: str) -> Path:
        key, layout = (family, weights), LAYOUTS[family]
        if key not in made:
            folder = tmp_path_factory.mktemp("saved") / "c"
            MAKERS[family][0](folder, layout=layout, tie=True, layers=1, hidden=32)
            _hold(folder, weights, HEADS[layout])
            made[key] = folder
        return made[key]

    return get


def _tie(raw: dict[str, Any], top: bool | None, text: bool | None) -> None:
    for section, says in ((raw, top), (raw["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        if says is not None:
            section["tie_word_embeddings"] = says


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", MAKERS)
def test_the_head_is_the_one_that_transformers_takes(saved, tmp_path, family, weights):
    """Whatever config.json says: what transformers would draw at random is refused."""
    for top, text in product(SAYS, SAYS):
        folder = tmp_path / f"{top}-{text}"
        shutil.copytree(saved(family, weights), folder)
        _edit(folder, lambda raw, says=(top, text): _tie(raw, *says))
        theirs, loading = MAKERS[family][1].from_pretrained(folder, output_loading_info=True)
        if loading["missing_keys"]:
            with pytest.raises(TrioError, match=r"no lm_head\.weight|lacks tensor '.*embed_tokens"):
                read_checkpoint(folder)
            continue
        tensors = read_checkpoint(folder).tensors
        head = tensors[HEAD if HEAD in tensors else EMBEDDINGS]
        assert np.array_equal(read_tensor(head), theirs.lm_head.weight.detach()), (top, text)
        table = theirs.get_input_embeddings().weight.detach()
        assert np.array_equal(read_tensor(tensors[EMBEDDINGS]), table), (top, text)


def _shard(folder: Path, unlisted: str) -> list[Path]:
    """Split the weights into two shards, by an index that does not name one of the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = names[: len(names) // 2]
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = (half, [name for name in names if name not in half])
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    listed = {
        name: file.name
        for file, part in zip(files, parts, strict=True)
        for name in part
        if name != unlisted
    }
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("family", MAKERS)
def test_shards_give_the_head_that_transformers_takes_whatever_the_index_names(
    saved, tmp_path, family
):
    """A head that only a shard's header names; then one that two shards hold."""
    head = HEADS[LAYOUTS[family]]
    folder = Path(shutil.copytree(saved(family, "both, different"), tmp_path / "c"))
    files = _shard(folder, head)
    for held_twice in (False, True):
        if held_twice:
            for number, file in enumerate(files):
                tensors = load_file(file)
                tensors[head] = torch.full((VOCAB_SIZE, 32), number + 1.0)
                save_file(tensors, file, metadata={"format": "pt"})
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            index["weight_map"][head] = files[0].name
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        theirs = MAKERS[family][1].from_pretrained(folder)
        tensors = read_checkpoint(folder).tensors
        assert np.array_equal(read_tensor(tensors[HEAD]), theirs.lm_head.weight.detach())


def test_equal_tensors_are_shipped_once(saved):
    read = read_checkpoint(saved("llava", "both, equal"))
    assert HEAD not in read.tensors
    assert read.config.text.tie_word_embeddings
    assert read.info.tied
    assert read.notes == ()


def test_a_head_of_its_own_is_said_and_recorded(saved):
    read = read_checkpoint(saved("llava", "both, different"))
    assert not read.config.text.tie_word_embeddings
    assert not read.info.tied
    (note,) = read.notes
    assert "a head with other values: that head is used" in note


def test_an_untied_model_without_a_head_is_told_what_to_set(saved, tmp_path):
    folder = shutil.copytree(saved("llava_next", "embeddings"), tmp_path / "c")
    _edit(folder, lambda raw: _tie(raw, None, True))  # transformers reads the top level alone
    with pytest.raises(TrioError, match="set tie_word_embeddings to true at the top"):
        read_checkpoint(folder)


@pytest.fixture
def folder(llava_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(llava_checkpoint, tmp_path / "c"))


def test_tensors_that_config_json_has_no_use_for_are_named(folder):
    layer = "language_model.model.layers.4.self_attn.q_proj.weight"
    bias = "language_model.model.layers.0.self_attn.q_proj.bias"
    buffer = "vision_tower.vision_model.embeddings.position_ids"
    rotary = "language_model.model.rotary_emb.inv_freq"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {layer: torch.ones(2), bias: torch.ones(64), "lm_head.bias": torch.ones(3)}
        tensors |= {buffer: torch.arange(17), rotary: torch.ones(8)}

    assert read_checkpoint(folder).info.unused == ()
    _reweigh(folder, add)
    read = read_checkpoint(folder)
    assert read.info.unused == tuple(sorted((layer, bias, "lm_head.bias")))
    (note,) = read.notes
    assert layer in note
    assert bias in note


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("text_config", "num_hidden_layers", 5, "asks for 5 layers in text_config.* hold 4"),
        ("vision_config", "num_hidden_layers", 5, "asks for 4 layers in vision_config.* hold 3"),
        ("text_config", "vocab_size", 10**6, "embed_tokens.weight' in .* has shape"),
        ("text_config", "num_key_value_heads", 4, "k_proj.weight' in .* has shape"),
        ("text_config", "num_attention_heads", 2, "q_proj.weight' in .* has shape"),
        ("text_config", "intermediate_size", 64, "mlp.*weight' in .* has shape"),
        ("vision_config", "image_size", 64, "position_embedding.weight' in .* has shape"),
        ("vision_config", "intermediate_size", 65, "fc1.weight' in .* has shape"),
    ],
)
def test_counts_that_the_headers_contradict_are_refused(folder, part, key, value, says):
    _edit(folder, lambda raw: raw[part].update({key: value}))
    with pytest.raises(TrioError, match=says):
        read_checkpoint(folder)


def test_digests_tell_config_json_and_headers_apart(folder):
    before = read_checkpoint(folder).info
    assert read_checkpoint(folder).info == before
    assert list(before.headers) == ["model.safetensors"]
    _edit(folder, lambda raw: raw.update(pad_token_id=9))
    edited = read_checkpoint(folder).info
    assert (edited.config != before.config, edited.headers == before.headers) == (True, True)
    _reweigh(folder, lambda tensors: tensors.update(extra=torch.ones(1)))
    assert read_checkpoint(folder).info.headers != before.headers


def test_a_tower_without_the_layers_behind_its_features_is_whole(folder):
    """Some checkpoints leave out what no one reads."""
    _reweigh(
        folder,
        lambda tensors: [
            tensors.pop(name)
            for name in list(tensors)
            if "layers.2." in name and name.startswith("vision_tower")
        ],
    )
    assert len(Checkpoint.from_path(folder).tensors)
    assert read_checkpoint(folder).info.unused == ()
