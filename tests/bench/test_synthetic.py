"""Random weights of any size: read back as a checkpoint, and the same for the same sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trio_deploy import RuntimeOptions, TrioError
from trio_deploy.bench.measure import BenchOptions, measure
from trio_deploy.bench.synthetic import RandomModel, Size, make_bundle, model_of, write_checkpoint
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.graphs.weights import canonical_tensors

SMALL_TOWER = "vision_d=32,vision_layers=4,vision_mlp=64,vision_heads=2"
SMALL = {  # pictures of 256 visual tokens
    name: f"tower={name},d=32,layers=4,vocab=300,mlp=48,heads=2,image={image},{SMALL_TOWER}"
    for name, image in (("qwen2-vl", 448), ("qwen2.5-vl", 448), ("qwen3-vl-2b", 512))
}
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
    assert Size.parse("d=64,tower=qwen3-vl-2b").name == "qwen3-vl-d64-l16-v32000-qwen3-vl-2b"
    assert Size.parse(SMALL["qwen2-vl"]).name.startswith("qwen2-vl-d32-l4-v300-mlp48")


@pytest.mark.parametrize(
    ("tower", "recipe"),
    [
        ("clip-l-336", "llava-1.5-7b"),
        ("qwen2-vl", "qwen2-vl-2b"),
        ("qwen2.5-vl", "qwen2.5-vl-7b"),
        ("qwen3-vl-2b", "qwen3-vl-2b"),
    ],
)
def test_a_tower_has_the_sizes_of_the_real_one(tower, recipe):
    real = parse_config(model_of(recipe)[1])
    sized = parse_config(Size.parse(f"tower={tower},d=256").config())
    assert (sized.family, sized.vision) == (real.family, real.vision)


@pytest.mark.parametrize("tower", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl-2b"])
def test_the_largest_picture_has_1296_tokens(tower):
    _, raw, settings = model_of(f"tower={tower},d=256")
    config = Preprocessor(settings, parse_config(raw)).config
    assert request_limits(config).visual_tokens == 1296


def test_a_recipe_gives_the_largest_picture_that_it_allows():
    _, raw, settings = model_of("qwen3-vl-4b")
    config = Preprocessor(settings, parse_config(raw)).config
    assert request_limits(config).visual_tokens == 1280
    assert config.image_token_id == 4


def test_sizes_of_a_tower_may_be_named():
    real = parse_config(model_of("llava-1.5-7b")[1]).vision
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
        ("tower=qwen2-vl,vision_mlp=100", "multiple of its width"),
        ("tower=qwen3-vl-2b,layers=2", "do not fit together"),
        ("tower=qwen2-vl,vocab=263", "vocab must be 264 or more"),
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


@pytest.mark.parametrize("sizes", [TINY, *SMALL.values()], ids=["llava", *SMALL])
def test_transformers_reads_it(tmp_path, sizes):
    transformers = pytest.importorskip("transformers")
    _, config, settings = model_of(sizes)
    folder = write_checkpoint(tmp_path / "c", config, settings, progress=False)
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    assert norms and all((weight == weight[0]).all() for weight in norms)
    assert (model.model.language_model.norm.weight == 1).all()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_a_model_of_pictures_of_any_size_is_measured(tmp_path, sizes):
    model = RandomModel(sizes, "0:0.5:divprune,2:0.125")
    bundle, _ = make_bundle(model, tmp_path, RuntimeOptions(), progress=False)
    options = BenchOptions((None,), new_tokens=2, runs=1, warm_up=0, baselines=(), memory=False)
    result = measure(bundle, options, progress=False)
    whole, pruned = result["cases"]
    assert whole["tokens"]["visual"] == result["workload"]["visual_tokens"] == 256
    assert pruned["tokens"]["keep"] == [128, 32]
    assert pruned["flops"]["vision"] == whole["flops"]["vision"] > 0
    assert whole["groups_s"]["vision"]["median"] > 0


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
