"""`trio check` of the Qwen families: every stage, positions, patches and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engines import KINDS, export_for, make_target
from tests.support.qwen_checkpoints import make_qwen
from tests.support.qwen_models import FAMILIES
from trio_deploy import check, export_model
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.profiles import profiles
from trio_deploy.verify.check import record
from trio_deploy.verify.compare import TOLERANCES
from trio_deploy.verify.engines import compare_engines
from trio_deploy.verify.examples import Example, default_examples, picture
from trio_deploy.verify.report import format_report

TARGETS = {"qwen2_vl": "ort", "qwen2_5_vl": "onnx", "qwen3_vl": "primitive"}
EXAMPLES = [
    Example("what color is the circle ?", (picture(140, 100, 0),)),
    default_examples()[1],
    Example("the first and the second ?", (picture(60, 200, 1), picture(120, 120, 2))),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundle_passes_every_comparison_with_its_checkpoint(family: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_qwen(checkpoint, family)
    options = {"schedule": "1:0.5,3:0.25", "dialect": TARGETS[family]}
    bundle = export_model(checkpoint, tmp_path / "bundle", progress=False, **options)
    report = check(bundle, checkpoint=checkpoint, examples=EXAMPLES, threads=1)
    assert report.passed, format_report(report)
    compared = {row.stage for row in report.rows}
    assert compared >= {"position_ids", "patches", "processor", "vision", "select_2", "answer 2"}


def test_a_bundle_with_bounds_of_its_own_that_prunes_at_the_encoder_passes(tmp_path: Path) -> None:
    """Deepstack features of tokens that were kept before the first layer, and other pixels."""
    checkpoint = tmp_path / "checkpoint"
    make_qwen(checkpoint, "qwen3_vl")
    options = {"schedule": "0:0.5:divprune,2:0.25", "max_pixels": 20 * 1024}
    bundle = export_model(checkpoint, tmp_path / "bundle", progress=False, **options)
    report = check(bundle, checkpoint=checkpoint, examples=EXAMPLES, threads=1)
    assert report.passed, format_report(report)
    # What was recorded can be compared on a device without torch.
    record(bundle, checkpoint=checkpoint, examples=EXAMPLES, threads=1)
    again = check(tmp_path / "bundle", golden=True, threads=1)
    assert again.passed, format_report(again)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_of_1008_pixels_square_passes(family: str, tmp_path: Path) -> None:
    """1,296 visual tokens (1,024 of Qwen3-VL), through a few narrow layers."""
    vision: dict[str, Any] = {"depth": 2}
    if family == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = [1]
    if family == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0, 1]
    make_qwen(
        tmp_path / "checkpoint",
        family,
        text={"num_hidden_layers": 3},
        vision=vision,
        most_tokens=1296,
    )
    options = {"schedule": "0:0.334:divprune,2:0.111", "dialect": TARGETS[family]}
    bundle = export_model(tmp_path / "checkpoint", tmp_path / "bundle", progress=False, **options)
    examples = [Example("what color is the circle ?", (picture(1008, 1008, 0),))]
    report = check(bundle, checkpoint=tmp_path / "checkpoint", examples=examples, threads=1)
    assert report.passed, format_report(report)


class Without:
    """A graph that is given other values of one input."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    def run(self, feeds: dict[str, np.ndarray], *_rest: Any, **_more: Any) -> dict[str, np.ndarray]:
        changed = dict(feeds)
        if self._name in feeds:
            changed[self._name] = np.full_like(feeds[self._name], -1)
        return dict(self._engine.run(changed))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("name", ["nothing", "feature_index", "position_ids"])
def test_what_engines_are_compared_on_reaches_features_and_positions(
    name: str, tmp_path: Path
) -> None:
    make_qwen(tmp_path / "checkpoint", "qwen3_vl")
    target = make_target(tmp_path, *KINDS[1])
    bundle = export_for(tmp_path / "checkpoint", tmp_path, target, "1:0.5,3:0.25")
    runtime = OrtRuntime(threads=1)
    rows = compare_engines(
        profiles(bundle, load_target(target)),
        lambda stage: runtime.open(bundle.graph(stage)),
        lambda stage: Without(runtime.open(bundle.graph(stage)), name),
        TOLERANCES["float32"],
        threshold=0.8,
        stages=bundle.stages,
    )
    failed = {row.stage.partition(" ")[0] for row in rows if not row.passed}
    assert (
        failed
        == {
            "nothing": set(),
            "feature_index": {"prefill_0", "select_1", "prefill_1"},
            "position_ids": {"select_1", "select_2", "prefill_0", "prefill_1", "prefill_2"},
        }[name]
    )
