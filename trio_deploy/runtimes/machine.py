"""CPU cores and memory that this process may use, both of which a container often limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
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


def usable_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may use: the machine's, at most its group's limit.

    Args:
        root: as of `usable_cores`.

    Returns:
        None where the system does not say.
    """
    sizes = list(_limits(root))
    with suppress(AttributeError, ValueError, OSError):  # not on Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(sizes, default=None)


def _quotas(root: Path) -> Iterator[int]:
    """Cores by the quota of each control group that the process is in, rounded up."""
    for group in _groups(root, "cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            numbers = _numbers(group, *files)
            if len(numbers) == 2 and min(numbers) > 0:
                yield math.ceil(numbers[0] / numbers[1])


def _limits(root: Path) -> Iterator[int]:
    """Bytes of memory by the limit of each control group that the process is in."""
    for group in _groups(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            yield from (limit for limit in _numbers(group, file) if limit > 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that bound a process, the innermost first.

    Args:
        controller: `cpu` or `memory`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controllers
            base = base if base.is_dir() else root / "sys/fs/cgroup" / controller
        else:
            continue
        # A container may see its own group at the top, whatever path is named.
        own = PurePosixPath(path.lstrip("/"))
        yield from (base / group for group in (own, *own.parents))


def _numbers(group: Path, *files: str) -> list[int]:
    """The numbers in files of a group; none without a limit, for which version 2 writes `max`."""
    try:
        text = " ".join((group / file).read_text(encoding="ascii") for file in files)
        return [int(number) for number in text.split()]
    except (OSError, ValueError):
        return []
