"""Random weights of any size: read back as a checkpoint, and the same for the same sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trio_deploy import TrioError
from trio_deploy.bench.synthetic import Size, model_of, write_checkpoint
from trio_deploy.checkpoint.safetensors import Checkpoint
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors

TINY = "d=32,layers=4,vocab=300,mlp=48,heads=2,image=28,patch=14,vision_d=16,vision_layers=2"


def test_what_is_not_named_follows_from_what_is():
    size = Size.parse("d=1024,layers=16,vocab=32000")
    assert (size.mlp, size.heads, size.kv_heads) == (2816, 16, 16)
    config = parse_config(size.config())
    assert config.text.head_dim == 64
    assert config.vision.rows_per_tile == 576


def test_names_tell_sizes_apart():
    texts = "d=64;d=128;d=64,heads=2;d=64,image=28;d=64,kv_heads=1,heads=2;d=64,tower=clip-l-336"
    texts += ";d=64,tower=clip-l-336,vision_layers=12;d=64,vision_d=512;d=64,vision_mlp=1024"
    names = [Size.parse(text).name for text in texts.split(";")]
    assert len(set(names)) == len(names)
    assert names[5] == "llava-d64-l16-v32000-clip-l-336"
    assert names[7] == "llava-d64-l16-v32000-visiond512"


def test_a_tower_has_the_sizes_of_the_real_one_and_others_may_be_named():
    real = parse_config(model_of("llava-1.5-7b")[1]).vision
    assert parse_config(Size.parse("d=64,tower=clip-l-336").config()).vision == real
    fewer = parse_config(Size.parse("vision_layers=6,tower=clip-l-336,d=64").config()).vision
    assert (fewer.num_layers, fewer.hidden_size) == (6, real.hidden_size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth=3", "does not know 'depth'"),
        ("d=64.5", "positive integer"),
        ("d=0", "positive integer"),
        ("d=64,heads=5", "multiple of heads"),
        ("d=64,heads=2,kv_heads=3", "multiple of kv_heads"),
        ("image=30", "multiple of patch"),
        ("vocab=10", "vocab must be"),
        ("vision_layers=1", "vision_layers"),
        ("vision_d=64,vision_heads=5", "multiple of vision_heads"),
        ("tower=clip", "the towers are clip-l-336"),
    ],
)
def test_sizes_that_cannot_be_are_named(text, words):
    with pytest.raises(TrioError, match=words):
        Size.parse(text)


def test_a_recipe_gives_its_sizes():
    name, config, preprocessing = model_of("llava-next-7b")
    parsed = parse_config(config)
    assert name == "llava-next-7b"
    assert (parsed.text.hidden_size, parsed.image_token_id) == (4096, 4)
    assert parsed.grid_pinpoints and preprocessing
    with pytest.raises(TrioError, match="unknown model"):
        model_of("no-such-recipe")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_a_whole_checkpoint_and_written_once(tmp_path, dtype):
    _, config, settings = model_of(TINY)
    folder = write_checkpoint(tmp_path / "c", config, settings, dtype=dtype, progress=False)
    entries = Checkpoint.from_path(folder).verify(canonical_tensors(parse_config(config)))
    assert {entry.dtype for entry in entries.values()} == {"F32" if dtype == "float32" else "BF16"}
    assert not list(tmp_path.glob(".*"))
    before = (folder / "config.json").stat().st_mtime_ns
    write_checkpoint(folder, config, settings, dtype=dtype, progress=False)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_weights_are_as_transformers_initialises_them(tmp_path):
    _, config, settings = model_of(TINY)
    folder = write_checkpoint(tmp_path / "c", config, settings, progress=False)
    entries = Checkpoint.from_path(folder).verify(canonical_tensors(parse_config(config)))

    def values(name):
        entry = entries[name]
        return np.fromfile(entry.file, np.float32, entry.nbytes // 4, offset=entry.offset)

    assert (values("language_model.norm.weight") == 1).all()
    assert (values("multi_modal_projector.linear_1.bias") == 0).all()
    assert values("lm_head.weight").std() == pytest.approx(0.02, rel=0.05)


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    _, config, settings = model_of(TINY)
    folder = write_checkpoint(tmp_path / "c", config, settings, progress=False)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.model.language_model.norm.weight == 1).all()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    _, config, settings = model_of(TINY)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(TrioError, match="smaller --size"):
        write_checkpoint(tmp_path / "c", config, settings, progress=False)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    _, config, settings = model_of("llava-1.5-7b")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1 << 50})())
    monkeypatch.setattr("trio_deploy.bench.synthetic.machine", lambda _: {"memory_gib": 16.0})
    with pytest.raises(TrioError, match=r"26\.\d GiB and this machine has 16.0 GiB"):
        write_checkpoint(tmp_path / "c", config, settings, progress=False)
    assert not list(tmp_path.iterdir())
