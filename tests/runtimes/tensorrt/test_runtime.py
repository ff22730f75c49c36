"""The TensorRT runtime on a simulated TensorRT and CUDA: what the pipeline does around engines.

`tests/support/fakes/tensorrt/` acts TensorRT out with ONNX Runtime. That the real one builds and
runs these engines is for `tests/gpu` to show, on a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engines import KINDS, build, export_for, make_target
from tests.support.fakes.tensorrt.cuda import Driver
from tests.support.fakes.tensorrt.install import Simulation, install
from tests.support.pictures import make_picture
from tests.support.waiting import WAIT_S
from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions, TrioError
from trio_deploy.files import sha256_of
from trio_deploy.runtimes import arrays
from trio_deploy.runtimes.registry import open_runtime
from trio_deploy.runtimes.tensorrt.bindings import load
from trio_deploy.runtimes.tensorrt.device import Device, DeviceArray
from trio_deploy.runtimes.tensorrt.runtime import (
    TrtEngine,
    TrtRuntime,
    _Context,
    engine_folder,
)

SCHEDULE = "1:0.4,2:0.2"
COLOR = "what color is the circle ?"
SHARED, ONNX = KINDS[1], KINDS[3]


def ask(text: str, images: int = 1) -> list[dict[str, Any]]:
    image = {"type": "image"}
    return [{"role": "user", "content": [*[image] * images, {"type": "text", "text": text}]}]


def requests(budget: float | None = None) -> list[Request]:
    """Rows of different lengths: one picture, two, none."""
    one, other = make_picture(100, 60), make_picture(40, 90, seed=1)
    return [
        Request(ask(COLOR), [one], max_new_tokens=12, budget=budget),
        Request(ask("is there a red star in the picture ?", 2), [one, other], max_new_tokens=7),
        Request(ask("one two three", 0), [], max_new_tokens=9),
    ]


class Bundles:
    """Bundles of one checkpoint, exported once for each kind of target."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self._made: dict[tuple[str, str, str], tuple[Bundle, Path]] = {}

    def get(self, kind: tuple[str, str, str]) -> tuple[Bundle, Path]:
        if kind not in self._made:
            folder = self._folder / "-".join(kind)
            folder.mkdir()
            target = make_target(folder, *kind)
            self._made[kind] = export_for(self._checkpoint, folder, target, SCHEDULE), target
        return self._made[kind]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, llava_next_checkpoint: Path) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("engines"), llava_next_checkpoint)


class Machine:
    """A simulated GPU host with a bundle's engines on it."""

    def __init__(self, simulation: Simulation, bundle: Bundle, target: Path) -> None:
        self.simulation, self.bundle, self.target = simulation, bundle, target
        self.cuda = simulation.cuda
        self.folder = build(bundle, target, simulation)

    def pipeline(self) -> Pipeline:
        return Pipeline.open(self.bundle, runtime="tensorrt")

    def runtime(self, **options: Any) -> TrtRuntime:
        return TrtRuntime(self.folder, self.bundle, **options)


