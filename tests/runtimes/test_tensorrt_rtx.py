"""TensorRT-RTX: compiled anywhere, run on a card, where each engine runs first.

Most of it is on the simulated TensorRT-RTX. The tests marked `rtx` compile with the real one, which
needs no GPU, and skip where its wheel is missing; that its engines run is for `tests/gpu` to show.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes.tensorrt.install import Simulation, install
from tests.support.pictures import make_picture
from tests.support.rtx import require_compiler
from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions, TrioError, export_model
from trio_deploy.cli.main import main
from trio_deploy.runtimes.registry import open_runtime
from trio_deploy.runtimes.tensorrt.bindings import MODULES, load
from trio_deploy.runtimes.tensorrt.record import Record
from trio_deploy.runtimes.tensorrt.runtime import TrtRuntime
from trio_deploy.runtimes.tensorrt_rtx import RUNTIME_CACHE, RtxRuntime

RTX = "1.7.1.116"
TARGET = """
description: a card of the tests
runtime: tensorrt-rtx
compute_capabilities: ["8.6", "8.9"]
dialect: onnx
weights: inputs
dtype: {dtype}
memory_gib: 2
limits: {{max_batch: 2, max_images: 1, max_text_tokens: 64, max_visual_tokens: 176,
  max_new_tokens: 24, typical_text_tokens: 16, typical_visual_tokens: 60, typical_new_tokens: 8}}
"""


def exported(checkpoint: Path, folder: Path, dtype: str = "float32") -> Bundle:
    """A bundle for a target with small limits, without engines."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "card.yaml"
    target.write_text(TARGET.format(dtype=dtype))
    return export_model(
        checkpoint, folder / "bundle", schedule="1:0.5", target=target, progress=False
    )


def build(bundle: Bundle, *options: str) -> int:
    target = bundle.path.parent / "card.yaml"
    return main(["build", str(bundle.path), "--target", str(target), *options])


def questions() -> list[Request]:
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    plain = [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}]
    return [
        Request(asked, [make_picture(40, 40)], max_new_tokens=6),
        Request(plain, [], max_new_tokens=6),
    ]


# ------------------------------------------------------------------------ on a simulated card


