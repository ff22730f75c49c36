"""Taking turns, medians and their spread, peak memory."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: median, quartiles, the least and the most."""

    median: float
    q1: float
    q3: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles are interpolated linearly between the sorted values."""
        q1, middle, q3 = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else (values[0],) * 3
        )
        return cls(middle, q1, q3, min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def interleave(
    runs: int,
    contenders: Mapping[str, Callable[[int], T]],
    warm_up: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[T]]:
    """Results of each contender's runs: by turns, so that what disturbs the machine disturbs all.

    Every run has a seed of its own (equal for all contenders), and the order is reversed from run
    to run. Warm-up runs are not returned.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for run in range(-warm_up, runs):
        names = list(contenders)
        for name in names if run % 2 else reversed(names):
            result = contenders[name](run + warm_up)
            progress()
            if run >= 0:
                results[name].append(result)
    return results


def peak_mib() -> float | None:
    """MiB of main memory that this process has had resident at most; None where unknown.

    Not getrusage's figure where Linux has its own: a child's starts at what its parent held when
    it was forked.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 1024
