"""TensorRT itself, on a GPU: it builds these graphs, they compute what ONNX Runtime does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.engines import TARGET
from tests.support.gpu_host import Host
from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request, TrioError, export_model
from trio_deploy.runtimes import arrays
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.build import build_engines
from trio_deploy.runtimes.tensorrt.compiling import ChildCompiler
from trio_deploy.runtimes.tensorrt.first_run import run_once
from trio_deploy.runtimes.tensorrt.record import RECORD, Record
from trio_deploy.runtimes.tensorrt.runtime import TrtRuntime, engine_folder
from trio_deploy.runtimes.tensorrt.target import parse_version
from trio_deploy.verify.compare import TOLERANCES
from trio_deploy.verify.engines import compare_engines

pytestmark = pytest.mark.gpu

SCHEDULE = "1:0.5,3:0.25"
LAYOUTS = ("shared", "separate")


def questions() -> list[Request]:
    words = "what is in the picture , and what is beside it ?"
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    plain = [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}]
    return [
        Request(asked, [make_picture(100, 60)], max_new_tokens=16),
        Request(plain, [], max_new_tokens=12),
    ]


class Built:
    """Bundles with engines, each made once."""

    def __init__(self, folder: Path, checkpoint: Path, host: Host) -> None:
        self._folder, self._checkpoint, self._host = folder, checkpoint, host
        self._made: dict[tuple[str, str], Bundle] = {}

    def get(self, layout: str, dtype: str = "float32") -> Bundle:
        if layout not in self._host.layouts:
            pytest.skip(f"TensorRT {self._host.tensorrt.version} decodes separately")
        if (layout, dtype) not in self._made:
            self._made[layout, dtype] = self._build(layout, dtype)
        return self._made[layout, dtype]

    def _build(self, layout: str, dtype: str) -> Bundle:
        host = self._host
        folder = self._folder / f"{layout}-{dtype}"
        folder.mkdir()
        release = ".".join(map(str, parse_version(host.tensorrt.version)))
        text = TARGET.format(
            tensorrt=release, dialect=host.dialect, layout=layout, weights="constants"
        )
        text = text.replace(
            'compute_capability: "9.0"', f'compute_capability: "{host.gpu.compute_capability}"'
        )
        (folder / "here.yaml").write_text(text.replace("dtype: float32", f"dtype: {dtype}"))
        bundle = export_model(
            self._checkpoint,
            folder / "bundle",
            schedule=SCHEDULE,
            target=folder / "here.yaml",
            progress=False,
        )
        build_engines(
            bundle,
            load_target(folder / "here.yaml"),
            ChildCompiler(host.tensorrt.version),
            host.gpu,
            verify=lambda place, stage: run_once(bundle, host.tensorrt, place, stage),
            progress=False,
        )
        return bundle


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, host: Host) -> Built:
    return Built(tmp_path_factory.mktemp("built"), checkpoint, host)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_compute_what_onnx_runtime_does(built: Built, layout: str, dtype: str) -> None:
    bundle = built.get(layout, dtype)
    runtime, reference = TrtRuntime(engine_folder(bundle), bundle), OrtRuntime()
    rows = compare_engines(
        {stage: runtime.record.stages[stage].profiles for stage in bundle.stages},
        lambda stage: reference.open(bundle.graph(stage)),
        lambda stage: runtime.open(bundle.graph(stage)),
        TOLERANCES[dtype],
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_onnx_runtime(built: Built, layout: str) -> None:
    bundle = built.get(layout)
    expected = Pipeline.open(bundle, runtime="onnxruntime").generate_batch(questions())
    found = Pipeline.open(bundle, runtime="tensorrt").generate_batch(questions())
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert all(map(np.array_equal, found[0].kept, expected[0].kept))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_steps_give_what_plain_ones_give(built: Built, layout: str) -> None:
    bundle = built.get(layout, "float16")
    pipeline = Pipeline.open(bundle, runtime="tensorrt")
    runtime = pipeline.engine("embed").runtime  # type: ignore[attr-defined]
    recorded = pipeline.generate_batch(questions())
    assert runtime.recordings > 0
    runtime.cuda_graphs = False
    plain = pipeline.generate_batch(questions())
    assert [a.token_ids for a in plain] == [a.token_ids for a in recorded]


def test_a_second_request_needs_no_more_memory(built: Built, host: Host) -> None:
    pipeline = Pipeline.open(built.get("separate"), runtime="tensorrt")
    pipeline.generate_batch(questions())
    before, _ = host.device.memory()
    for _ in range(3):
        pipeline.generate_batch(questions())
    assert host.device.memory()[0] >= before - (8 << 20)


def test_a_damaged_engine_is_refused_and_the_process_lives(built: Built, tmp_path: Path) -> None:
    """In a process of its own: what TensorRT makes of such a file may end it."""
    original = built.get("separate")
    bundle = Bundle.load(shutil.copytree(original.path, tmp_path / "bundle"))
    folder = engine_folder(bundle)
    file = folder / "prefill_0.engine"
    content = bytearray(file.read_bytes())
    content[64:4096] = bytes(len(content[64:4096]))
    file.write_bytes(content)
    program = f"""
from trio_deploy import Pipeline, TrioError
try:
    Pipeline.open({str(bundle.path)!r}, runtime="tensorrt")
except TrioError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "prefill_0.engine is damaged" in out.stdout


def test_engines_of_another_tensorrt_are_refused(built: Built, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(built.get("separate").path, tmp_path / "bundle"))
    folder = engine_folder(bundle)
    replace(Record.load(folder), tensorrt="8.5.0").save(folder)
    assert (folder / RECORD).is_file()
    with pytest.raises(TrioError, match=r"built by TensorRT 8\.5\.0"):
        Pipeline.open(bundle, runtime="tensorrt")


def test_a_request_beyond_the_profiles_is_refused(built: Built) -> None:
    pipeline = Pipeline.open(built.get("separate"), runtime="tensorrt")
    with pytest.raises(TrioError, match="max_new_tokens"):
        pipeline.generate(Request("one two three", max_new_tokens=1000))


def test_more_memory_than_there_is_is_an_error(host: Host) -> None:
    _, total = host.device.memory()
    with pytest.raises(TrioError, match="out of memory: .* are needed for a test"):
        host.device.empty((2 * total,), np.bool_, "a test")


@pytest.mark.parametrize("part", [np.s_[:, :, :5], np.s_[1:2, :, 2:7], np.s_[:, 1:2, :, 3:6]])
def test_parts_of_arrays_are_copied_as_numpy_does(host: Host, part: tuple[slice, ...]) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 9, 8)).astype(np.float16)
    there, expected = host.device.upload(np.ones_like(values)), np.ones_like(values)
    arrays.copy(there[part], host.device.upload(values)[part])
    expected[part] = values[part]
    np.testing.assert_array_equal(host.device.download(there), expected)
    arrays.clear(there[part])
    expected[part] = 0
    np.testing.assert_array_equal(host.device.download(there), expected)