@pytest.fixture(scope="module")
def original(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines that were compiled where there is no GPU."""
    folder = tmp_path_factory.mktemp("rtx")
    bundle = exported(llava_checkpoint, folder)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, RTX)
        patch.setattr("trio_deploy.runtimes.tensorrt.device.load_driver", _no_driver)
        assert build(bundle) == 0
    return folder


def _no_driver() -> None:
    raise OSError("libcuda.so.1: cannot open shared object file")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(original / "bundle", tmp_path / "bundle"))


Card = Callable[..., Simulation]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """`card(gpu, capability)` puts a card into this machine."""

    def put(gpu: str = "NVIDIA GeForce RTX 4090", capability: tuple[int, int] = (8, 9)) -> Any:
        return install(monkeypatch, RTX, gpu=gpu, capability=capability)

    return put


def engines(bundle: Bundle) -> Path:
    return bundle.path / "engines" / "card"


def kept(bundle: Bundle) -> dict[str, int]:
    """Folder of kernels of a card and driver → number of engines with kernels there."""
    folders = (engines(bundle) / RUNTIME_CACHE).glob("*")
    return {folder.name: len(list(folder.glob("*.cache"))) for folder in folders}


def test_a_record_names_the_cards_compiled_for_and_no_gpu(bundle: Bundle) -> None:
    raw = json.loads((engines(bundle) / "record.json").read_bytes())
    assert (raw["flavour"], raw["tensorrt"]) == ("rtx", RTX)
    assert raw["compute_capabilities"] == ["8.6", "8.9"] and "gpu" not in raw
    record = Record.load(engines(bundle))
    assert json.loads(json.dumps(record.to_json())) == raw and list(record.stages) == list(
        bundle.stages
    )
    assert not any(stage.verified for stage in record.stages.values())
    assert not (engines(bundle) / "timing.cache").exists()


def test_the_compiler_is_told_the_cards_and_builds_nothing_twice(
    bundle: Bundle, original: Path, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    simulation = card()
    shutil.copy(original / "card.yaml", bundle.path.parent)
    assert build(bundle) == 0
    said = capsys.readouterr().out
    assert said.count("kept") == len(bundle.stages) and "built in" not in said
    assert "for compute capability 8.6, 8.9, TensorRT-RTX 1.7.1.116" in said
    assert "the first `trio run` compiles what depends on it" in said
    assert build(bundle, "--force", "--stage", "embed") == 0
    _, config = simulation.tensorrt.last
    assert config.capabilities == ["SM86", "SM89"] and config.cache is None


def test_answers_are_those_of_onnx_runtime(bundle: Bundle, card: Card) -> None:
    card()
    expected = Pipeline.open(bundle, runtime="onnxruntime").generate_batch(questions())
    found = Pipeline.open(bundle).generate_batch(questions())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]


def test_every_engine_runs_first_on_each_card_and_its_kernels_are_kept(
    bundle: Bundle, card: Card
) -> None:
    simulation = card()
    Pipeline.open(bundle)
    stages = {kernel.split()[0] for kernel in simulation.tensorrt.compiled}
    assert stages == set(bundle.stages)
    (here,) = kept(bundle)
    assert here.startswith("NVIDIA-GeForce-RTX-4090-")
    assert kept(bundle) == {here: len(bundle.stages)}
    again = card()
    Pipeline.open(bundle)
    assert again.tensorrt.compiled == []
    shutil.rmtree(engines(bundle) / RUNTIME_CACHE)
    anew = card()
    Pipeline.open(bundle)
    assert len(anew.tensorrt.compiled) == len(simulation.tensorrt.compiled)
    card("NVIDIA GeForce RTX 3060", (8, 6))
    Pipeline.open(bundle)
    assert len(kept(bundle)) == 2


def test_kernels_of_other_shapes_are_kept_when_the_pipeline_is_gone(
    bundle: Bundle, card: Card
) -> None:
    card()
    pipeline = Pipeline.open(bundle)
    pipeline.generate_batch(questions())
    del pipeline
    again = card()
    Pipeline.open(bundle).generate_batch(questions())
    assert again.tensorrt.compiled == []


def test_a_rebuilt_engine_runs_first_again(bundle: Bundle, card: Card) -> None:
    card()
    Pipeline.open(bundle)
    file = engines(bundle) / "record.json"
    raw = json.loads(file.read_bytes())
    raw["stages"]["embed"]["sha256"] = "0" * 64
    file.write_text(json.dumps(raw))
    runtime = RtxRuntime(engines(bundle), bundle)
    stages = runtime.record.stages
    assert [name for name in stages if not runtime._file(name).is_file()] == ["embed"]


def test_an_engine_that_does_not_run_here_is_named_and_tried_again(
    bundle: Bundle, card: Card
) -> None:
    simulation = card()
    context = simulation.tensorrt.IExecutionContext
    runs = context.execute_async_v3
    context.execute_async_v3 = lambda self, stream: self._fail("unspecified launch failure")
    with pytest.raises(
        TrioError, match="engine of .* does not run on NVIDIA GeForce RTX 4090.*launch failure"
    ):
        Pipeline.open(bundle)
    assert sum(kept(bundle).values()) == 0
    context.execute_async_v3 = runs
    Pipeline.open(bundle)
    assert sum(kept(bundle).values()) == len(bundle.stages)


def test_kernels_that_cannot_be_kept_are_a_warning(
    bundle: Bundle, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise TrioError("the disk is full")

    card()
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt_rtx.write_atomically", full)
    with pytest.warns(UserWarning, match="not kept, so the next start compiles them again"):
        assert Pipeline.open(bundle).generate_batch(questions())


def test_what_cannot_be_recorded_runs_without_a_graph(bundle: Bundle, card: Card) -> None:
    card().tensorrt.recordable = False
    pipeline = Pipeline.open(bundle)
    with pytest.warns(UserWarning, match="without CUDA graphs: TensorRT-RTX .* cannot record dec"):
        pipeline.generate_batch(questions())


def test_a_card_that_was_not_compiled_for_is_refused(bundle: Bundle, card: Card) -> None:
    card("NVIDIA GeForce RTX 5090", (12, 0))
    with pytest.raises(
        TrioError, match="compiled for compute capability 8.6, 8.9, but this is .*RTX 5090"
    ):
        Pipeline.open(bundle)


def test_a_library_that_did_not_compile_them_is_refused(
    bundle: Bundle, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card()
    install(monkeypatch, "1.8.0", capability=(8, 9))
    with pytest.raises(TrioError, match="built by TensorRT-RTX 1.7.1.116, but this is 1.8.0"):
        Pipeline.open(bundle)


def test_the_engines_of_a_target_say_whose_they_are(bundle: Bundle, card: Card) -> None:
    card()
    opened = open_runtime(RuntimeOptions(target="card"), bundle)
    assert isinstance(opened, RtxRuntime)


def test_tensorrt_does_not_take_engines_of_tensorrt_rtx(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.15.1")
    with pytest.raises(TrioError, match="of TensorRT-RTX 1.7.1.116, .* --runtime tensorrt-rtx"):
        TrtRuntime(engines(bundle), bundle)


def test_no_driver_is_one_sentence(
    bundle: Bundle, card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card()
    monkeypatch.setitem(sys.modules, MODULES["rtx"], None)  # which is not worth installing then
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.device.load_driver", _no_driver)
    assert main(["run", str(bundle.path), "--target", "card", "--prompt", "hi"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("trio: no NVIDIA driver was found") and said.count("\n") == 1


def test_no_wheel_is_one_sentence(
    bundle: Bundle,
    original: Path,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card()
    monkeypatch.setitem(sys.modules, MODULES["rtx"], None)
    shutil.copy(original / "card.yaml", bundle.path.parent)
    for command in (build, lambda bundle: main(["run", str(bundle.path), "--prompt", "hi"])):
        assert command(bundle) == 1
        assert "not installed: pip install 'trio-deploy[rtx]'" in capsys.readouterr().err


def test_trio_check_compares_engines_that_take_weights_as_inputs(
    bundle: Bundle, card: Card, llava_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("polygraphy")
    card()
    assert main(["check", str(bundle.path), "--checkpoint", str(llava_checkpoint)]) == 0
    assert "against ONNX Runtime" in capsys.readouterr().out


def test_a_dry_run_reads_the_newest_table_and_takes_no_version_of_tensorrt(
    bundle: Bundle, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(original / "card.yaml", bundle.path.parent)
    assert build(bundle, "--dry-run") == 0
    assert "for card, TensorRT-RTX (operator table of 10.15)" in capsys.readouterr().out
    assert build(bundle, "--dry-run", "--tensorrt", "10.3") == 1
    assert "a target of TensorRT-RTX: leave it out" in capsys.readouterr().err


# ------------------------------------------------------------------------ with the real compiler


@pytest.fixture(scope="module")
def compiled(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose engines the real compiler made."""
    require_compiler()
    bundle = exported(llava_checkpoint, tmp_path_factory.mktemp("real"), "float16")
    assert build(bundle) == 0
    return bundle


@pytest.mark.rtx
def test_the_simulation_has_no_name_that_tensorrt_rtx_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_compiler()
    real = importlib.import_module(MODULES["rtx"])
    module = install(monkeypatch, RTX).tensorrt
    for kind in (getattr(module, name) for name in dir(module) if name[0].isupper()):
        if not inspect.isclass(kind):
            continue
        members = getattr(kind, "__members__", vars(kind))
        mine = {name for name in members if not name.startswith("_")}
        assert mine <= set(dir(getattr(real, kind.__name__))), kind.__name__


@pytest.mark.rtx
def test_trio_build_compiles_a_bundle_without_a_gpu(compiled: Bundle) -> None:
    record = Record.load(engines(compiled))
    assert list(record.stages) == list(compiled.stages)
    assert (record.flavour, record.gpu, record.tensorrt) == ("rtx", None, load("rtx").version)
    assert record.compute_capabilities == ("8.6", "8.9")
    assert "==== decode" in (engines(compiled) / "build.log").read_text()


@pytest.mark.rtx
def test_a_damaged_engine_alone_is_compiled_again(
    compiled: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    file = engines(compiled) / "embed.engine"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(TrioError, match=r"embed.engine is damaged: run `trio build` again"):
        Record.load(engines(compiled)).check_file(engines(compiled), "embed", verify=True)
    assert build(compiled) == 0
    said = capsys.readouterr().out
    assert said.count("built in") == 1 and said.count("kept") == len(compiled.stages) - 1


@pytest.mark.rtx
def test_an_engine_does_not_load_without_a_driver(
    compiled: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    from trio_deploy.runtimes.tensorrt.device import require_driver

    try:
        require_driver()
    except TrioError:
        plan = (engines(compiled) / "embed.engine").read_bytes()
        with pytest.raises(TrioError, match=r"embed.engine does not load: .+"):
            load("rtx").deserialize(plan, "embed.engine")
        assert main(["run", str(compiled.path), "--prompt", "hi"]) == 1
        assert "no NVIDIA driver was found" in capsys.readouterr().err
    else:
        pytest.skip("there is a driver")
