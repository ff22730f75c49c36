"""Sources by their content, schedules by their methods, bundles that share weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.evaluation import ONE_THREAD
from tests.support.qwen_checkpoints import make_qwen
from trio_deploy import (
    RuntimeOptions,
    Schedule,
    TrioError,
    export_model,
)
from trio_deploy.checkpoint import fingerprint
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.recipe import recipe_folder
from trio_deploy.evaluation.configurations import (
    Bundles,
    Configuration,
    Source,
    grid,
    named,
    unpruned,
)
from trio_deploy.families.registry import request_limits


def test_pictures_are_as_large_as_the_checkpoints_own_settings_allow(tmp_path):
    folder = make_qwen(tmp_path / "qwen", "qwen2_5_vl")
    exported = export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    source = Source.open(folder)
    assert source.config.pixels == exported.config.pixels
    assert source.visual == request_limits(exported.config).visual_tokens


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    folder = shutil.copytree(load_recipe("tiny").checkpoint, tmp_path / "a")
    moved = shutil.copytree(folder, tmp_path / "b")
    weights = folder / "model.safetensors"
    by_size = sorted(
        Checkpoint.from_path(folder).tensors.values(), key=lambda tensor: tensor.nbytes
    )
    for limit in (fingerprint.READ_WHOLE, 0):  # read as a whole, and by samples
        monkeypatch.setattr(fingerprint, "READ_WHOLE", limit)
        known = Source.open(folder).fingerprint
        assert Source.open(moved).fingerprint == known
        for tensor in (by_size[0], by_size[-1]):
            with weights.open("r+b") as stream:
                stream.seek(tensor.offset)
                first = stream.read(1)
                stream.seek(tensor.offset)
                stream.write(bytes([first[0] ^ 1]))
            assert Source.open(folder).fingerprint != known
            with weights.open("r+b") as stream:
                stream.seek(tensor.offset)
                stream.write(first)
        assert Source.open(folder).fingerprint == known
    (folder / "tokenizer.json").write_text("{}")
    assert fingerprint.of_files(folder.iterdir()) != fingerprint.of_files(moved.iterdir())
    bundle = export_model("tiny", tmp_path / "bundle", schedule="0:0.2", progress=False)
    shutil.copytree(bundle.path, tmp_path / "copy")
    assert (
        Source.open(bundle.path).fingerprint == Source.open(tmp_path / "copy").fingerprint != known
    )


def test_a_recipe_is_known_by_its_content_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(recipe_folder() / "tiny.yaml", tmp_path / name / "tiny.yaml")
    known = Source.open("tiny").fingerprint
    assert Source.open(str(tmp_path / "a" / "tiny.yaml")).fingerprint == known
    file = tmp_path / "b" / "tiny.yaml"
    text = file.read_text(encoding="utf-8").replace("threshold: 0.8", "threshold: 0.7")
    file.write_text(text, encoding="utf-8")
    assert Source.open(str(file)).fingerprint != known


def test_engines_of_a_bundle_are_found_by_their_target_without_its_file(tmp_path):
    path = export_model("tiny", tmp_path / "bundle", schedule="0:0.2", progress=False).path
    (path / "engines" / "mine").mkdir(parents=True)
    opened = Source.open(path)

    def identity(target: str | None) -> str:
        bundles = Bundles(opened, tmp_path, RuntimeOptions(target=target))
        return bundles.identity(unpruned(opened))

    assert identity("mine") != identity(None) == identity("cpu")
    with pytest.raises(TrioError, match="no target called 'other'"):
        identity("other")


def test_answers_of_a_bundle_are_named_by_what_it_runs_with_asked_for_or_its_own(bundles, tmp_path):
    opened = Source.open(bundles.path("tiny", dialect="primitive", target="cpu-openvino"))

    def identity(**options: str) -> str:
        return Bundles(opened, tmp_path, RuntimeOptions(**options)).identity(unpruned(opened))

    own = identity()
    assert own == identity(target="cpu-openvino") == identity(runtime="openvino")
    assert own == identity(precision="float32")
    others = [
        identity(precision="bfloat16"),
        identity(target="cpu-openvino-bf16"),
        identity(target="cpu"),
        identity(runtime="onnxruntime"),
    ]
    assert len({own, *others}) == 5


def test_what_answers_is_named_by_model_target_runtime_and_schedule(source, tmp_path, monkeypatch):
    # A CPU without bfloat16 is asked for a name alone.
    monkeypatch.setattr("trio_deploy.evaluation.configurations.require_runnable", lambda *_: None)
    one = named(source, "0:44:divprune,6:19")

    def identity(
        model: Source = source, what: Configuration = one, dtype: str | None = None, **options: str
    ) -> str:
        return Bundles(model, tmp_path, RuntimeOptions(**options), dtype).identity(what)

    target = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "engines" / "cpu.yaml").read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    mine = identity(target=str(target))
    target.write_text(text.replace("float32", "float16"), encoding="utf-8")
    others = [
        identity(replace(source, fingerprint="another")),
        identity(what=named(source, "0:44:divprune,6:20")),
        identity(dtype="float16"),
        identity(runtime="openvino"),
        identity(runtime="openvino", precision="bfloat16"),
        identity(target="cpu-openvino"),
        mine,
        identity(target=str(target)),
    ]
    assert len({identity(), *others}) == 1 + len(others)


def test_answers_are_named_by_what_selections_compute_with(source, bundles, tmp_path):
    def identity(model: Source, quantize: str | None, selections: str | None) -> str:
        made = Bundles(model, tmp_path, None, None, quantize, selections)
        return made.identity(unpruned(source))

    usual = identity(source, "int4", None)
    assert usual == identity(source, "int4", "int8") != identity(source, "int4", "float")
    recipe = replace(source, quantize="int4", selections="float")
    assert identity(recipe, None, None) == identity(recipe, None, "float")
    assert identity(recipe, None, "int8") not in (identity(recipe, None, None), usual)
    assert identity(recipe, "int8", "float") != identity(recipe, "int8", "int8")
    with pytest.raises(TrioError, match="name a scheme by --quantize"):
        identity(source, None, "float")
    opened = Source.open(bundles.path("tiny", quantize="int4"))
    assert identity(opened, None, "int8") == identity(opened, None, None)
    with pytest.raises(TrioError, match="has selections in int8: leave --selections out, or pass"):
        identity(opened, None, "float")


def test_a_model_is_exported_for_the_runtime_that_is_asked_for(tmp_path):
    tiny = Source.open("tiny")
    bundles = Bundles(tiny, tmp_path, RuntimeOptions("openvino", threads=1))
    assert bundles.pipeline(unpruned(tiny)).bundle.manifest.target == "cpu-openvino"
    with pytest.raises(TrioError, match="tensorrt has no target that suits every device: pass"):
        Bundles(tiny, tmp_path, RuntimeOptions("tensorrt"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"runtime": "onnxruntime", "target": "cpu-openvino"},
            "the target cpu-openvino is of openvino, not of onnxruntime: name one of the two",
        ),
        ({"provider": "cuda"}, "has no CUDAExecutionProvider"),
        ({"threads": 0}, "threads must be 1 to 1024"),
    ],
)
def test_a_model_that_cannot_be_run_so_is_not_evaluated(tmp_path, options, words):
    with pytest.raises(TrioError, match=words):
        Bundles(Source.open("tiny"), tmp_path, RuntimeOptions(**options))
    assert Bundles(Source.open("tiny"), tmp_path, RuntimeOptions("openvino", "cpu-openvino"))


def test_methods_go_into_schedules(source):
    found, refused = grid(
        source,
        ["recipe", "fastv", "dart@0", "fastv@2", "dart@recipe", "random@1+4"],
        [0.111],
        seeds=(0, 1, 2),
    )
    by_name = {one.name: one for one in found}
    assert by_name["recipe"].schedule == source.recipe_schedules["0.111"]
    assert set(by_name["fastv"].schedule.methods) == {"fastv"}
    assert by_name["dart@recipe"].schedule == by_name["recipe"].schedule.with_method("dart")
    assert by_name["dart@0"].schedule == Schedule.parse("0:0.111:dart")
    assert by_name["random@1+4"].schedule.layers == (1, 4)
    assert by_name["random@1+4"].seeds == (0, 1, 2) and by_name["fastv"].seeds == (0,)
    assert "fastv@2" not in by_name and "fastv@2 at 11.1% is left out" in refused[0]
    options, _ = grid(source, ["trio"], [0.222], thresholds=[0.7, 0.8], probes=["last", "shifted"])
    assert len({one.key for one in options}) == 4 == len({one.name for one in options})
    with pytest.raises(TrioError, match="unknown method 'best'"):
        grid(source, ["best"], [0.111])
    with pytest.raises(TrioError, match="METHOD@LAYER"):
        grid(source, ["trio@x"], [0.111])


def test_bundles_share_one_copy_of_the_weights(source, tmp_path):
    bundles = Bundles(source, tmp_path, ONE_THREAD)
    paths = [
        bundles.bundle(Configuration(text, Schedule.parse(text), 0.1)).path
        for text in ("0:0.2", "1:0.1", "0:0.2")
    ]
    assert paths[0] == paths[2] != paths[1]
    nodes = [{file.stat().st_ino for file in (p / "weights").iterdir()} for p in paths[:2]]
    assert nodes[0] == nodes[1]
