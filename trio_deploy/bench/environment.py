"""What measured figures depend on: the machine, its load, and versions of packages."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trio_deploy.runtimes.machine import usable_cores, usable_memory

_PACKAGES = (
    "trio-deploy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "torch",
    "transformers",
    "numpy",
)


def load_average() -> float | None:
    """Load average of the last minute; None on systems without one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(threads: int | None) -> dict[str, Any]:
    """The machine and package versions as JSON; `threads` None: the runtime's choice."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    memory = usable_memory()
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def machine_text(on: Mapping[str, Any], before: float | None, after: float | None) -> str:
    """The machine in a sentence, with its load before and after a measurement."""
    threads = f"{on['threads']} threads used" if on["threads"] else "threads by the runtime"
    memory = f", {on['memory_gib']} GiB" if on["memory_gib"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    text = f"{on['cpu']}, {on['cores']} cores, {threads}{memory}; {on['system']}; {versions}."
    if before is not None and after is not None:
        text += f" Load average before and after: {before:.2f}, {after:.2f}."
    return text
