"""Turns, medians and memory: the arithmetic of measuring, not what comes out of it."""

from __future__ import annotations

import json
import sys

import pytest

from trio_deploy.bench import timing
from trio_deploy.bench.timing import Spread


def test_a_spread_is_median_and_quartiles():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.median, spread.q1, spread.q3) == (3, 2, 4)
    assert (spread.least, spread.most, spread.runs) == (1, 5, 5)
    assert Spread.of([2.0]) == Spread(2, 2, 2, 2, 2, 1)
    assert json.loads(json.dumps(spread.to_json()))["q3"] == 4


def test_contenders_take_turns_with_equal_seeds_and_warm_up_is_left_out():
    calls = []

    def contender(name):
        return lambda seed: calls.append((name, seed)) or seed

    steps = []
    results = timing.interleave(
        2, {"a": contender("a"), "b": contender("b")}, 1, lambda: steps.append(1)
    )
    assert results == {"a": [1, 2], "b": [1, 2]}
    assert [seed for _, seed in calls] == [0, 0, 1, 1, 2, 2]  # one another's neighbours
    order = [name for name, _ in calls]
    assert order[0:2] != order[2:4] and order[2:4] != order[4:6]  # nobody is always first
    assert len(steps) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_with_what_is_held():
    before = timing.peak_mib()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert timing.peak_mib() >= before
    assert timing.peak_mib() > 64