@pytest.fixture
def shared(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(install(monkeypatch, SHARED[0]), *bundles.get(SHARED))


@pytest.fixture
def copied(bundles: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A bundle of the test's own, whose engines it may damage."""
    bundle, target = bundles.get(SHARED)
    simulation = install(monkeypatch, SHARED[0])
    path = shutil.copytree(bundle.path, tmp_path / "bundle")
    yield Machine(simulation, Bundle.load(path), target)


# ------------------------------------------------------------------------------- what bindings do


def test_a_segment_takes_prompts_and_steps_and_nothing_between_them(shared: Machine) -> None:
    """Its one profile spans both; several new tokens on a past are a size that no request has."""
    engine = shared.runtime().open(shared.bundle.graph("prefill_0"))
    (profile,) = engine.profiles
    prompt, step = (
        {
            name: np.zeros(shapes.max, engine.inputs[name].dtype)
            for name, shapes in use.shapes.items()
        }
        for use in profile.uses
    )
    assert engine._profile(prompt) == engine._profile(step) == 0
    pasts = {name: value for name, value in step.items() if name.startswith("past.")}
    with pytest.raises(TrioError, match="needs .* in prefill_0, whose engine for test-gpu takes"):
        engine._profile(prompt | pasts)


def test_what_the_bindings_raise_is_an_error_of_ours(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = shared.pipeline()
    embed = pipeline.engine("embed")

    def fail(*_: Any) -> None:
        raise RuntimeError("infer_shapes error code: -1")

    monkeypatch.setattr(type(embed._context(0).trt), "infer_shapes", fail)  # type: ignore[attr-defined]
    with pytest.raises(TrioError, match="embed refuses these shapes"):
        pipeline.generate(Request("one two three", max_new_tokens=2))
    with pytest.raises(TrioError, match="embed: "):
        _Context(embed, 7)  # type: ignore[arg-type]


def test_a_cuda_python_newer_than_the_driver_is_named(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.cuda, "cudaSetDevice", lambda _: (35,))
    with pytest.raises(TrioError, match="InsufficientDriver.*; cuda-python must not be .*<13"):
        Device()


# ------------------------------------------------------------------------------------ the answers


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("budget", [None, 1.0])
def test_answers_are_those_of_onnx_runtime(
    bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, str, str],
    budget: float | None,
) -> None:
    bundle, target = bundles.get(kind)
    machine = Machine(install(monkeypatch, kind[0]), bundle, target)
    expected = Pipeline.open(bundle, runtime="onnxruntime", threads=1).generate_batch(
        requests(budget)
    )
    found = machine.pipeline().generate_batch(requests(budget))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(map(np.array_equal, mine.kept, theirs.kept))
        assert mine.layer_ranges == theirs.layer_ranges
        assert mine.timings.keys() == theirs.timings.keys()


def test_a_pipeline_names_the_target_and_the_gpu_that_it_ran_on(shared: Machine) -> None:
    ran, record = shared.pipeline().ran_as, shared.runtime().record
    assert (ran.runtime, ran.target, ran.device) == ("tensorrt", record.target, record.gpu.name)
    assert (ran.dialect, ran.dtype, ran.precision) == (record.dialect, record.dtype, record.dtype)


def test_selections_with_inputs_of_their_own_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llava_next_checkpoint: Path
) -> None:
    """Seeds, and the encoder's scores, which follow the kept tokens from point to point."""
    simulation = install(monkeypatch, SHARED[0])
    target = make_target(tmp_path, *SHARED)
    schedule = "0:0.6:vscan,1:0.4:cls-attention,2:0.2:random"
    bundle = export_for(llava_next_checkpoint, tmp_path, target, schedule)
    machine = Machine(simulation, bundle, target)
    expected = Pipeline.open(bundle, runtime="onnxruntime", threads=1).generate_batch(requests())
    found = machine.pipeline().generate_batch(requests())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert [a.keep_counts for a in found] == [a.keep_counts for a in expected]


def test_weights_that_are_inputs_are_on_the_device_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llava_next_checkpoint: Path
) -> None:
    simulation = install(monkeypatch, ONNX[0])
    target = make_target(tmp_path, *ONNX, weights="inputs")
    bundle = export_for(llava_next_checkpoint, tmp_path, target, SCHEDULE)
    machine = Machine(simulation, bundle, target)
    expected = Pipeline.open(bundle, runtime="onnxruntime", threads=1).generate_batch(requests())
    pipeline = machine.pipeline()
    found = pipeline.generate_batch(requests())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    engines = [pipeline.engine(stage) for stage in bundle.stages]
    matrices = {
        name: bundle.manifest.tensors[name]
        for stage in bundle.manifest.stages
        for name in stage.weight_inputs
    }
    for name, place in matrices.items():
        copies = [e.bound[name] for e in engines if isinstance(e, TrtEngine) and name in e.bound]
        assert copies and len({copy.address for copy in copies}) == 1
        assert (copies[0].shape, copies[0].dtype) == (place.shape, place.dtype)
    assert any(sum(name in e.bound for e in engines) > 1 for name in matrices)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [SHARED, ONNX], ids="-".join)
