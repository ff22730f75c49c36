"""The contenders in torch take pictures of any size as transformers' Qwen models do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trio_deploy.bench.case import Case
from trio_deploy.bench.workload import Workload

TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


@pytest.mark.skipif(not TORCH, reason="needs torch and transformers")
def test_transformers_and_the_oracle_answer_with_two_pictures(tmp_path: Path) -> None:
    from tests.support.qwen_checkpoints import make_qwen
    from trio_deploy import export_model
    from trio_deploy.bench.contenders.hf import open_transformers
    from trio_deploy.bench.contenders.oracle import open_oracle

    make_qwen(tmp_path / "checkpoint", "qwen3_vl")
    bundle = export_model(
        tmp_path / "checkpoint", tmp_path / "bundle", schedule="1:0.5,3:0.25", progress=False
    )
    work = Workload(2, 120, 90, "what is it ?", 3)
    case = Case("torch", "oracle", str(bundle.path))
    plain, pruned = (open_(case, work)(5) for open_ in (open_transformers, open_oracle))
    assert plain.visual_tokens == pruned.visual_tokens > 0
    assert plain.stages["vision"] > 0
    assert pruned.keep == bundle.schedule.resolve(plain.visual_tokens)
