"""Each runtime and precision in a process of its own keeps the tokens that float32 keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bundles import made_once
from tests.support.fresh import check_in_new_process
from tests.support.real_weights import in_full_runs, questions, smollm_bundle, smollm_llava
from trio_deploy import Bundle, export_model
from trio_deploy.verify.check import record
from trio_deploy.verify.golden import load, store

#: dialect, dtype, runtime, precision and the least share of float32's tokens end to end.
PATHS = {
    "ort-float32": ("ort", "float32", "onnxruntime", None, 1.0),
    "ort-float16": ("ort", "float16", "onnxruntime", None, 0.8),
    "onnx-float32": ("onnx", "float32", "onnxruntime", None, 1.0),
    "onnx-float16": ("onnx", "float16", "onnxruntime", None, 0.8),
    "primitive-float32": ("primitive", "float32", "onnxruntime", None, 1.0),
    "primitive-float16": ("primitive", "float16", "onnxruntime", None, 0.8),
    "openvino-float32": ("primitive", "float32", "openvino", "float32", 1.0),
    "openvino-bfloat16": ("primitive", "float32", "openvino", "bfloat16", 0.75),
}

TINY_SCHEDULE = "0:0.6:divprune,3:0.4,8:0.2"

#: One for each runtime and precision; the others in full runs.
EACH = ("ort-float32", "ort-float16", "openvino-float32", "openvino-bfloat16")
PARAMETERS = [path if path in EACH else pytest.param(path, marks=in_full_runs) for path in PATHS]


def keeps_what_float32_keeps(
    bundle: Path, runtime: str, precision: str | None, end_to_end: float, note: Callable
) -> None:
    """Check a bundle in a new process; `note` records the shares with the test's result."""
    options = {"runtime": runtime, "threads": 2}
    if precision is not None:
        options["precision"] = precision
    fresh = check_in_new_process(bundle, **options)
    note("selections", fresh.selections)
    note("end_to_end", fresh.end_to_end)
    assert len(fresh.selections) == len(fresh.end_to_end) == 3
    assert min(fresh.selections.values()) >= 0.98, fresh
    assert min(fresh.end_to_end) >= end_to_end, fresh
    if end_to_end == 1.0:
        assert not fresh.problems, fresh


def skip_without_arithmetic(precision: str | None) -> None:
    """Skip the test where the CPU cannot compute in `precision`."""
    if precision == "bfloat16":
        able = (
            pytest.importorskip("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        )
        if "BF16" not in able:
            pytest.skip("this CPU has no bfloat16 arithmetic (AMX or AVX512-BF16)")


@pytest.fixture(scope="module")
def tiny_reference(bundles, run_folder) -> Path:
    """A bundle of the shipped model in float32 with the reference's tensors in it."""

    def make(folder: Path) -> None:
        export_model("tiny", folder, schedule=TINY_SCHEDULE, progress=False)
        record(folder, threads=2, examples=questions())

    return made_once(run_folder / "tiny-reference", make)


@pytest.mark.parametrize("path", PARAMETERS)
def test_the_shipped_model(path, tiny_reference, tmp_path, record_property):
    dialect, dtype, runtime, precision, end_to_end = PATHS[path]
    skip_without_arithmetic(precision)
    bundle = export_model(
        "tiny",
        tmp_path / "bundle",
        schedule=TINY_SCHEDULE,
        dialect=dialect,
        dtype=dtype,
        progress=False,
    )
    store(bundle, load(Bundle.load(tiny_reference)))
    keeps_what_float32_keeps(bundle.path, runtime, precision, end_to_end, record_property)


@pytest.fixture(scope="module")
def smollm_reference(run_folder) -> Path:
    """A bundle of the real language model in float32 with the reference's tensors in it."""
    checkpoint = smollm_llava()

    def make(folder: Path) -> None:
        with smollm_bundle(checkpoint) as bundle:
            record(bundle, threads=2, examples=questions())
            bundle.rename(folder)

    return made_once(run_folder / "smollm-reference", make)


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_real_language_model(path, smollm_reference, record_property):
    dialect, dtype, runtime, precision, end_to_end = PATHS[path]
    skip_without_arithmetic(precision)
    with smollm_bundle(smollm_llava(), dialect=dialect, dtype=dtype) as bundle:
        store(Bundle.load(bundle), load(Bundle.load(smollm_reference)))
        keeps_what_float32_keeps(bundle, runtime, precision, end_to_end, record_property)
