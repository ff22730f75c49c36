"""`trio check` of the Qwen families: every stage, positions, patches and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.qwen_checkpoints import make_qwen
from tests.support.qwen_models import FAMILIES
from trio_deploy import check, export_model
from trio_deploy.verify.check import record
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
