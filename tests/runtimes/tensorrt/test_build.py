"""Builds that are resumed, redone, refused and logged; the first run of what was built.

TensorRT is a stand-in here: one that makes bytes for the builder's own logic, and the simulated one
(`tests/support/fakes/tensorrt/`) for the whole of `trio build`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from tests.support.engines import Here, export_for, make_target, unverified
from tests.support.fakes.tensorrt.install import install
from tests.support.tensorrt_builds import GPU, Stub, build
from trio_deploy import Bundle, TrioError, export_model
from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.bundle.roles import tensor_info
from trio_deploy.cli.main import main
from trio_deploy.config.target import Target
from trio_deploy.runtimes.base import TensorSpec
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt import build as builder
from trio_deploy.runtimes.tensorrt import compiling
from trio_deploy.runtimes.tensorrt import first_run as verify
from trio_deploy.runtimes.tensorrt.bindings import load
from trio_deploy.runtimes.tensorrt.build import build_engines
from trio_deploy.runtimes.tensorrt.first_run import example_feeds, run_once
from trio_deploy.runtimes.tensorrt.profiles import Profile, profiles
from trio_deploy.runtimes.tensorrt.record import Gpu, Record
from trio_deploy.runtimes.tensorrt.runtime import TrtRuntime

AGX_ORIN = Gpu("Orin", "8.7", "12.6", 16, 61.4, "NVIDIA Jetson AGX Orin Developer Kit")
ORIN_NX = Gpu(
    "Orin", "8.7", "12.6", 8, 15.3, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
)
STAGES = ["vision", "embed", "prefill_0", "select_1", "prefill_1"]


@pytest.fixture(scope="module")
def original(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    target = make_target(folder, "10.3", "primitive", "shared")
    export_for(llava_checkpoint, folder, target, "1:0.5")
    return folder


@pytest.fixture
def target(original: Path) -> Target:
    return load_target(original / "test-gpu.yaml")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(original / "bundle", tmp_path / "bundle"))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_build_leaves_an_engine_a_stage_a_cache_a_log_and_a_record(
    bundle: Bundle, target: Target
) -> None:
    outcome = build(bundle, target, Stub())
    assert outcome.folder == bundle.path / "engines" / "test-gpu"
    assert files(outcome.folder) == {f"{stage}.engine" for stage in STAGES} | {
        "timing.cache",
        "build.log",
        "record.json",
    }
    record = Record.load(outcome.folder)
    assert record == outcome.record and list(record.stages) == STAGES
    assert (record.tensorrt, record.gpu, record.decode_layout) == ("10.3.0", GPU, "shared")
    assert [p.name for p in record.stages["prefill_1"].profiles[0].uses] == ["prefill", "decode"]
    assert record.stages["select_1"].profiles == tuple(profiles(bundle, target)["select_1"])
    for stage in STAGES:
        record.check_file(outcome.folder, stage, verify=True)
    log = (outcome.folder / "build.log").read_text()
    assert "about select_1" in log and "far too much" not in log and '"width"' in log
    text = outcome.to_text()
    assert "5 engines for NVIDIA H200" in text and "built in" in text
    assert json.dumps(outcome.to_json())


def test_what_the_builder_learns_goes_on_to_the_next_engine(bundle: Bundle, target: Target) -> None:
    stub = Stub()
    build(bundle, target, stub)
    assert stub.caches == [b"", b"+vision", *(stub.caches[2:])]
    assert stub.caches[-1].endswith(b"+select_1")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TrioError("no room")])
def test_an_interrupted_build_goes_on_at_the_next_engine(
    bundle: Bundle, target: Target, error: BaseException
) -> None:
    first, second = Stub(stop_at="select_1", error=error), Stub()
    with pytest.raises(type(error)):
        build(bundle, target, first)
    folder = bundle.path / "engines" / "test-gpu"
    assert list(Record.load(folder).stages) == STAGES[:3]
    assert not [name for name in files(folder) if name.startswith(".")]
    outcome = build(bundle, target, second)
    assert second.built == STAGES[3:] and outcome.kept == tuple(STAGES[:3])
    assert second.caches[0].startswith(b"+vision")
    third = Stub()
    assert build(bundle, target, third).built == () and third.built == []


def test_what_a_killed_build_left_is_cleared_away(bundle: Bundle, target: Target) -> None:
    folder = bundle.path / "engines" / "test-gpu"
    folder.mkdir(parents=True)
    (folder / ".vision.engine.1-aa").write_bytes(b"half")
    build(bundle, target, Stub())
    assert ".vision.engine.1-aa" not in files(folder)


def test_what_an_engine_no_longer_matches_is_built_again(bundle: Bundle, target: Target) -> None:
    build(bundle, target, Stub())
    folder = bundle.path / "engines" / "test-gpu"

    def rebuilt(new: Target = target, version: str = "10.3.0", **options: Any) -> list[str]:
        stub = Stub(version)
        build(bundle, new, stub, **options)
        return stub.built

    more = replace(target, limits=replace(target.limits, max_new_tokens=30))
    assert rebuilt(more) == ["prefill_0", "prefill_1"]  # the caches grew
    assert rebuilt(target) == ["prefill_0", "prefill_1"]
    (folder / "embed.engine").write_bytes(b"cut")
    assert rebuilt() == ["embed"]
    (folder / "vision.engine").unlink()
    assert rebuilt() == ["vision"]
    damaged = folder / "prefill_0.engine"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    assert rebuilt() == ["prefill_0"]
    assert rebuilt(replace(target, workspace_gib=0.5)) == STAGES
    assert rebuilt(force=True, stages=["select_1"]) == ["select_1"]
    assert rebuilt(version="10.4.0") == STAGES
    (folder / "record.json").write_text("{")
    assert rebuilt() == STAGES


def test_other_weights_make_other_engines(bundle: Bundle, target: Target) -> None:
    build(bundle, target, Stub())
    files = dict(bundle.manifest.files)
    for name in [name for name in files if name.startswith("weights/")]:
        files[name] = structs.replace(files[name], sha256="0" * 64)
    other = replace(bundle, manifest=structs.replace(bundle.manifest, files=files))
    stub = Stub()
    build(other, target, stub)
    assert stub.built == STAGES


def test_another_graph_makes_another_engine(bundle: Bundle, target: Target) -> None:
    build(bundle, target, Stub())
    files = dict(bundle.manifest.files)
    files["select_1.onnx"] = structs.replace(files["select_1.onnx"], sha256="0" * 64)
    other = replace(bundle, manifest=structs.replace(bundle.manifest, files=files))
    stub = Stub()
    build(other, target, stub)
    assert stub.built == ["select_1"]


def test_an_engine_that_does_not_run_is_thrown_away_and_named(
    bundle: Bundle, target: Target
) -> None:
    def first_run(folder: Path, stage: str) -> None:
        assert (folder / f"{stage}.engine").is_file()
        if stage == "prefill_0":
            raise TrioError("hidden_states is not finite")

    with pytest.raises(TrioError, match="engine of prefill_0 was built, but does not run.*finite"):
        build(bundle, target, Stub(), verify=first_run)
    folder = bundle.path / "engines" / "test-gpu"
    assert list(Record.load(folder).stages) == ["vision", "embed"]
    assert "prefill_0.engine" not in files(folder)


def test_an_engine_whose_first_run_was_interrupted_is_run_by_the_next_build(
    bundle: Bundle, target: Target
) -> None:
    def interrupted(folder: Path, stage: str) -> None:
        if stage == "embed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, target, Stub(), verify=interrupted)
    again, ran = Stub(), []
    outcome = build(bundle, target, again, verify=lambda folder, stage: ran.append(stage))
    assert again.built == STAGES[2:] and ran == STAGES[1:]
    assert outcome.kept == ("vision", "embed")
    assert all(entry.verified for entry in Record.load(outcome.folder).stages.values())


KILLED = """
import os, sys
from pathlib import Path
from tests.support.tensorrt_builds import Stub, build
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.runtimes.registry import load_target

