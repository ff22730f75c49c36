"""What `trio triton` writes, as far as no server is needed to tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.bundles import Bundles
from trio_deploy import Bundle, RuntimeOptions, Schedule, TrioError, export_model
from trio_deploy.cli.main import main
from trio_deploy.config.target import Limits
from trio_deploy.runtimes.tensorrt.profiles import Bounds, Profile
from trio_deploy.runtimes.tensorrt.record import Gpu, Record, StageRecord
from trio_deploy.serve.limits import read_settings
from trio_deploy.serve.triton_server.repository import (
    RECORD,
    Options,
    write_repository,
)


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Bundle:
    return Bundle.load(bundles.path("tiny", budget=0.111))


def files(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_the_repository_holds_one_model_and_a_whole_bundle(bundle, tmp_path):
    assert write_repository(bundle, tmp_path / "out") == ["trio_vlm"]
    written = files(tmp_path / "out")
    own = {RECORD, "trio_vlm/config.pbtxt", "trio_vlm/1/model.py"}
    assert own == {name for name in written if not name.startswith("trio_vlm/1/bundle/")}
    copied = Bundle.load(tmp_path / "out" / "trio_vlm" / "1" / "bundle", verify=True)
    assert copied.manifest == bundle.manifest


def test_nothing_of_this_machine_is_written_into_a_configuration(bundle, tmp_path):
    write_repository(bundle, tmp_path / "out", Options(stages=True))
    for name in files(tmp_path / "out"):
        if name.endswith((".pbtxt", ".json", ".py")):
            text = (tmp_path / "out" / name).read_text()
            assert str(tmp_path) not in text and str(bundle.path) not in text, name


def test_stage_folders_hold_the_weights_their_graph_reads_without_copies(bundle, tmp_path):
    write_repository(bundle, tmp_path / "out", Options(stages=True))
    held = tmp_path / "out" / "trio_vlm" / "1" / "bundle" / "weights"
    for stage in bundle.stages:
        folder = tmp_path / "out" / f"trio_{stage}" / "1" / "model.onnx"
        assert (folder / "model.onnx").read_bytes() == bundle.graph(stage).read_bytes()
        for weights in (folder / "weights").glob("*"):  # a selection by diversity reads none
            assert weights.samefile(held / weights.name)


def test_link_writes_no_weight_twice_and_copying_shares_none(bundle, tmp_path):
    name = "trio_vlm/1/bundle/weights"
    (weights,) = (bundle.path / "weights").iterdir()
    write_repository(bundle, tmp_path / "linked", Options(link=True))
    assert (tmp_path / "linked" / name / weights.name).samefile(weights)
    write_repository(bundle, tmp_path / "copied")
    assert not (tmp_path / "copied" / name / weights.name).samefile(weights)


def test_an_existing_repository_is_kept_without_force_and_a_foreign_folder_always(
    bundle, tmp_path, capsys
):
    out = tmp_path / "out"
    command = ["triton", str(bundle.path), "--out", str(out)]
    assert main([*command]) == 0
    (out / "trio_vlm" / "mark").touch()
    assert main(command) == 1
    assert "pass --force" in capsys.readouterr().err
    assert (out / "trio_vlm" / "mark").exists()
    assert main([*command, "--force"]) == 0
    assert not (out / "trio_vlm" / "mark").exists()
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "file").touch()
    with pytest.raises(TrioError, match="not a model repository"):
        write_repository(bundle, foreign, force=True)
    assert files(foreign) == {"file"}


def test_nothing_is_left_behind_when_writing_fails(bundle, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("trio_deploy.serve.triton_server.repository._record", fail)
    with pytest.raises(TrioError, match=r"cannot write the model repository .*nothing was left"):
        write_repository(bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(device="tpu"), "cpu or gpu"),
        (Options(instances=0), "instances must be 1 or more"),
        (Options(name="../x"), "ASCII letters, digits"),
        (Options(runtime=RuntimeOptions(runtime="tensorflow")), "unknown runtime"),
        (
            Options(runtime=RuntimeOptions(runtime="tensorrt")),
            "TensorRT does not run on --device cpu: pass --device gpu",
        ),
        (Options(runtime=RuntimeOptions(runtime="tensorrt"), device="gpu"), "trio build"),
        (
            Options(runtime=RuntimeOptions(runtime="openvino"), device="gpu"),
            "OpenVINO does not run on --device gpu",
        ),
        (
            Options(runtime=RuntimeOptions(provider="cuda")),
            "--provider cuda does not run on --device cpu: pass --device gpu",
        ),
        (Options(settings={"bundle": "/etc"}), "not a setting"),
        (Options(settings={"max_tokenz": "5"}), "max_tokenz"),
        (Options(settings={"max_tokens": "many"}), "max_tokens"),
        (Options(settings={"provider": "tpu"}), "unknown provider 'tpu'"),
        (Options(settings={"precision": "int3"}), "no option of ONNX Runtime"),
        (
            Options(runtime=RuntimeOptions(runtime="openvino"), settings={"provider": "cpu"}),
            "no option of OpenVINO",
        ),
        (Options(settings={"precision": "bfloat16"}), "the bundle's own dtype"),
        (
            Options(runtime=RuntimeOptions(runtime="openvino", target="cpu")),
            "the target cpu is of onnxruntime, not of openvino",
        ),
        (Options(name="é"), "ASCII letters"),
        (Options(name="-_"), "ASCII letters"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    bundle, tmp_path, options, message
):
    with pytest.raises(TrioError, match=message):
        write_repository(bundle, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_the_bundle_cannot_have_is_refused_before_anything_is_written(
    llava_checkpoint, tmp_path
):
    for schedule, words in (("1:8", "cannot be reached"), (Schedule(), "no other budget than 1.0")):
        made = export_model(llava_checkpoint, tmp_path / "b", schedule=schedule, link_weights=True,
                            force=True, progress=False)  # fmt: skip
        with pytest.raises(TrioError, match=words):
            write_repository(made, tmp_path / "out", Options(settings={"budget": "0.01"}))
        assert not (tmp_path / "out").exists()


def test_settings_come_from_a_file_and_from_the_command_line_which_wins(tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("max_tokens: 512\nmax_images: 2\nlow_memory: true\n")
    assert read_settings(file, ["max_images=4"]) == {
        "max_tokens": "512",
        "max_images": "4",
        "low_memory": "true",
    }
    with pytest.raises(TrioError, match="NAME=VALUE"):
        read_settings(None, ["max_images"])
    file.write_text("max_tokens: [1]\n")
    with pytest.raises(TrioError, match="one name and value per line"):
        read_settings(file, [])


def test_the_gpu_and_instances_reach_the_configuration(bundle, tmp_path):
    write_repository(
        bundle,
        tmp_path / "out",
        Options(runtime=RuntimeOptions(runtime="onnxruntime"), device="gpu", instances=2),
    )
    text = (tmp_path / "out" / "trio_vlm" / "config.pbtxt").read_text()
    assert "count: 2\n  kind: KIND_GPU\n  gpus: [0]" in text
    assert 'string_value: "cuda"' in text


def test_a_target_of_the_users_own_travels_with_the_repository(bundle, tmp_path):
    file = tmp_path / "box.yaml"
    file.write_text("runtime: onnxruntime\ndialect: ort\ndtype: float32\n")
    write_repository(bundle, tmp_path / "own", Options(runtime=RuntimeOptions(target=str(file))))
    assert (tmp_path / "own" / "trio_vlm" / "1" / "box.yaml").read_text() == file.read_text()
    assert '"1/box.yaml"' in (tmp_path / "own" / "trio_vlm" / "config.pbtxt").read_text()
    write_repository(bundle, tmp_path / "shipped", Options(runtime=RuntimeOptions(target="cpu")))
    assert 'string_value: "cpu"' in (tmp_path / "shipped/trio_vlm/config.pbtxt").read_text()


def test_a_target_that_triton_cannot_open_by_its_name_is_refused(bundle, tmp_path):
    file = tmp_path / "é.yaml"
    file.write_text("runtime: onnxruntime\ndialect: ort\ndtype: float32\n")
    with pytest.raises(TrioError, match="rename it"):
        write_repository(
            bundle, tmp_path / "own", Options(runtime=RuntimeOptions(target=str(file)))
        )


def test_engines_of_tensorrt_rtx_are_no_models_of_their_own(bundle, tmp_path):
    own = Bundle.load(shutil.copytree(bundle.path, tmp_path / "bundle"))
    folder = own.path / "engines" / "rtx-40"
    folder.mkdir(parents=True)
    Record(
        "rtx-40", "1.7.1", None, "onnx", "float16", "separate", Limits(), flavour="rtx",
        compute_capabilities=("8.9",),
    ).save(folder)  # fmt: skip
    options = Options(runtime=RuntimeOptions(target="rtx-40"), device="gpu", stages=True)
    with pytest.raises(TrioError, match=r"no backend for engines of TensorRT-RTX 1\.7\.1: leave"):
        write_repository(own, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tensorrt", "integers"), [("8.6.1", "INT32"), ("10.3.0", "INT64")])
def test_engines_of_tensorrt_are_served_with_their_profiles_and_types(tmp_path, tensorrt, integers):
    own = export_model("tiny", tmp_path / "bundle", budget=0.111)
    folder = own.path / "engines" / "jetson-agx-orin-64gb"
    folder.mkdir(parents=True)
    record = Record(
        "jetson-agx-orin-64gb",
        tensorrt,
        Gpu("Orin", "8.7", "540"),
        "primitive",
        "float16",
        "shared",
        Limits(),
    )
    for stage in own.stages:
        (folder / f"{stage}.engine").write_bytes(stage.encode())
        sizes = {"width": Bounds((1,), (2,), (3,))} if stage.startswith("select_") else {}
        profiles = (Profile("prefill", {}, sizes), Profile("decode", {}, sizes))
        entry = StageRecord(f"{stage}.engine", "", len(stage), "", "", profiles, verified=True)
        record = record.with_stage(stage, entry)
    record.save(folder)
    options = Options(
        runtime=RuntimeOptions(target="jetson-agx-orin-64gb"), device="gpu", stages=True
    )
    write_repository(own, tmp_path / "out", options)
    assert (tmp_path / "out/trio_prefill_1/1/model.plan").read_bytes() == b"prefill_1"
    text = (tmp_path / "out/trio_prefill_1/config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in text and 'profile: ["0", "1"]' in text
    assert f'name: "lengths"\n  data_type: TYPE_{integers}' in text
    text = (tmp_path / "out/trio_select_1/config.pbtxt").read_text()
    width = f'name: "width"\n  data_type: TYPE_{integers}\n  dims: [1]\n  is_shape_tensor: true'
    assert width in text and text.count("is_shape_tensor") == 1
    served = tmp_path / "out/trio_vlm/1/bundle/engines/jetson-agx-orin-64gb"
    assert Record.load(served).stages.keys() == set(own.stages)
    config = (tmp_path / "out/trio_vlm/config.pbtxt").read_text()
    assert '"tensorrt"' in config and '"jetson-agx-orin-64gb"' in config


def test_the_model_warms_itself_up_where_no_limit_can_refuse_the_question(bundle, tmp_path):
    write_repository(bundle, tmp_path / "out", Options(settings={"max_tokens": "1"}))
    config = (tmp_path / "out" / "trio_vlm" / "config.pbtxt").read_text()
    assert 'key: "warm_up"\n  value {\n    string_value: "true"' in config
    assert "model_warmup" not in config


def test_the_record_names_the_models(bundle, tmp_path):
    models = write_repository(bundle, tmp_path / "out", Options(name="cat", stages=True))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["models"] == models
    assert {"cat_vlm", "cat_vision", "cat_embeddings"} <= set(models)


def test_a_place_that_the_server_cannot_load_from_is_warned_of(bundle, tmp_path, capsys):
    """It may be served elsewhere, so that it is no error."""
    for name, warned in (("répertoire", True), ("models", False)):
        command = ["triton", str(bundle.path), "--out", str(tmp_path / name)]
        assert main(command) == 0
        assert ("characters beyond ASCII" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--device tpu", "unknown device 'tpu'"),
        ("--instances 0", "instances must be 1 or more"),
        ("--set max_image=3", "unknown parameter 'max_image'"),
        ("--set budget=11%", "a budget of 11% is not possible"),
        ("--target jetson-thor --device cpu", "TensorRT does not run on --device cpu"),
        ("", "exists already: pass --force"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_exported(
    options: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def export(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was exported")

    monkeypatch.setattr("trio_deploy.export.job.export_model", export)
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "models"
    if not options:
        out.mkdir()
    assert main(["triton", "tiny", "--out", str(out), *options.split()]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
