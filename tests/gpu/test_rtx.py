"""TensorRT-RTX itself, on a card: what it compiled elsewhere computes what ONNX Runtime does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request, TrioError, export_model
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.registry import load_target, open_runtime
from trio_deploy.runtimes.tensorrt.bindings import TensorRT, load
from trio_deploy.runtimes.tensorrt.build import build_engines
from trio_deploy.runtimes.tensorrt.compiling import ChildCompiler
from trio_deploy.runtimes.tensorrt.device import Device
from trio_deploy.runtimes.tensorrt.target import RTX_CAPABILITIES
from trio_deploy.runtimes.tensorrt_rtx import RUNTIME_CACHE, RtxRuntime
from trio_deploy.verify.compare import TOLERANCES
from trio_deploy.verify.engines import compare_engines

pytestmark = pytest.mark.gpu

TARGET = """
description: a card of the tests
runtime: tensorrt-rtx
compute_capabilities: [{capabilities}]
dialect: onnx
weights: {weights}
dtype: float32
limits: {{max_batch: 2, max_images: 1, max_text_tokens: 64, max_visual_tokens: 64,
  max_new_tokens: 24}}
"""


def questions() -> list[Request]:
    words = "what is in the picture ?"
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    plain = [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}]
    return [
        Request(asked, [make_picture(100, 60)], max_new_tokens=16),
        Request(plain, [], max_new_tokens=12),
    ]


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    try:
        library, device = load("rtx"), Device()
    except TrioError as error:
        pytest.skip(f"needs a GPU with TensorRT-RTX: {error}")
    if device.compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"{library.name} has no compute capability {device.compute_capability}")
    return library


@pytest.fixture(scope="module", params=["inputs", "constants"])
def bundle(
    request: pytest.FixtureRequest,
    rtx: TensorRT,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    folder = tmp_path_factory.mktemp("rtx")
    target = folder / "card.yaml"
    listed = ", ".join(f'"{each}"' for each in RTX_CAPABILITIES)
    target.write_text(TARGET.format(capabilities=listed, weights=request.param))
    made = export_model(
        checkpoint, folder / "bundle", schedule="1:0.5,3:0.25", target=target, progress=False
    )
    compiler = ChildCompiler(rtx.version)
    build_engines(made, load_target(target), compiler, None, verify=None, progress=False)
    return made


def test_engines_compute_what_onnx_runtime_does(bundle: Bundle) -> None:
    runtime, reference = open_runtime(bundle=bundle), OrtRuntime()
    assert isinstance(runtime, RtxRuntime)
    rows = compare_engines(
        {stage: runtime.record.stages[stage].profiles for stage in bundle.stages},
        lambda stage: reference.open(bundle.graph(stage), bundle.places(stage)),
        lambda stage: runtime.open(bundle.graph(stage), bundle.places(stage)),
        TOLERANCES["float32"],
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_answers_are_those_of_onnx_runtime_with_kept_kernels_too(bundle: Bundle) -> None:
    expected = Pipeline.open(bundle, runtime="onnxruntime").generate_batch(questions())
    cache = next((bundle.path / "engines").iterdir()) / RUNTIME_CACHE
    shutil.rmtree(cache, ignore_errors=True)
    for _ in ("the first start", "a later one"):
        found = Pipeline.open(bundle).generate_batch(questions())
        assert [a.token_ids for a in found] == [a.token_ids for a in expected]
        assert all(map(np.array_equal, found[0].kept, expected[0].kept))
        assert len(list(cache.glob("*/*.cache"))) == len(bundle.stages)


def test_decode_steps_are_recorded(bundle: Bundle) -> None:
    runtime = open_runtime(bundle=bundle)
    assert isinstance(runtime, RtxRuntime)
    pipeline = Pipeline.open(bundle)
    pipeline.generate_batch(questions())
    assert pipeline.engine("decode").runtime.recordings  # type: ignore[attr-defined]