def test_tokens_are_looked_up_on_the_host_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    llava_next_checkpoint: Path,
    kind: tuple[str, str, str],
) -> None:
    """Recorded steps take the rows that were looked up since."""
    simulation = install(monkeypatch, kind[0])
    target = make_target(tmp_path, *kind)
    target.write_text(target.read_text() + "embeddings: host\n")
    bundle = export_for(llava_next_checkpoint, tmp_path, target, SCHEDULE)
    assert bundle.only("embed").looked_up
    expected = Pipeline.open(bundle, runtime="onnxruntime", threads=1).generate_batch(requests())
    found = Machine(simulation, bundle, target).pipeline().generate_batch(requests())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert simulation.cuda.launches > 0


def test_cuda_python_before_12_8_is_known_by_its_old_name(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = install(monkeypatch, SHARED[0], old_cuda_python=True)
    machine = Machine(simulation, *bundles.get(SHARED))
    assert machine.pipeline().generate_batch(requests())[0].token_ids


def test_rows_join_and_leave_on_the_device(shared: Machine) -> None:
    """Caches are cut to their first rows, and rows copied between them, on the device."""
    from trio_deploy import Batcher

    alone = [shared.pipeline().generate_batch([request])[0] for request in requests()]
    with Batcher(shared.pipeline(), max_rows=2) as batcher:
        handles = [batcher.submit(request) for request in requests()]
        together = [handle.result(WAIT_S) for handle in handles]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


# ------------------------------------------------------------------------- what stays on the device


def test_only_logits_kept_indices_and_scores_leave_the_device(shared: Machine) -> None:
    pipeline = shared.pipeline()
    shared.cuda.fetched.clear()
    answer = pipeline.generate(Request(ask(COLOR), [make_picture()], max_new_tokens=8))
    text = pipeline.bundle.config.text
    logits = 4 * text.vocab_size
    index = [8 * count for _, _, count in answer.layer_ranges[1:]]
    converged = [1, 1]
    first = [logits, *(size for pair in zip(converged, index, strict=True) for size in pair)]
    scores = [4 * count for _, _, count in answer.layer_ranges[:-1]]  # looked at after the logits
    steps = [logits] * (len(answer.token_ids) - 1)
    assert shared.cuda.fetched == first + scores + steps


def test_a_second_request_needs_no_more_memory(shared: Machine) -> None:
    pipeline = shared.pipeline()
    pipeline.generate_batch(requests())
    allocated = set(shared.cuda.allocations)
    pipeline.generate_batch(requests())
    assert set(shared.cuda.allocations) == allocated


def test_contexts_take_turns_at_one_scratch_buffer(shared: Machine) -> None:
    runtime = shared.runtime()
    runtime.need_scratch(4096)
    first, _ = runtime.scratch()
    runtime.need_scratch(1000)
    assert runtime.scratch() == (first, 4096)
    runtime.need_scratch(1 << 20)
    larger, size = runtime.scratch()
    assert size == 1 << 20
    assert larger.address != first.address


def test_a_pipeline_that_is_gone_leaves_no_memory(shared: Machine) -> None:
    pipeline = shared.pipeline()
    pipeline.generate_batch(requests())
    assert shared.cuda.used()
    del pipeline
    gc.collect()
    assert not shared.cuda.used()
    assert not shared.cuda.pinned


# ------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize(("kind", "sides"), [(SHARED, 2), (ONNX, 1)])
def test_decode_steps_are_recorded_once_a_side(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str, str], sides: int
) -> None:
    machine = Machine(install(monkeypatch, kind[0]), *bundles.get(kind))
    answer = machine.pipeline().generate(Request(ask(COLOR), [make_picture()], max_new_tokens=10))
    assert machine.cuda.launches == len(answer.token_ids) - 1 - sides


