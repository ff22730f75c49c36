"""`trio check` on bundles of every selection method, inside the model and at the encoder."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.checkpoints import make_llava, make_llava_next
from tests.support.full_runs import only_in_full_runs
from tests.support.qwen_checkpoints import shared_checkpoint
from tests.support.qwen_models import FAMILIES as QWEN_FAMILIES
from trio_deploy import Bundle, Pipeline, Request, check, export_model
from trio_deploy.schedule.methods import METHODS, SEEDS, encoder_scores
from trio_deploy.verify.examples import default_examples
from trio_deploy.verify.report import format_report

DIALECTS = {"ort": "onnxruntime", "onnx": "onnxruntime", "primitive": "openvino"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return {
        "llava": make_llava(folder / "llava", image_size=64),
        "llava_next": make_llava_next(folder / "llava_next"),
        "class token kept": make_llava(folder / "full", feature_strategy="full", kv_heads=4),
    }


def checked(checkpoint, out, schedule: str, dialect: str, **options):
    bundle = export_model(
        checkpoint, out, schedule=schedule, dialect=dialect, progress=False, **options
    )
    report = check(bundle, runtime=DIALECTS[dialect], threads=2)
    assert report.passed, format_report(report)
    return bundle, report


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_agrees_with_the_oracle_inside_the_model_and_at_the_encoder(
    method, family, checkpoints, tmp_path
):
    dialect = list(DIALECTS)[(list(METHODS).index(method) + (family == "llava")) % 3]
    schedule = f"0:0.6:{method},1:0.4:{method},3:0.2:{method}"
    bundle, report = checked(
        checkpoints[family],
        tmp_path / "b",
        schedule,
        dialect,
        positions="original" if family == "llava" else "renumber",
        target="cpu-openvino" if dialect == "primitive" else "cpu",
    )
    assert bundle.schedule.methods == (method,) * 3
    assert "prefill_0" not in bundle.stages and "select_1" in bundle.stages
    assert all(row.overlap in (None, 1.0) for row in report.rows)
    outputs = [tensor.name for tensor in bundle.stages["vision"].outputs]
    assert outputs == ["image_features", *encoder_scores([method])]


#: Qwen: what test_qwen_stages.py has no case of; and each other method in full runs.
QWEN = [("cdpruner", f, d, "float32") for f, d in zip(QWEN_FAMILIES, DIALECTS, strict=True)]
QWEN += [("trio", "qwen2_5_vl", "onnx", "float16"), ("cdpruner", "qwen3_vl", "ort", "float16")]
QWEN += [("cdpruner", "qwen2_5_vl", "primitive", "float16")]
EACH = [
    (method, QWEN_FAMILIES[n % 3], list(DIALECTS)[(n + n // 3) % 3], "float32")
    for n, method in enumerate(name for name in METHODS if not encoder_scores([name]))
]


@pytest.mark.parametrize(
    ("method", "family", "dialect", "dtype"),
    [
        *QWEN,
        *(
            pytest.param(*case, marks=only_in_full_runs("make tests"))
            for case in EACH
            if case not in QWEN
        ),
    ],
)
def test_a_method_agrees_with_the_oracle_where_tokens_have_three_positions(
    method, family, dialect, dtype, run_folder, tmp_path
):
    bundle, report = checked(
        shared_checkpoint(run_folder, family),
        tmp_path / "b",
        f"0:0.6:{method},1:0.4:{method},3:0.2:{method}",
        dialect,
        target="cpu-openvino" if dialect == "primitive" else "cpu",
        dtype=dtype,
    )
    assert bundle.manifest.dtype == dtype and bundle.manifest.positions == "original"
    assert dtype != "float32" or all(row.overlap in (None, 1.0) for row in report.rows)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "class token kept"])
def test_the_encoder_stage_and_then_trio(dialect, family, checkpoints, tmp_path):
    """The schedule of the paper's encoder-involved mode, with two images of a row as well."""
    target = "cpu-openvino" if dialect == "primitive" else "cpu"
    bundle, _ = checked(
        checkpoints[family], tmp_path / "b", "0:0.16667:vscan,2:0.05556", dialect, target=target
    )
    assert list(bundle.stages)[:4] == ["vision", "embed", "select_1", "prefill_1"]


@pytest.mark.parametrize("method", METHODS)
def test_float16_bundles_are_within_tolerance(method, checkpoints, tmp_path):
    checked(
        checkpoints["llava"],
        tmp_path / "b",
        f"0:0.5:{method},2:0.25:{method}",
        "ort",
        dtype="float16",
    )


def test_a_mixed_schedule_keeps_its_methods_at_any_budget(checkpoints, tmp_path):
    bundle = export_model(
        checkpoints["llava_next"],
        tmp_path / "b",
        schedule="0:0.5:divprune,1:0.4:random,2:0.25:fastv,3:0.1",
        progress=False,
    )
    assert check(bundle, threads=2).passed
    pipeline = Pipeline.open(Bundle.load(tmp_path / "b"), threads=2)
    example = default_examples()[0]

    def kept(**options):
        return pipeline.generate_batch(
            [Request(example.prompt, example.pictures, max_new_tokens=1, **options)]
        )[0]

    whole, half = kept(budget=1.0), kept(budget=0.5)
    assert whole.keep_counts == [whole.visual_tokens] * 4
    assert half.keep_counts[0] < whole.visual_tokens
    sets = {seed: kept(seed=seed).kept[1].tolist() for seed in (0, 1, SEEDS, 2**40)}
    assert sets[0] == sets[SEEDS] == kept().kept[1].tolist()
    assert len({tuple(each) for each in sets.values()}) == 3
    first = kept(seed=1)
    np.testing.assert_array_equal(first.kept[0], kept(seed=0).kept[0])
