"""How a bundle ran is read back from its engines."""

from dataclasses import replace

import pytest

from trio_deploy import Bundle, Pipeline, RuntimeOptions, TrioError
from trio_deploy.pipeline.ran_as import RanAs, require_served
from trio_deploy.runtimes.registry import complete_options, load_target

CPU = "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, RanAs("onnxruntime", "cpu", "primitive", "float32", "float32", CPU)),
        (
            {"runtime": "openvino"},
            RanAs("openvino", None, "primitive", "float32", "float32", "CPU"),
        ),
        (
            {"target": "cpu-openvino"},
            RanAs("openvino", "cpu-openvino", "primitive", "float32", "float32", "CPU"),
        ),
        (
            {"target": load_target("cpu-openvino")},
            RanAs("openvino", "cpu-openvino", "primitive", "float32", "float32", "CPU"),
        ),
    ],
)
def test_runtime_and_target_are_those_that_ran(bundles, options, expected):
    bundle = bundles.path("tiny", dialect="primitive")
    assert Pipeline.open(bundle, threads=1, **options).ran_as == expected


@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "float16"), ("openvino", "float32")]
)
def test_the_float_types_are_the_graphs_and_what_the_runtime_computes_in(
    bundles, runtime, precision
):
    bundle = bundles.path("tiny", dialect="primitive", dtype="float16")
    pipeline = Pipeline.open(bundle, runtime=runtime, threads=1)
    assert pipeline.ran_as.dtype == "float16"
    assert pipeline.ran_as.precision == precision  # OpenVINO computes products of float16 so


def test_what_the_engines_report_counts_and_not_what_was_asked_for(bundles):
    pipeline = Pipeline.open(bundles.path("tiny", dialect="primitive"), threads=1)
    bundle = pipeline.bundle
    asked = complete_options(
        bundle, RuntimeOptions(target=load_target("cpu-openvino"), precision="bfloat16")
    )
    engines = {name: pipeline.engine(name) for name in bundle.stages}
    last = bundle.of_kind("prefill")[-1].name
    assert RanAs.of(bundle, asked, engines).precision == "float32"
    engines[last].execution = replace(engines[last].execution, precision="bfloat16")
    assert RanAs.of(bundle, asked, engines).precision == "float32 and bfloat16"


@pytest.mark.parametrize(
    ("target", "runtime"), [("cpu", "openvino"), ("cpu-openvino", "onnxruntime")]
)
def test_a_target_of_another_runtime_than_the_named_one_is_refused(bundles, target, runtime):
    bundle = Bundle.load(bundles.path("tiny", dialect="primitive"))
    assert bundle.manifest.target == "cpu"
    with pytest.raises(TrioError, match=f"target {target} is of .*, not of {runtime}: name one"):
        require_served(bundle, RuntimeOptions(target=target, runtime=runtime))
    for either in (target, load_target(target)):  # nor run
        with pytest.raises(
            TrioError, match=f"target {target} is of .*, not of {runtime}: name one"
        ):
            complete_options(bundle, RuntimeOptions(target=either, runtime=runtime))
    for allowed in ({"target": target}, {"runtime": runtime}, {}):
        require_served(bundle, RuntimeOptions(**allowed))
