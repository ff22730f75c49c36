"""How many CPU cores this process may use, which a container often limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: those it is bound to, at most its group's quota.

    Args:
        root: of the file system, below which `proc` and `sys` are read.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_quotas(root)]))


def cores_to_name() -> int | None:
    """Threads that a runtime has to be told to use; None: it may use the whole machine.

    A runtime left alone counts the machine's cores, and starts a thread for each.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def _quotas(root: Path) -> Iterator[int]:
    """Cores by the quota of each control group that the process is in, rounded up."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            base = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            base = root / "sys/fs/cgroup" / controllers
            base = base if base.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        # A container may see its own group at the top, whatever path is named.
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            quota = _quota(base / group)
            if quota is not None:
                yield quota


def _quota(group: Path) -> int | None:
    """Cores by one group's quota; None: it has none."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            text = " ".join((group / file).read_text(encoding="ascii") for file in files)
            quota, period = map(int, text.split())  # version 2 writes `max` for none, version 1 -1
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            return math.ceil(quota / period)
    return None
