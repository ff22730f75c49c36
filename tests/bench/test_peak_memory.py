"""Peak memory of a process, and of a case in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from trio_deploy import TrioError
from trio_deploy.bench.measure import BenchOptions, list_cases
from trio_deploy.bench.peak_memory import peak_memory, peak_mib
from trio_deploy.bench.workload import Workload


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_with_what_is_held():
    before = peak_mib()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_mib() >= before
    assert peak_mib() > 64


def test_peak_memory_is_measured_in_a_process_of_its_own(random_bundle):
    (case, *_), _ = list_cases(random_bundle, BenchOptions(baselines=()))
    assert peak_memory(case, Workload(1, 56, 56, "hi", 4)) > 10
    with pytest.raises(TrioError, match="memory of no pruning"):
        peak_memory(replace(case, bundle="nowhere"), Workload(1, 56, 56, "hi", 4))
