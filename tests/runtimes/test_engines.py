"""Engines run what they are given, on what they are asked for, in memory that is shared."""

import gc
import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.small_graphs import OUT, SIZE, write_attention, write_product
from trio_deploy import RuntimeOptions, TrioError
from trio_deploy.bundle.manifest import StageInfo, TensorInfo, TensorPlace
from trio_deploy.bundle.schema_1 import external_tensors
from trio_deploy.pipeline.cache import CacheShape, SegmentCache
from trio_deploy.runtimes import onnxruntime as ort
from trio_deploy.runtimes.mapped_weights import WeightMap
from trio_deploy.runtimes.registry import open_engine, open_runtime

RUNTIMES = ["onnxruntime", "openvino"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_run_returns_outputs_by_name_and_fills_what_it_is_given(
    runtime: str, tmp_path: Path
) -> None:
    path, weight = write_product(tmp_path)
    engine = open_engine(path, runtime, threads=1)
    assert list(engine.inputs) == ["x"] and list(engine.outputs) == ["y", "counts"]
    assert engine.inputs["x"].dtype == np.float32 and engine.inputs["x"].shape[1] == SIZE
    x = np.random.default_rng(1).standard_normal((3, SIZE)).astype(np.float32)
    outputs = engine.run({"x": x})
    assert np.allclose(outputs["y"], x @ weight, atol=1e-5)
    assert outputs["counts"].tolist() == [3, SIZE]

    y = np.full((3, OUT), np.nan, np.float32)
    rest = engine.run({"x": x}, {"y": y})
    assert list(rest) == ["counts"] and np.allclose(y, x @ weight, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bound_step_follows_its_arrays_and_keeps_them_alive(runtime: str, tmp_path: Path) -> None:
    path, weight = write_product(tmp_path)
    x, y = np.zeros((1, SIZE), np.float32), np.zeros((1, OUT), np.float32)
    view = x.view()
    step = open_engine(path, runtime, threads=1).bind(
        {"x": view}, {"y": y, "counts": np.zeros(2, np.int64)}
    )
    del view
    gc.collect()
    for seed in range(3):
        x[:] = np.random.default_rng(seed).standard_normal((1, SIZE))
        step()
        assert np.allclose(y, x @ weight, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "missing: x"),
        ({"x": np.zeros((1, SIZE), np.float32), "z": np.zeros(1)}, "unknown: z"),
        ({"x": np.zeros((1, SIZE))}, "must be float32"),
    ],
)
def test_wrong_inputs_are_named(
    runtime: str, feeds: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path, _ = write_product(tmp_path)
    with pytest.raises(TrioError, match=message):
        open_engine(path, runtime).run(feeds)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_damaged_graph_is_named(runtime: str, tmp_path: Path) -> None:
    path, _ = write_product(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TrioError, match=r"cannot load product\.onnx"):
        open_engine(path, runtime)


def test_unknown_runtimes_and_options_are_refused(tmp_path: Path) -> None:
    for arguments in (
        {"runtime": "torch"},
        {"threads": 0},
        {"runtime": "openvino", "provider": "cuda"},
        {"precision": "bfloat16"},
        {"runtime": "openvino", "low_memory": True},
        {"runtime": "openvino", "precision": "int8"},
        {"provider": "NoSuchProvider"},
        {"provider": "cuda"},
    ):
        with pytest.raises(TrioError):
            open_runtime(RuntimeOptions(**arguments))  # type: ignore[arg-type]
    with pytest.raises(TrioError, match="unknown provider 'gpu'.*: choose cpu, cuda"):
        open_runtime(RuntimeOptions(provider="gpu"))


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra in (("onnxruntime", "cpu"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(TrioError, match=rf"pip install 'trio-deploy\[{extra}\]'"):
            open_runtime(RuntimeOptions(module))


def test_a_silent_fallback_to_the_cpu_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_product(tmp_path)
    runtime = open_runtime()
    # As with a CUDA build on a machine without its libraries.
    monkeypatch.setattr(runtime, "provider", "CUDAExecutionProvider")
    with pytest.raises(TrioError, match="CUDAExecution"):
        runtime.open(path)


def test_two_onnxruntimes_at_once_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort.importlib.metadata, "distribution", lambda name: object())
    with pytest.warns(UserWarning, match="overwrite each other"):
        open_runtime()


def test_openvino_refuses_graphs_written_for_onnx_runtime() -> None:
    with pytest.raises(TrioError, match="primitive"):
        open_runtime(RuntimeOptions("openvino")).shares_cache("ort")


# --------------------------------------------------------------------------------------------
# Weights


def test_external_tensors_are_found_without_the_onnx_package(tmp_path: Path) -> None:
    path, weight = write_product(tmp_path)
    (name, tensor), *rest = external_tensors(path).items()
    assert not rest and name == "W"
    assert (tensor.file, tensor.offset, tensor.shape) == ("weights/w.bin", 3, (SIZE, OUT))
    assert np.array_equal(WeightMap().view(tmp_path, tensor), weight)


def test_a_graph_cannot_map_files_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    write_product(tmp_path)
    outside = TensorPlace("../weights/w.bin", 3, 4, (1,), "float32")
    with pytest.raises(TrioError, match="leaves the bundle"):
        WeightMap().view(tmp_path / "inside", outside)
    beyond = TensorPlace("weights/w.bin", 3, 4000, (1000,), "float32")
    with pytest.raises(TrioError, match="too short"):
        WeightMap().view(tmp_path, beyond)


@pytest.mark.parametrize("cut", [1, 20, 60, 90])
def test_a_truncated_graph_is_an_error_not_a_crash(tmp_path: Path, cut: int) -> None:
    path, _ = write_product(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(TrioError, match="damaged"):
        external_tensors(path)


def test_probing_and_low_memory_compute_the_same_on_mapped_weights(tmp_path: Path) -> None:
    path, weight = write_product(tmp_path)
    x = np.random.default_rng(1).standard_normal((5, SIZE)).astype(np.float32)
    low = open_runtime(RuntimeOptions(low_memory=True))
    places = external_tensors(path)
    engines = [
        open_runtime().open(path, places, shares_weights=True),
        low.open(path, places),
        low.open(path, places),
    ]
    for engine in engines:
        assert np.allclose(engine.run({"x": x})["y"], x @ weight, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_results_stay_when_the_engine_runs_again_and_when_it_is_gone(
    tmp_path: Path, runtime: str
) -> None:
    path, weight = write_product(tmp_path)
    x = np.random.default_rng(1).standard_normal((500, SIZE)).astype(np.float32)
    engine = open_engine(path, runtime)
    first = engine.run({"x": x})["y"]
    later = [engine.run({"x": x * scale})["y"] for scale in range(2, 6)]
    del engine
    gc.collect()
    for scale, y in enumerate([first, *later], start=1):
        assert np.allclose(y, scale * x @ weight, atol=1e-4)


MEMORY = """
import re, sys
import numpy as np, onnx
from onnx import helper, TensorProto as T
from collections.abc import Callable
from pathlib import Path
from typing import Any
from tests.support.small_graphs import external
from trio_deploy.bundle.schema_1 import external_tensors
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.runtimes.registry import open_runtime

def load(runtime, name, shares_weights):
    path = folder / f"{name}.onnx"
    return runtime.open(path, external_tensors(path), shares_weights=shares_weights)

folder, low = Path(sys.argv[1]), sys.argv[2] == "low"
size = 2048  # 16 MiB of weights
weight = np.zeros((size, size), np.float32)
(folder / "w.bin").write_bytes(weight.tobytes())
del weight
shape = np.empty((size, size), np.float32)
for name, operands in (("segment", ["x", "W"]), ("select", ["W", "x"])):
    graph = helper.make_graph(
        [helper.make_node("MatMul", operands, ["y"])], name,
        [helper.make_tensor_value_info("x", T.FLOAT, ["B", "C"])],
        [helper.make_tensor_value_info("y", T.FLOAT, ["B", "C"])],
        [external("W", shape, "w.bin", 0)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
feeds = {"segment": np.ones((3, size), np.float32), "select": np.ones((size, 3), np.float32)}

def memory():
    text = Path("/proc/self/status").read_text()
    return [int(re.search(rf"{key}:\\s+(\\d+)", text)[1]) / 1024 for key in ("RssAnon", "RssFile")]

runtime = open_runtime(RuntimeOptions(threads=1, low_memory=low))
warm = load(open_runtime(RuntimeOptions(threads=1)), "select", True)
warm.run({"x": feeds["select"]})  # code pages, arenas
before = memory()
names = ["segment", *3 * ["select"]]
engines = [load(runtime, name, name == "select") for name in names]
for name, engine in zip(names, engines):
    engine.run({"x": feeds[name]})
print(*[now - then for now, then in zip(memory(), before)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "private", "mapped"), [("low", 0, 16), ("normal", 16, 16)])
def test_weights_that_several_graphs_use_are_held_once(
    tmp_path: Path, mode: str, private: int, mapped: int
) -> None:
    """One segment and three select graphs, where few rows meet it, on one 16 MiB tensor."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), mode],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    anonymous, file = (float(value) for value in done.stdout.split())
    assert anonymous < private + 6
    assert file < mapped + 6


OWNERS = """
import gc, json, sys
from pathlib import Path
import numpy as np
from tests.support.small_graphs import OUT, SIZE, write_product
from trio_deploy.bundle.schema_1 import external_tensors
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.runtimes.registry import open_runtime

def churn():  # takes what memory was freed, of all sizes that are used here
    gc.collect()
    sizes = 99 * [SIZE, OUT, SIZE * OUT, 500 * OUT]
    return [np.full(size, 7, np.float32) for size in sizes]

def product(rows):
    return np.random.default_rng(rows).standard_normal((rows, SIZE)).astype(np.float32)

def opened():
    path, weight = write_product(folder)
    options = json.loads(sys.argv[2])
    shares = options.pop("shares_weights")
    engine = open_runtime(RuntimeOptions(threads=1, **options)).open(
        path, external_tensors(path), shares_weights=shares
    )
    path.unlink()
    (folder / "weights" / "w.bin").unlink()  # whoever reads it has to hold it
    return engine, weight

def bound(engine):
    x, y, counts = product(3), np.empty((3, OUT), np.float32), np.empty(2, np.int64)
    step = engine.bind({"x": x.view()}, {"y": y.view(), "counts": counts})
    return step, y

folder = Path(sys.argv[1])
engine, weight = opened()
held = churn()
first = engine.run({"x": product(500)})["y"]
step, y = bound(engine)
held += churn()
later = [engine.run({"x": product(500) * scale})["y"] for scale in (2, 3)]
y[:] = np.nan
step()
del engine, step
held += churn()
for scale, got in enumerate([first, *later], start=1):
    assert np.allclose(got, scale * product(500) @ weight, atol=1e-4), scale
assert np.allclose(y, product(3) @ weight, atol=1e-5)
"""


@pytest.mark.parametrize(
    "options",
    [
        {"runtime": "onnxruntime", "shares_weights": False},
        {"runtime": "onnxruntime", "shares_weights": True},
        {"runtime": "onnxruntime", "shares_weights": False, "low_memory": True},
        {"runtime": "openvino", "shares_weights": False},
    ],
    ids=str,
)
def test_memory_in_use_has_an_owner_when_all_else_is_freed_and_overwritten(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """In a process of its own: weights, inputs, bound arrays, results kept from run to run."""
    done = subprocess.run(
        [sys.executable, "-c", OWNERS, str(tmp_path), json.dumps(options)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------
# KV cache


SHAPE = CacheShape(heads=2, head_dim=8, dtype=np.dtype(np.float32))


def _layer(side: str) -> tuple[TensorInfo, ...]:
    shape = ("B", 2, "C", 8)
    return (
        TensorInfo(f"{side}.0.key", "float32", shape, "cache", 0, "key"),
        TensorInfo(f"{side}.0.value", "float32", shape, "cache", 0, "value"),
    )


SEGMENT = StageInfo("s", "prefill", 0, (0,), inputs=_layer("past"), outputs=_layer("present"))


def each(empty: Callable[..., Any]) -> Callable[..., list[Any]]:
    return lambda shapes, dtype: [empty(shape, dtype) for shape in shapes]


def allocate(lengths: list[int], capacity: int, buffer_sets: int) -> SegmentCache:
    return SegmentCache.allocate(
        range(1), np.array(lengths), capacity, SHAPE, each(np.empty), buffer_sets
    )


def test_a_cache_that_is_too_small_is_refused() -> None:
    with pytest.raises(TrioError, match="holds 4 tokens, but 5"):
        allocate([3, 5], 4, 1)


def test_one_set_of_buffers_is_past_and_present_two_sets_alternate() -> None:
    single, double = allocate([1], 4, 1), allocate([1], 4, 2)
    assert single.past(SEGMENT, 0)["past.0.key"] is single.present(SEGMENT, 0)["present.0.key"]
    assert double.past(SEGMENT, 0)["past.0.key"] is not double.present(SEGMENT, 0)["present.0.key"]
    assert double.past(SEGMENT, 1)["past.0.key"] is double.present(SEGMENT, 0)["present.0.key"]


def test_bytes_are_counted_as_allocated_and_as_used() -> None:
    cache = allocate([3, 1], 5, 2)
    assert cache.allocated_bytes == 2 * 2 * 2 * 2 * 5 * 8 * 4
    assert cache.used_bytes(0) == 2 * 2 * 3 * 8 * 4
    cache.advance(np.array([True, False]))
    assert cache.lengths.tolist() == [4, 1]
    assert CacheShape(8, 128, np.dtype(ml_dtypes.bfloat16)).nbytes(1) == 2 * 8 * 128 * 2


def test_fill_leaves_nothing_undefined_behind_the_prompt() -> None:
    cache = allocate([2], 5, 2)
    new = np.ones((1, 2, 2, 8), np.float32)
    cache.fill(SEGMENT, {"present.0.key": new, "present.0.value": new})
    key = cache.past(SEGMENT, 0)["past.0.key"]
    assert (key[:, :, :2] == 1).all() and (key[:, :, 2:] == 0).all()


def test_fill_writes_memory_that_cannot_be_sliced() -> None:
    """As on a GPU, where a cache's buffers are ONNX Runtime's own values."""
    make = pytest.importorskip("onnxruntime").OrtValue.ortvalue_from_shape_and_type

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> object:
        return make(shape, dtype.type, "cpu", 0)

    cache = SegmentCache.allocate(range(1), np.array([2]), 5, SHAPE, each(empty), 2)
    new = np.arange(32, dtype=np.float32).reshape(1, 2, 2, 8)
    cache.fill(SEGMENT, {"present.0.key": new, "present.0.value": -new})
    for name, sign in (("key", 1), ("value", -1)):
        block = cache.past(SEGMENT, 0)[f"past.0.{name}"].numpy()
        assert np.array_equal(block[:, :, :2], sign * new) and (block[:, :, 2:] == 0).all()


def test_prefill_and_decode_write_into_one_buffer_in_place(tmp_path: Path) -> None:
    """What ONNX Runtime makes of a cache with room equals what it makes without any."""
    engine = open_engine(write_attention(tmp_path), threads=1)
    rng = np.random.default_rng(0)
    lengths, size = np.array([6, 4]), 6
    cache = allocate([6, 4], 9, 1)
    for buffer in cache.buffers[0].values():
        buffer[:] = np.nan

    def feeds(count: int, **past: np.ndarray) -> dict[str, np.ndarray]:
        def draw(heads: int) -> np.ndarray:
            return rng.standard_normal((2, count, heads * 8)).astype(np.float32)

        return {"q": draw(4), "k": draw(2), "v": draw(2), **past}

    prompt = feeds(size)
    prompt |= {"seqlens": (lengths - 1).astype(np.int32), "total": np.array(size, np.int32)}
    none = np.zeros((2, 2, 0, 8), np.float32)
    plain = engine.run(prompt | {"past.0.key": none, "past.0.value": none})
    y = engine.run(prompt | cache.past(SEGMENT), cache.present(SEGMENT))["y"]
    assert np.array_equal(y[0], plain["y"][0]) and np.array_equal(y[1, :4], plain["y"][1, :4])
    assert np.array_equal(cache.buffers[0][0, "key"][:, :, :size], plain["present.0.key"])

    token = feeds(1) | {"seqlens": lengths.astype(np.int32), "total": np.array(7, np.int32)}
    grown = {
        f"past.0.{part}": np.concatenate(
            [plain[f"present.0.{part}"], np.zeros((2, 2, 1, 8), np.float32)], axis=2
        )
        for part in ("key", "value")
    }
    fresh = engine.run(token | grown)
    y = np.empty((2, 1, 32), np.float32)
    engine.bind(token | cache.past(SEGMENT), {"y": y, **cache.present(SEGMENT)})()
    assert np.allclose(y, fresh["y"], atol=1e-6)
    key = cache.buffers[0][0, "key"]
    assert np.isnan(key[:, :, 7:]).all() and not np.isnan(key[0, :, 6]).any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_memory_of_a_large_cache_is_provided_where_it_is_written_alone(tmp_path: Path) -> None:
    """Rows that join a batch get as much room as the longest, of which most write little."""
    engine = open_engine(write_product(tmp_path)[0], "onnxruntime", threads=1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def shared() -> int:  # with forked processes, which would write into it
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    before, shared_before = resident(), shared()
    cache = engine.empty((16, 8, 2**12, 64), np.dtype(np.float32))  # 128 MiB
    cache[:, :, :8] = 1.0
    assert cache.flags.c_contiguous and cache[3, 7, 7, 63] == 1.0
    assert resident() - before < 32 * 2**20
    assert shared() - shared_before < 2**18  # 512 KiB are written