def test_what_cannot_be_recorded_runs_all_the_same(shared: Machine) -> None:
    expected = shared.pipeline().generate_batch(requests())
    shared.cuda.recordable = False
    shared.cuda.launches = 0
    pipeline = shared.pipeline()
    with pytest.warns(UserWarning, match="decode steps run without CUDA graphs"):
        found = pipeline.generate_batch(requests())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert shared.cuda.launches == 0


def test_bound_runs_follow_what_the_host_writes(shared: Machine) -> None:
    runtime = shared.runtime()
    embed = runtime.open(shared.bundle.graph("embed"))
    text = shared.bundle.config.text
    ids, source = np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64)
    nothing = np.zeros((0, text.hidden_size), np.float32)
    out = np.empty((2, 1, text.hidden_size), np.float32)
    feeds = {"input_ids": ids, "image_features": nothing, "source_index": source}
    step = runtime.sequence([embed.bind(feeds, {"inputs_embeds": out})])
    for number in range(5):
        ids[:, 0] = number, number + 1
        step()
        np.testing.assert_array_equal(out, embed.run(feeds)["inputs_embeds"])
    assert runtime.recordings == 1


# ------------------------------------------------------------------------------------ bad input


def test_no_driver_is_an_error_before_tensorrt_is_touched(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    machine = Machine(install(monkeypatch, SHARED[0]), *bundles.get(SHARED))
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.device.load_driver", missing)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TrioError, match="no NVIDIA driver was found.*--runtime onnxruntime"):
        machine.pipeline()


@pytest.mark.parametrize("driver", [Driver(gpus=0), Driver(status=100)])
def test_a_driver_without_a_gpu_is_an_error(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    machine = Machine(install(monkeypatch, SHARED[0]), *bundles.get(SHARED))
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.device.load_driver", lambda: driver)
    with pytest.raises(TrioError, match="finds no GPU.*CUDA_VISIBLE_DEVICES"):
        machine.pipeline()


def test_no_tensorrt_is_an_error(shared: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(TrioError, match="TensorRT is not installed.*JetPack"):
        load()


def test_a_tensorrt_that_does_not_load_is_an_error(
    shared: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrioError, match="does not load .libnvinfer.so.10"):
        load()


def test_an_old_tensorrt_is_an_error(shared: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "8.5.3")
    with pytest.raises(TrioError, match="TensorRT 8.5.3 is too old: 8.6 or later"):
        load()


def test_no_cuda_python_is_an_error(shared: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cuda.bindings.runtime")
    with pytest.raises(TrioError, match="cuda-python is not installed"):
        shared.pipeline()


def test_engines_of_another_gpu_are_refused(
    shared: Machine, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, SHARED[0], gpu="NVIDIA L4", capability=(8, 9))
    with pytest.raises(TrioError, match=r"built on NVIDIA H200 .*9\.0.*this is NVIDIA L4"):
        shared.pipeline()


def test_engines_of_another_tensorrt_are_refused(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0")
    with pytest.raises(TrioError, match=r"built by TensorRT 10\.3\.0, but this is 10\.4\.0"):
        shared.pipeline()


def test_a_truncated_engine_is_refused(copied: Machine) -> None:
    file = copied.folder / "prefill_1.engine"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(TrioError, match="prefill_1.engine.*truncated"):
        copied.pipeline()


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def test_a_damaged_engine_is_refused(copied: Machine) -> None:
    damage(copied.folder / "prefill_1.engine")
    with pytest.raises(TrioError, match="prefill_1.engine is damaged: run `trio build` again"):
        copied.pipeline()


def test_an_engine_that_tensorrt_does_not_take_is_an_error(copied: Machine) -> None:
    file = copied.folder / "prefill_1.engine"
    damage(file)
    record = json.loads((copied.folder / "record.json").read_text())
    record["stages"]["prefill_1"]["sha256"] = sha256_of(file)
    (copied.folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(TrioError, match="prefill_1.engine does not load: Serialization.*--force"):
        copied.pipeline()


def test_an_engine_is_compared_with_its_checksum_once_a_process(
    copied: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def counted(file: Path) -> str:
        compared.append(file.stem)
        return sha256_of(file)

    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.record.sha256_of", counted)
    copied.pipeline()
    assert sorted(compared) == sorted(copied.bundle.stages)
    copied.pipeline()
    assert len(compared) == len(copied.bundle.stages)
    file = copied.folder / "embed.engine"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    copied.pipeline()
    assert compared[len(copied.bundle.stages) :] == ["embed"], "a file that was changed is another"


def test_engines_of_another_export_are_refused(copied: Machine) -> None:
    record = json.loads((copied.folder / "record.json").read_text())
    record["stages"]["select_1"]["graph_sha256"] = "0" * 64
    (copied.folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(TrioError, match="built from another select_1.onnx.*`trio build` again"):
        copied.pipeline()


def test_a_bundle_without_engines_is_an_error(copied: Machine) -> None:
    shutil.rmtree(copied.folder)
    with pytest.raises(TrioError, match="no TensorRT engines.*`trio build .*`, or run its graphs"):
        copied.pipeline()


def test_one_of_several_targets_must_be_chosen(copied: Machine) -> None:
    for name in ("one", "two"):
        shutil.copytree(copied.folder, copied.folder.parent / name)
    shutil.rmtree(copied.folder)
    with pytest.raises(TrioError, match="has engines for one, two: choose one with --target"):
        engine_folder(copied.bundle)
    with pytest.raises(TrioError, match="has engines for one, two, not for three"):
        engine_folder(copied.bundle, "three")
    assert engine_folder(copied.bundle, "two").name == "two"


EXCEEDED = [
    ({"prompt": ask("one " * 260, 0)}, 1, "max_text_tokens"),
    ({"prompt": ask(COLOR, 4), "images": [make_picture(96, 96)] * 4}, 1, "max_visual_tokens"),
    ({"prompt": ask(COLOR), "images": [make_picture()]}, 5, "max_batch"),
    ({"prompt": ask(COLOR), "images": [make_picture()], "max_new_tokens": 500}, 1, "max_new"),
]


@pytest.mark.parametrize(("request_", "rows", "limit"), EXCEEDED)
def test_what_exceeds_a_profile_names_the_limit(
    shared: Machine, request_: dict[str, Any], rows: int, limit: str
) -> None:
    pipeline = shared.pipeline()
    with pytest.raises(TrioError, match=rf"takes \d+ to \d+: raise .*{limit}.*`trio build` again"):
        pipeline.generate_batch([Request(**request_)] * rows)
    # and the next request is answered
    assert pipeline.generate_batch(requests())[0].token_ids


def test_a_budget_beyond_the_caches_of_an_engine_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llava_next_checkpoint: Path
) -> None:
    """Updated in place, a cache has one capacity, which the largest allowed budget settles."""
    simulation = install(monkeypatch, ONNX[0])
    target = make_target(tmp_path, *ONNX)
    target.write_text(target.read_text().replace("limits:", "limits:\n  max_budget: 0.5"))
    bundle = export_for(llava_next_checkpoint, tmp_path, target, SCHEDULE)
    pipeline = Machine(simulation, bundle, target).pipeline()
    stages = pipeline._stages
    capacities = [stages.capacity(name, 1) for name in stages.segments]
    assert capacities == sorted(capacities, reverse=True) and len(set(capacities)) == 3
    pictures = [make_picture(96, 96)] * 2
    asked = Request(ask(COLOR, 2), pictures, max_new_tokens=20)
    assert pipeline.generate_batch([asked])[0].token_ids
    monkeypatch.setattr(stages, "encode_images", None)
    with pytest.raises(TrioError, match=r"KV cache of layers 1 to \d.*raise max_budget.*--target"):
        pipeline.generate_batch([replace(asked, budget=1.0)])


def test_requests_of_all_lengths_keep_no_more_memory_than_the_plan_counts(shared: Machine) -> None:
    pipeline = shared.pipeline()
    device = pipeline.engine("embed").runtime.device  # type: ignore[attr-defined]
    for number in range(30):
        text = "one " * (1 + 7 * number % 40)
        image = [make_picture(30 + 5 * number % 70, 40 + 3 * number % 60)]
        pipeline.generate(Request(ask(text), image, max_new_tokens=1 + number % 9))
        assert shared.cuda.used() <= device.cache_limit
    before = set(shared.cuda.allocations)
    pipeline.generate(Request(ask(text), image, max_new_tokens=1 + number % 9))
    assert set(shared.cuda.allocations) == before


def test_too_little_memory_for_an_engine_says_what_was_needed(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(install(monkeypatch, SHARED[0]), *bundles.get(SHARED))
    machine = Machine(install(monkeypatch, SHARED[0], memory=600), *bundles.get(SHARED))
    with pytest.raises(TrioError, match=r"out of memory: the engine of \w+ needs at least"):
        machine.pipeline()


def test_too_little_memory_for_a_request_says_what_was_needed(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = install(monkeypatch, SHARED[0])
    pipeline = Machine(simulation, *bundles.get(SHARED)).pipeline()
    simulation.cuda.total = simulation.cuda.used() + 100_000
    with pytest.raises(TrioError, match=r"out of memory: .*MiB are needed for .* MiB are free"):
        pipeline.generate_batch(requests())
    simulation.cuda.total = 1 << 30
    assert pipeline.generate_batch(requests())[0].token_ids


def test_an_engine_takes_the_memory_that_was_kept_for_requests(shared: Machine) -> None:
    runtime = shared.runtime()
    runtime.device.empty((1 << 20,), np.bool_)
    shared.cuda.total = shared.cuda.used() + 100
    runtime.open(shared.bundle.graph("embed"))
    assert not shared.cuda.used()


NO_ROOM = "Error Code 2: OutOfMemory (Requested size was 5000 bytes.)"


def test_a_context_takes_the_memory_that_was_kept_for_requests(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = shared.runtime()
    embed = runtime.open(shared.bundle.graph("embed"))
    runtime.device.empty((1 << 20,), np.bool_)
    made, lacking = embed.trt._context, True

    def context() -> Any:
        if lacking or shared.cuda.used() > 1 << 20:
            embed.trt.logger.log(1, NO_ROOM)
            return None
        return made()

    monkeypatch.setattr(embed.trt, "_context", context)
    embed.trt.logger.log(1, "an older trouble")
    with pytest.raises(TrioError) as caught:
        _Context(embed, 0)
    assert re.search(
        r"out of memory: to run embed takes .* MiB of scratch memory.* MiB of its engine, and .* "
        r"MiB are free; end other.* limits of test-gpu.*Requested size was 5000 bytes",
        str(caught.value),
    )
    assert "older" not in str(caught.value)
    runtime.device.empty((1 << 20,), np.bool_)
    lacking = False
    assert _Context(embed, 0).trt is not None


def test_a_run_that_lacks_memory_says_what_was_needed(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = shared.pipeline()
    embed: Any = pipeline.engine("embed")
    kind = type(embed._context(0).trt)
    with monkeypatch.context() as patched:
        patched.setattr(kind, "execute_async_v3", lambda self, _: self._fail(NO_ROOM))
        with pytest.raises(TrioError, match="out of memory: to run embed takes .* 5000 bytes"):
            pipeline.generate(Request("one two three", max_new_tokens=2))
    assert pipeline.generate(Request("one two three", max_new_tokens=2)).token_ids


def test_a_run_that_fails_quotes_no_older_errors(
    shared: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = shared.pipeline()
    embed: Any = pipeline.engine("embed")
    kind = type(embed._context(0).trt)
    embed.trt.logger.log(1, "CUDA error: out of memory")
    monkeypatch.setattr(kind, "execute_async_v3", lambda *_: False)
    with pytest.raises(TrioError, match="^embed failed: it gave no reason$"):
        pipeline.generate(Request("one two three", max_new_tokens=2))


def test_options_of_other_runtimes_are_refused(shared: Machine) -> None:
    for options in ({"provider": "cuda"}, {"precision": "bfloat16"}, {"threads": 2}):
        with pytest.raises(TrioError, match="TensorRT"):
            open_runtime(RuntimeOptions("tensorrt", **options), shared.bundle)  # type: ignore[arg-type]


def test_feeds_of_a_wrong_type_are_refused(shared: Machine) -> None:
    runtime = shared.runtime()
    vision = runtime.open(shared.bundle.graph("vision"))
    shape = (1, 3, 32, 32)
    with pytest.raises(TrioError, match="pixel_values must be"):
        vision.run({"pixel_values": np.zeros(shape, np.float16)})
    with pytest.raises(TrioError, match="pixel_values of vision must be"):
        vision.run({"pixel_values": runtime.device.empty(shape, np.float16)})


# ------------------------------------------------------------------------------------ memory


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    install(monkeypatch)
    return Device()


PARTS = [
    np.s_[:, :, :5],
    np.s_[1:3],
    np.s_[1:2, :, 2:7],
    np.s_[:, 1:2, :, 3:6],
    np.s_[:, :, 3:4, 1:2],
    np.s_[0:0],
    np.s_[:, :, 9:],
    np.s_[:],
]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.bool_])
def test_parts_are_copied_and_cleared_as_numpy_does(device: Device, part: Any, kind: type) -> None:
    values = (np.random.default_rng(0).standard_normal((3, 2, 9, 8)) > 0).astype(kind)
    there, expected = device.upload(np.ones_like(values)), np.ones_like(values)
    arrays.copy(there[part], device.upload(values)[part])
    expected[part] = values[part]
    np.testing.assert_array_equal(device.download(there), expected)
    np.testing.assert_array_equal(arrays.to_host(there[part]), expected[part])
    arrays.copy(there[part], np.zeros_like(values)[part] + kind(1))
    expected[part] = 1
    np.testing.assert_array_equal(device.download(there), expected)
    arrays.clear(there[part])
    expected[part] = 0
    np.testing.assert_array_equal(device.download(there), expected)


def test_arrays_are_joined_where_they_are(device: Device) -> None:
    values = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 3), np.float32)]
    joined = arrays.concatenate([device.upload(value) for value in values])
    assert isinstance(joined, DeviceArray)
    np.testing.assert_array_equal(arrays.to_host(joined), np.concatenate(values))


def test_memory_comes_back_when_nobody_needs_it(device: Device) -> None:
    array = device.empty((1000,), np.float32)
    part, address = array[10:20], array.address
    del array
    assert device.empty((1000,), np.float32).address != address, "a part needs the whole"
    del part
    assert device.empty((900,), np.float32).address == address


def test_what_was_kept_is_given_back_before_memory_runs_out(device: Device) -> None:
    cuda = device._cuda
    cuda.total = 10 << 20
    array = device.empty((8 << 20,), np.bool_)
    del array
    assert len(device.empty((9 << 20,), np.bool_)) == 9 << 20


def test_failed_calls_say_which_and_why(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device._cuda, "cudaStreamSynchronize", lambda stream: (1,))
    with pytest.raises(TrioError, match=r"cudaStreamSynchronize failed: .*cudaErrorInvalidValue"):
        device.synchronize()
