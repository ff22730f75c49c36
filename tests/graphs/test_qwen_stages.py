"""All stages of the Qwen families against the oracle: batches with padding, pruning, decoding."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.support.qwen_models import FAMILIES, model_config, shared_model, weights_of
from tests.support.qwen_prompts import row_of
from tests.support.run_graph import Runner
from trio_deploy import Schedule
from trio_deploy.export.graphs import build_graphs
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.reference.oracle import Oracle
from trio_deploy.reference.trace import Stage
from trio_deploy.verify.compare import TOLERANCES, ParityRow, compare_stages

TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]
PROMPTS = ((3, (4, 5), 9), (6,), ((3, 2), 5, (2, 9), 4))
SCHEDULES = ("1:0.34,3:0.2:fastv", "0:0.6:divprune,2:0.3:topk-gradient", "2:0.5:dart,4:0.2:random")
CDPRUNER = "0:0.6:cdpruner,3:0.3:cdpruner"

CASES = [
    (family, SCHEDULES[(f + t) % 3], *target)
    for f, family in enumerate(FAMILIES)
    for t, target in enumerate(TARGETS)
]
CASES += [(family, schedule, "ort", "ort") for family in FAMILIES for schedule in SCHEDULES]
CASES += [("qwen2_5_vl", CDPRUNER, *target) for target in TARGETS[:3]]
CASES += [("qwen3_vl", CDPRUNER, *target) for target in TARGETS]
CASES = list(dict.fromkeys(CASES))
"""Every family on every runtime, and with every schedule."""


@cache
def traced(family: str, schedule: str, storage: str | None = None) -> dict[str, Stage]:
    """The oracle's tensors of a batch."""
    import torch

    dtype = None if storage is None else getattr(torch, storage)
    model = shared_model(family)
    oracle = Oracle(model, family=family, positions="original", storage=dtype)
    rows = [row_of(family, parts, seed) for seed, parts in enumerate(PROMPTS)]
    return oracle.generate(rows, Schedule.parse(schedule), max_new_tokens=2).stages


def compare(
    family: str, schedule: str, options: GraphOptions, runtime: str, storage: str | None = None
) -> list[ParityRow]:
    """Every graph fed with the oracle's tensors."""
    points = Schedule.parse(schedule).points
    graphs = build_graphs(model_config(family), points, options)
    weights = weights_of(shared_model(family))
    runners = {name: Runner(graph, weights, runtime) for name, graph in graphs.items()}

    def run(name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        types = {value.name: np.dtype(value.dtype.numpy()) for value in graphs[name].graph.inputs}
        return runners[name]({key: feeds[key].astype(kind) for key, kind in types.items()})

    return compare_stages(
        traced(family, schedule, storage),
        run,
        TOLERANCES[options.dtype],
        threshold=options.threshold,
        separate_decode=options.separate_decode,
        selections={f"select_{i + 1}": point.method for i, point in enumerate(points)},
    )


@pytest.mark.parametrize(("family", "schedule", "dialect", "runtime"), CASES)
def test_every_stage_equals_the_oracle(
    family: str, schedule: str, dialect: str, runtime: str
) -> None:
    options = GraphOptions(dialect=dialect, positions="original")
    rows = compare(family, schedule, options, runtime)
    assert {row.stage for row in rows} >= {"vision", "select_1", "prefill_2"}
    assert [row for row in rows if not row.passed] == []
    assert max(row.max_rel for row in rows if "select" not in row.stage) < 1e-5


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_a_graph_that_decodes_all_layers_equals_the_oracle(dialect: str) -> None:
    options = GraphOptions(dialect=dialect, positions="original", separate_decode=True)
    rows = compare("qwen3_vl", SCHEDULES[0], options, "ort")
    assert "decode" in [row.stage for row in rows]
    assert [row for row in rows if not row.passed] == []


HALF = list(zip(FAMILIES, ["ort", "onnx", "primitive"], SCHEDULES[:1] * 3, strict=True))
HALF += [("qwen2_5_vl", "onnx", CDPRUNER), ("qwen3_vl", "ort", CDPRUNER)]


@pytest.mark.parametrize(
    ("family", "dialect", "schedule"), [*HALF, ("qwen3_vl", "primitive", CDPRUNER)]
)
def test_half_precision_is_within_its_tolerance(family: str, dialect: str, schedule: str) -> None:
    options = GraphOptions(dialect=dialect, positions="original", dtype="float16")
    rows = compare(family, schedule, options, "ort", "float16")
    assert [row for row in rows if not row.passed] == []
