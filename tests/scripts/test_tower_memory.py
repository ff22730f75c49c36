"""The memory of vision towers: how it is measured, its bound, and the table that documents have."""

from __future__ import annotations

import json
import sys

import pytest

from scripts.tower_memory import MARKS, OUT, PAGE, WAYS, measure, summary
from tests.support.qwen_checkpoints import preprocessing
from tests.support.qwen_models import config_json


def test_the_documents_have_what_was_measured() -> None:
    rows = json.loads(OUT.read_text(encoding="utf-8"))["rows"]
    table = PAGE.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    assert table == summary(rows) + "\n"
    assert {row["graphs"] for row in rows} <= {way.title for way in WAYS.values()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_blocks_of_queries_bound_the_scores(dialect: str) -> None:
    """Of a picture of 3136 patches, 4 heads: 150 MiB in all, 12 per block."""
    raw, settings = config_json("qwen3_vl"), preprocessing("qwen3_vl")
    run = {
        way: measure(raw, settings, WAYS[way], 896, layers=1)["run_mib"]
        for way in (dialect, f"{dialect}-whole")
    }
    assert run[f"{dialect}-whole"] > 150 > 60 > run[dialect]
