"""Reading a compiler's log, on lines as TensorRT-RTX 1.7 writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_deploy import TrioError
from trio_deploy.runtimes.tensorrt.compiler_log import (
    NAMES,
    CompilerLog,
    CompilerReport,
    Kernel,
    LoggedTensor,
)

VERSION = next(iter(NAMES))
LAYOUT = "Format: (Linear) Row major linear format }"
LINES = [
    "Layers:",
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: "
    "width[ShapeInputToDevice], Location: Device, Dimensions: [1], Datatype: Int64, Format: Format "
    "not available due to dynamic shapes }, { Name: (Unnamed Layer* 681) [Cast]_output, Location: "
    "Device, Dimensions: [], Datatype: Int32, Format: none }], ParameterType: ShapeH2D, "
    "shapeValues0: [-16], TacticValue: 0x0, StreamId: 0, Metadata: ",
    "Name: proj/Gemm_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,-1,8], Strides: "
    f"[-1,8,1], StrideOrder: [2,1,0], Datatype: Half, {LAYOUT}], Constants: [ {{ Name: proj.w, "
    f"Dimensions: [8,8], Strides: [8,1], StrideOrder: [1,0], Datatype: Half, {LAYOUT}], Outputs: "
    f"[ {{ Name: q, Dimensions: [1,-1,8], Strides: [-1,8,1], StrideOrder: [2,1,0], Datatype: Half, "
    f"{LAYOUT}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: proj/Gemm][ONNX Layer: Reshape]",
    "Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: "
    f"present.0.key, Dimensions: [1,2,6,4], Datatype: Half, {LAYOUT}, {{ Name: scratch, "
    f"Dimensions: [2,4,6], Datatype: Half, {LAYOUT}], TacticName: _gemm, StreamId: 0, Metadata: ",
    "Name: Softmax_myl0_3, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: scores, "
    f"Dimensions: [1,2,-1,-1], Datatype: Float, {LAYOUT}, {{ Name: mask, Dimensions: [1,1,-1,-1], "
    f"Datatype: Float, {LAYOUT}], TacticName: s, StreamId: 0, Metadata: ",
    "Name: copy_d2h_myl0_4, LayerType: copy, Inputs: [], Constants: [], Outputs: [], TacticName: , "
    "StreamId: 0, Metadata: ",
]


def read(*messages: str, version: str = VERSION) -> CompilerReport:
    log = CompilerLog()
    for message in messages:
        log("VERBOSE", message)
    return log.report(version)


MEMORY = (
    "Total Activation Memory: 300 bytes",
    "Total Activation Memory: 200 bytes",
    "Total Weights Memory: 128 bytes",
)


@pytest.fixture
def report() -> CompilerReport:
    return read("Chose runner: nothing", *MEMORY, "\n".join(LINES))


def test_memory_is_that_of_the_largest_profile(report: CompilerReport) -> None:
    assert (report.activation_bytes, report.weight_bytes) == (300, 128)


def test_kernels_are_read_with_their_tensors_and_nodes(report: CompilerReport) -> None:
    assert [kernel.kind for kernel in report.kernels] == [
        *("ShapeHostToDevice", "gemm", "kgen", "kgen", "copy")
    ]
    assert report.kernels[0].outputs == (
        LoggedTensor("width[ShapeInputToDevice]", (1,), "Int64"),
        LoggedTensor("(Unnamed Layer* 681) [Cast]_output", (), "Int32"),
    )
    assert report.kernels[1] == Kernel(
        "proj/Gemm_myl0_1",
        "gemm",
        (LoggedTensor("x", (1, -1, 8), "Half"),),
        (LoggedTensor("proj.w", (8, 8), "Half"),),
        (LoggedTensor("q", (1, -1, 8), "Half"),),
        ("proj/Gemm", "Reshape"),
    )


def test_what_kernels_do_is_known_by_their_names(report: CompilerReport) -> None:
    assert (report.launches, report.attentions, report.host_waits) == (3, 1, 1)
    assert report.scores(heads=2) == ["scores"], "a mask for all heads is none"
    assert report.scores(heads=1) == [], "with one head scores cannot be told from a mask"
    assert report.copies([2 * 6 * 4], ["present.0.key"]) == ["scratch"]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((4, -1, -1), True),
        ((4, 257, 257), True),  # of a tower, whose patches are counted
        ((1, 4, -1, -1), True),
        ((1, 4, 224, 224), False),  # a picture whose three channels are stored as four
        ((4, 257, 258), False),
        ((4, 257, 32), False),
        ((3, 257, 257), False),
        ((4, 1, 1), False),
        ((4, 4), False),
    ],
)
def test_scores_are_a_square_per_head(sizes: tuple[int, ...], found: bool) -> None:
    kernel = Kernel("k", "kgen", (), (), (LoggedTensor("s", sizes, "Float"),), ())
    assert bool(CompilerReport("1.7.1.116", 0, 0, (kernel,)).scores(heads=4)) == found


def test_an_unknown_compiler_changed_and_did_not_fail() -> None:
    report = read(*MEMORY, "\n".join(LINES), version="1.8.0.1")
    assert report.weight_bytes == 128
    with pytest.raises(TrioError, match=r"the compiler changed: the kernels of TensorRT-RTX 1\.8"):
        _ = report.attentions


@pytest.mark.parametrize("missing", ["Activation", "Weights", "Layers"])
def test_a_log_of_another_form_is_a_changed_compiler(missing: str) -> None:
    messages = (*MEMORY, "\n".join(LINES))
    with pytest.raises(TrioError, match="the compiler changed: the log of TensorRT-RTX"):
        read(*(message for message in messages if missing not in message))


def test_the_compiler_that_is_installed_is_one_whose_kernels_are_known() -> None:
    """`make rtx-tests` and the extra `rtx` install the same one."""
    root = Path(__file__).parents[3]
    installed = (root / "requirements" / "rtx.txt").read_text()
    pinned = [line for line in installed.splitlines() if line.startswith("tensorrt-rtx")]
    assert len(pinned) == 2 and {line.partition("==")[2] for line in pinned} <= set(NAMES)
    extra = (root / "pyproject.toml").read_text()
    assert all(f'"{line}"' in extra for line in pinned)
