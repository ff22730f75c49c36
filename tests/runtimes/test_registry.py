"""What the table of runtimes refuses of targets and bundles with quantised weights."""

from __future__ import annotations

import pytest

from tests.support.bundles import Bundles
from trio_deploy import Bundle, Pipeline
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.registry import check_scheme, load_target


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cpu", r"ONNX Runtime does not take weights in nvfp4, which need .* choose int8"),
        ("cpu-openvino", r"OpenVINO does not take weights in nvfp4, which need"),
        ("jetson-orin-nx-16gb", r"TensorRT 10.3 \(compute capability 8.7\) does not take .*10.8"),
        (
            "rtx-40",
            r"TensorRT-RTX \(compute capability 8.9\) does not take",
        ),
        ("rtx", r"\(compute capability 8.6, 8.9, 12.0\) does not take"),
    ],
)
def test_narrow_floats_are_refused_where_no_gpu_has_them(name: str, said: str) -> None:
    with pytest.raises(TrioError, match=said):
        check_scheme(load_target(name), "nvfp4")


@pytest.mark.parametrize("name", ["rtx-50", "jetson-thor"])
def test_narrow_floats_are_for_gpus_that_have_them(name: str) -> None:
    assert check_scheme(load_target(name), "nvfp4") == "nvfp4"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_bundles_with_floats_of_4_bit_are_not_opened_on_a_cpu(
    bundles: Bundles, runtime: str
) -> None:
    bundle = Bundle.load(bundles.path("tiny", quantize="nvfp4", target="jetson-thor"))
    with pytest.raises(TrioError, match="cannot compute with weights in nvfp4, which NVIDIA"):
        Pipeline.open(bundle, runtime=runtime)
