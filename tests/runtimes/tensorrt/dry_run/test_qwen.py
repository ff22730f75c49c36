"""Graphs of the Qwen families pass the check of TensorRT's rules, with every kind of selection."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engines import KINDS, export_for, make_target
from tests.support.qwen_checkpoints import make_qwen
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.dry_run.rules import dry_run

CASES = [("qwen2_5_vl", KINDS[0]), ("qwen2_5_vl", KINDS[3]), ("qwen3_vl", KINDS[0])]


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("qwen3_vl", KINDS[3])])
def test_every_stage_keeps_the_rules(
    family: str, kind: tuple[str, str, str], tmp_path: Path
) -> None:
    make_qwen(tmp_path / "checkpoint", family)
    target = make_target(tmp_path, *kind)
    schedule = "0:0.6:divprune,1:0.5,3:0.25:cdpruner"
    bundle = export_for(tmp_path / "checkpoint", tmp_path, target, schedule)
    report = dry_run(bundle, load_target(target))
    assert report.passed, report.to_text()
    assert len(report.stages) == len(bundle.stages)