def killed(folder, stage):
    if stage == "embed":
        os._exit(137)

build(Bundle.load(Path(sys.argv[1])), load_target(sys.argv[2]), Stub(), verify=killed)
"""


@pytest.fixture
def cut_short(bundle: Bundle, original: Path) -> Path:
    """The folder of a build whose process was killed in the first run of `embed`."""
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", KILLED, str(bundle.path), str(original / "test-gpu.yaml")]
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True)
    assert died.returncode == 137, died.stderr.decode()
    return bundle.path / "engines" / "test-gpu"


def test_an_engine_whose_first_run_killed_the_process_is_not_loaded(cut_short: Path) -> None:
    record = Record.load(cut_short)
    assert {name: entry.verified for name, entry in record.stages.items()} == {
        "vision": True,
        "embed": False,
    }
    record.check_file(cut_short, "vision")
    with pytest.raises(TrioError, match="first run was not completed.*`trio build` again"):
        record.check_file(cut_short, "embed")


def test_an_engine_whose_first_run_killed_the_process_is_run_and_not_built_by_the_next_build(
    cut_short: Path, bundle: Bundle, target: Target
) -> None:
    stub, ran = Stub(), []
    outcome = build(bundle, target, stub, verify=lambda folder, stage: ran.append(stage))
    assert stub.built == STAGES[2:] and ran == STAGES[1:]
    outcome.record.check_file(cut_short, "embed")


def test_an_engine_that_fails_its_second_first_run_is_built_again(
    cut_short: Path, bundle: Bundle, target: Target
) -> None:
    ran: list[str] = []

    def fails_once(folder: Path, stage: str) -> None:
        ran.append(stage)
        if ran == ["embed"]:
            raise TrioError("hidden_states is not finite")

    stub = Stub()
    outcome = build(bundle, target, stub, verify=fails_once)
    assert stub.built == STAGES[1:] and ran == ["embed", *STAGES[1:]]
    assert outcome.built == tuple(STAGES[1:]) and outcome.record.stages["embed"].verified
    assert "embed of an earlier build does not run" in (cut_short / "build.log").read_text()


def test_engines_of_a_record_without_first_runs_are_run_before_they_are_used(
    bundle: Bundle, target: Target
) -> None:
    """Records of schema 1 listed engines before their first run."""
    folder = build(bundle, target, Stub()).folder
    raw = json.loads((folder / "record.json").read_text())
    raw["schema"] = 1
    for entry in raw["stages"].values():
        del entry["verified"]
    (folder / "record.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match="first run"):
        Record.load(folder).check_file(folder, "embed")
    stub, ran = Stub(), []
    build(bundle, target, stub, verify=lambda folder, stage: ran.append(stage))
    assert stub.built == [] and ran == STAGES
    Record.load(folder).check_file(folder, "embed")


def test_stale_engines_do_not_run_beside_new_ones(bundle: Bundle, target: Target) -> None:
    build(bundle, target, Stub())
    changed = replace(target, workspace_gib=0.5)
    with pytest.raises(TrioError, match="no room"):
        build(bundle, changed, Stub(stop_at="select_1", error=TrioError("no room")))
    record = Record.load(bundle.path / "engines" / "test-gpu")
    assert list(record.stages) == STAGES[:3]


def test_another_gpu_than_the_targets_is_refused(bundle: Bundle, target: Target) -> None:
    orin = replace(target, name="jetson", compute_capability="8.7")
    with pytest.raises(TrioError, match=r"jetson has compute capability 8\.7.*H200, has 9\.0"):
        build(bundle, orin, Stub())
    anywhere = replace(target, compute_capability=None)
    assert build(bundle, anywhere, Stub()).built


def test_a_smaller_gpu_of_the_same_name_than_the_targets_is_refused(
    bundle: Bundle, target: Target
) -> None:
    """CUDA calls every Jetson Orin "Orin" with compute capability 8.7."""
    agx = replace(load_target("jetson-agx-orin-64gb"), dtype="float32")
    with pytest.raises(TrioError, match=r"has 61 GiB of memory, but .*Orin NX.*, has 15\.3 GiB"):
        build_engines(bundle, agx, Here(Stub()), ORIN_NX, verify=unverified, progress=False)
    for memory in (59.0, 61.4):  # firmware leaves more or less of it
        gpu = replace(AGX_ORIN, memory_gib=memory)
        built = build_engines(
            bundle, agx, Here(Stub()), gpu, verify=unverified, force=True, progress=False
        )
        assert built.built


def test_engines_of_another_jetson_are_all_built_again_without_its_timing_cache(
    bundle: Bundle, target: Target
) -> None:
    anywhere = replace(target, compute_capability=None)
    stubs = {}
    for gpu in (AGX_ORIN, ORIN_NX):
        stubs[gpu] = Stub()
        build_engines(bundle, anywhere, Here(stubs[gpu]), gpu, verify=unverified, progress=False)
    assert stubs[ORIN_NX].built == STAGES and stubs[ORIN_NX].caches[0] == b""


def test_a_ceiling_of_scratch_memory_is_given_only_where_the_target_has_one(
    bundle: Bundle, target: Target
) -> None:
    stub = Stub()
    build(bundle, replace(target, workspace_gib=None), stub)
    assert set(stub.workspaces) == {None}
    build(bundle, replace(target, workspace_gib=1.5), stub)
    assert stub.workspaces[-1] == 3 * 2**29


def test_a_second_build_into_a_folder_is_refused_while_the_first_is_at_work(
    bundle: Bundle, target: Target
) -> None:
    seen: list[str] = []

    def meanwhile(folder: Path, stage: str) -> None:
        half = folder / ".prefill_0.engine.1-aa"  # of the first one
        half.write_bytes(b"half")
        with pytest.raises(TrioError, match="another `trio build` is running in .*test-gpu: wait"):
            build(bundle, target, Stub())
        assert half.is_file()
        seen.append(stage)

    build(bundle, target, Stub(), verify=meanwhile, stages=["vision"])
    assert seen == ["vision"]
    build(bundle, target, Stub())


def test_a_target_without_tensorrt_is_refused(bundle: Bundle) -> None:
    with pytest.raises(TrioError, match="target cpu runs onnxruntime"):
        build(bundle, load_target("cpu"), Stub())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "target cpu runs onnxruntime"),
        ("--target h200", "graphs in the ort dialect"),
        ("--target h200 --graphs", "graphs but no weights"),
        ("--target h200 --stage decoder", "no stage 'decoder'"),
    ],
)
def test_what_needs_no_gpu_to_be_seen_is_said_before_the_driver_is_missed(
    options: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_driver() -> None:
        raise TrioError("no NVIDIA driver was found")

    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.bindings.load", no_driver)
    dialect = "ort" if words.endswith("dialect") or not options else "onnx"
    planned = export_model(
        "tiny", tmp_path / "b", graphs_only=True, dialect=dialect, progress=False
    )
    command = ["build", str(planned.path), *options.replace("--graphs", "").split()]
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b" / "engines").exists()


def test_an_unknown_stage_is_named(bundle: Bundle, target: Target) -> None:
    with pytest.raises(TrioError, match="no stage 'decode'; it has vision"):
        build(bundle, target, Stub(), stages=["decode"])


def test_a_bundle_without_weights_is_refused(target: Target, tmp_path: Path) -> None:
    planned = export_model("tiny", tmp_path / "b", graphs_only=True, target="jetson-orin-nano-8gb")
    with pytest.raises(TrioError, match="graphs but no weights"):
        build(planned, target, Stub())


def test_a_disk_that_is_too_full_is_found_before_anything_is_built(
    bundle: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    stub = Stub()
    with pytest.raises(
        TrioError, match="too full: free some space; the engines need about .* are free"
    ):
        build(bundle, target, stub)
    assert stub.built == []


def test_a_disk_that_fills_up_leaves_no_half_engine(
    bundle: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    written = compiling.write_atomically

    def written_on_full_disk(path: Path, content: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            written(path, content)

    monkeypatch.setattr(compiling, "write_atomically", written_on_full_disk)
    with pytest.raises(TrioError, match=r"vision.engine of 8 B \(No space left.*are kept"):
        build(bundle, target, Stub())
    folder = bundle.path / "engines" / "test-gpu"
    assert sorted(files(folder)) == ["build.log", "record.json"]


def test_a_full_disk_that_loses_the_timing_cache_keeps_the_engine(
    bundle: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = compiling.write_atomically

    def full(path: Path, content: Any) -> None:
        if path.name == "timing.cache":
            raise TrioError(f"cannot write {path}: make room on its disk")
        written(path, content)

    monkeypatch.setattr(compiling, "write_atomically", full)
    outcome = build(bundle, target, Stub())
    assert outcome.built == tuple(STAGES) and "timing.cache" not in files(outcome.folder)
    assert "timing.cache: make room" in (outcome.folder / "build.log").read_text()


def test_a_full_disk_that_loses_the_record_is_one_clear_error(
    bundle: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save = Record.save

    def save_on_full_disk(self: Record, folder: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            save(self, folder)

    monkeypatch.setattr(Record, "save", save_on_full_disk)
    with pytest.raises(TrioError, match=r"cannot write .*record\.json .*No space left"):
        build(bundle, target, Stub())


# ------------------------------------------------------------------------------------- the record


@pytest.fixture
def built(bundle: Bundle, target: Target) -> builder.Outcome:
    return build(bundle, target, Stub())


def test_engines_of_another_gpu_or_tensorrt_are_refused(built: builder.Outcome) -> None:
    record = Record.load(built.folder)
    record.require_same(GPU, "10.3.0")
    record.require_same(replace(GPU, driver="13.0"), "10.3.0")  # a newer driver will do
    with pytest.raises(TrioError, match=r"built on NVIDIA H200 .*this is NVIDIA L4 .*`trio build`"):
        record.require_same(Gpu("NVIDIA L4", "8.9", "12.4"), "10.3.0")
    with pytest.raises(TrioError, match=r"by TensorRT 10\.3\.0, but this is 10\.4\.0"):
        record.require_same(GPU, "10.4.0")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            ORIN_NX,
            r"16 multiprocessors, 61\.4 GiB, .*AGX.* this is Orin .*8 multi.*`trio build` here",
        ),
        (replace(AGX_ORIN, memory_gib=29.9), r"61\.4 GiB.*29\.9 GiB.*`trio build` here"),
        (replace(AGX_ORIN, multiprocessors=8), "power mode switches multiprocessors off.*nvpmodel"),
        (replace(AGX_ORIN, model="NVIDIA Jetson Orin Nano"), "`trio build` here"),
    ],
)
def test_engines_of_another_jetson_are_refused_though_cuda_calls_both_orin(
    built: builder.Outcome, other: Gpu, words: str
) -> None:
    record = replace(Record.load(built.folder), gpu=AGX_ORIN)
    with pytest.raises(TrioError, match=f"built on Orin .*{words}"):
        record.require_same(other, "10.3.0")


@pytest.mark.parametrize(
    "same",
    [
        replace(AGX_ORIN, memory_gib=60.9),
        replace(AGX_ORIN, driver="12.8", driver_version="540.5", l4t="36.5"),
        replace(AGX_ORIN, model="NVIDIA Jetson AGX Orin"),  # the module on another board
        Gpu("Orin", "8.7", "12.6"),  # a record of before they were noted
    ],
)
def test_engines_move_between_gpus_of_one_kind(built: builder.Outcome, same: Gpu) -> None:
    replace(Record.load(built.folder), gpu=AGX_ORIN).require_same(same, "10.3.0")
    replace(Record.load(built.folder), gpu=same).require_same(AGX_ORIN, "10.3.0")


def test_missing_short_and_damaged_engines_are_named(built: builder.Outcome) -> None:
    record, file = Record.load(built.folder), built.folder / "embed.engine"
    with pytest.raises(TrioError, match="no engine of decode.*continues where it stopped"):
        record.check_file(built.folder, "decode")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(TrioError, match=r"embed\.engine has 6 bytes where its record says 7"):
        record.check_file(built.folder, "embed")
    file.write_bytes(b"?" * len(whole))
    record.check_file(built.folder, "embed")
    with pytest.raises(TrioError, match="is damaged"):
        record.check_file(built.folder, "embed", verify=True)
    file.unlink()
    with pytest.raises(TrioError, match="is missing"):
        record.check_file(built.folder, "embed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(schema=3), "newer trio-deploy"),
        (lambda raw: raw.pop("gpu"), "is damaged"),
        (lambda raw: raw["limits"].update(colour=1), "is damaged"),
        (lambda raw: raw["stages"]["embed"].update(file="../x"), "is damaged.*name of a file"),
        (lambda raw: raw["stages"]["embed"].update(profiles=[{}]), "is damaged"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(
    built: builder.Outcome, change: Callable[[Any], Any], says: str
) -> None:
    file = built.folder / "record.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(TrioError, match=says):
        Record.load(built.folder)


def test_a_folder_without_a_record_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(TrioError, match="holds no engines.*trio build"):
        Record.load(tmp_path)


# ---------------------------------------------------------------------------------- the first run


def test_a_first_run_takes_inputs_that_mean_something() -> None:
    shapes = {
        "hidden_states": (2, 20, 8),
        "position_ids": (2, 20),
        "lengths": (2,),
        "visual_mask": (2, 20),
        "keep": (2,),
        "width": (1,),
    }
    kinds = {"hidden_states": "f2", "visual_mask": "?"}
    profile = Profile(
        "default",
        {name: (shape,) * 3 for name, shape in shapes.items()},  # type: ignore[misc]
        {"width": ((1,), (9,), (20,))},  # type: ignore[dict-item]
    )
    profile = Profile.from_json(profile.to_json())
    specs = {n: TensorSpec(n, np.dtype(kinds.get(n, "i8")), s) for n, s in shapes.items()}
    inputs = tuple(
        tensor_info("select", name, "float16", shape, is_input=True)
        for name, shape in shapes.items()
    )
    feeds = example_feeds(StageInfo("s", "select", 1, inputs=inputs), specs, profile)
    assert {name: array.shape for name, array in feeds.items()} == shapes
    visual, keep = feeds["visual_mask"].sum(axis=1), feeds["keep"]
    assert (20 - visual + keep == feeds["width"]).all() and (keep < visual).all()
    assert not feeds["visual_mask"][:, [0, -1]].any()


@pytest.mark.parametrize(
    ("version", "dialect", "layout"),
    [("8.6.1", "primitive", "shared"), ("10.15.1", "onnx", "separate")],
)
def test_trio_build_builds_runs_and_resumes(
    version: str,
    dialect: str,
    layout: str,
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = make_target(tmp_path, version, dialect, layout)
    bundle = export_for(llava_checkpoint, tmp_path, target, "1:0.5")
    install(monkeypatch, version)
    command = ["build", str(bundle.path), "--target", str(target)]

    def fails(bundle: Bundle, tensorrt: Any, folder: Path, stage: str) -> None:
        if stage == "prefill_1":
            raise TrioError("out of device memory")
        run_once(bundle, tensorrt, folder, stage)

    with monkeypatch.context() as patched:
        patched.setattr(verify, "run_once", fails)
        assert main(command) == 1
        assert "prefill_1 was built, but does not run: out of dev" in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["kept"] == STAGES[:4]
    assert raw["built"] == ["prefill_1"] + (["decode"] if layout == "separate" else [])
    assert raw["record"]["tensorrt"] == version


def test_an_engine_that_never_ran_to_the_end_is_not_opened(
    original: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.3.0")
    target, tensorrt = load_target(original / "test-gpu.yaml"), load()

    def interrupted(folder: Path, stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, target, tensorrt, stages=["embed"], verify=interrupted)
    folder = bundle.path / "engines" / "test-gpu"
    with pytest.raises(TrioError, match="first run was not completed"):
        TrtRuntime(folder, bundle).open(bundle.graph("embed"))
    build(
        bundle,
        target,
        tensorrt,
        stages=["embed"],
        verify=lambda place, stage: run_once(bundle, tensorrt, place, stage),
    )
    TrtRuntime(folder, bundle).open(bundle.graph("embed"))


def test_a_target_file_of_ones_own_has_to_be_passed_again(
    bundle: Bundle, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["build", str(bundle.path)], ["build", str(bundle.path), "--dry-run"]):
        assert main(command) == 1
        assert "exported for test-gpu, which is a target file of your" in capsys.readouterr().err
    assert main([*command, "--target", str(original / "test-gpu.yaml")]) == 0


def test_an_engine_that_gives_no_numbers_fails_its_first_run(
    original: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.3.0")
    target, tensorrt = load_target(original / "test-gpu.yaml"), load()

    def without_numbers(
        stage: StageInfo, inputs: Any, profile: Profile, corner: str
    ) -> dict[str, np.ndarray]:
        feeds = example_feeds(stage, inputs, profile, corner)
        feeds["image_features"][:] = np.nan
        feeds["source_index"][:] = feeds["source_index"].shape[1]  # the first row of the image
        return feeds

    monkeypatch.setattr(verify, "example_feeds", without_numbers)
    build(bundle, target, tensorrt, stages=["embed"])
    with pytest.raises(TrioError, match="inputs_embeds is not finite"):
        run_once(bundle, tensorrt, bundle.path / "engines" / "test-gpu", "embed")


def test_a_first_run_finds_that_the_largest_shapes_do_not_fit(
    original: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = install(monkeypatch, "10.3.0").cuda
    target, tensorrt = load_target(original / "test-gpu.yaml"), load()
    build(bundle, target, tensorrt, stages=["prefill_0"])
    folder = bundle.path / "engines" / "test-gpu"
    peaks: dict[str, int] = {}
    corner = ""
    allocate = cuda.cudaMalloc

    def noting(size: int) -> Any:
        found = allocate(size)
        peaks[corner] = max(peaks.get(corner, 0), cuda.used())
        return found

    def entering(
        stage: StageInfo, inputs: Any, profile: Profile, which: str
    ) -> dict[str, np.ndarray]:
        nonlocal corner
        corner = f"{profile.name} {which}"
        return example_feeds(stage, inputs, profile, which)

    monkeypatch.setattr(verify, "example_feeds", entering)
    monkeypatch.setattr(cuda, "cudaMalloc", noting)
    run_once(bundle, tensorrt, folder, "prefill_0")
    assert {"prefill opt", "prefill max"} <= peaks.keys() and corner == "decode max"
    cuda.total = (peaks["prefill opt"] + peaks["prefill max"]) // 2
    with pytest.raises(
        TrioError,
        match="largest shapes of the prefill profile, .* limits of test-gpu: .* out of memory",
    ):
        run_once(bundle, tensorrt, folder, "prefill_0")


def test_what_is_for_the_dry_run_alone_is_said(
    bundle: Bundle, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(bundle.path), "--target", str(original / "test-gpu.yaml")]
    assert main([*command, "--tensorrt", "8.6"]) == 1
    assert "--tensorrt is for --dry-run" in capsys.readouterr().err


def test_what_is_for_building_alone_is_said(
    bundle: Bundle, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(bundle.path), "--target", str(original / "test-gpu.yaml"), "--dry-run"]
    assert main([*command, "--force"]) == 1
    assert "--force rebuilds engines" in capsys.readouterr().err
