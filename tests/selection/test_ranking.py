"""The greatest scores of each row against numpy's stable sort, with many ties."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support.run_graph import Runner
from tests.support.selection_cases import TARGETS
from tests.support.transformers_models import model_config
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.values import BOOL, FLOAT, INT64
from trio_deploy.selection import arrays
from trio_deploy.selection.ranking import greatest, largest

FEW = 4


@cache
def ranking(dialect: Any, runtime: str) -> Runner:
    """A graph of both functions, and of the running sum of `among`."""
    d = GraphOptions(dialect=dialect).make_dialect()
    stage = Stage("ranking", d)
    op = stage.op
    score = stage.input("score", FLOAT, ["B", "S"])
    among = stage.input("among", BOOL, ["B", "S"])
    count = stage.input("count", FLOAT, ["B", 1])
    index = op.Range(0, op.Squeeze(op.Shape(score, start=1, end=2), [0]), 1)
    stage.output("chosen", greatest(op, d, score, among, count, index), BOOL, ["B", "S"])
    places, exist = largest(op, d, score, among, FEW, index)
    stage.output("places", places, INT64, ["B", FEW])
    stage.output("exist", exist, BOOL, ["B", FEW])
    stage.output("sums", d.running_sum(op, op.Cast(among, to=FLOAT)), FLOAT, ["B", "S"])
    return Runner(stage.finish(model_config()), {}, runtime)


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
def test_ranks_and_sums_are_those_of_numpy_whatever_the_ties(dialect: Any, runtime: str) -> None:
    run = ranking(dialect, runtime)
    for seed in range(25):
        rng = np.random.default_rng(seed)
        rows, length = int(rng.integers(1, 4)), int(rng.choice([1, 2, 5, 100, 128, 129, 700]))
        score = rng.integers(rng.choice([1, 3, 1000]), size=(rows, length)).astype(np.float32)
        among = rng.random((rows, length)) < rng.choice([0.0, 0.5, 1.0])
        count = rng.integers(0, length + 2, size=(rows, 1))
        out = run({"score": score, "among": among, "count": count.astype(np.float32)})
        np.testing.assert_array_equal(out["sums"], np.cumsum(among, axis=1))
        for row in range(rows):
            best = arrays.greatest(score[row], among[row], int(count[row, 0]))
            assert np.flatnonzero(out["chosen"][row]).tolist() == sorted(best.tolist()), seed
            few = arrays.greatest(score[row], among[row], FEW)
            assert out["exist"][row].tolist() == [i < len(few) for i in range(FEW)]
            assert out["places"][row].tolist() == [*few.tolist(), *[0] * (FEW - len(few))]
