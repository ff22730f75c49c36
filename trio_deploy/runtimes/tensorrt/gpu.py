"""Identify the GPU: its drivers, and the kind of Jetson, which CUDA's name does not contain."""

from __future__ import annotations

import re
from pathlib import Path

from trio_deploy.runtimes.tensorrt.device import Device
from trio_deploy.runtimes.tensorrt.record import Gpu

#: Name of a Jetson's board, in the device tree.
BOARD = Path("/proc/device-tree/model")
#: Version of the kernel's driver, for discrete GPUs and Jetsons from JetPack 6.
DRIVER = Path("/proc/driver/nvidia/version")
#: Release of Jetson Linux: `# R36 (release), REVISION: 4.3, GCID: …`.
JETSON_LINUX = Path("/etc/nv_tegra_release")


def this_gpu(device: Device) -> Gpu:
    """Identity of a device's GPU, as in record.json."""
    _, total = device.memory()
    return Gpu(
        name=device.name,
        compute_capability=device.compute_capability,
        driver=device.driver,
        multiprocessors=device.multiprocessors,
        memory_gib=round(total / 2**30, 1),
        model=_read(BOARD).rstrip("\0 \n") if _is_jetson() else "",
        driver_version=_driver_version(),
        l4t=_l4t(),
    )


def _is_jetson() -> bool:
    """Whether this machine is a Jetson: others with a device tree have discrete GPUs."""
    return "jetson" in _read(BOARD).lower() or bool(_read(JETSON_LINUX))


def _driver_version() -> str:
    """Version of the driver, such as "550.54.15"; "" if unknown."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", _read(DRIVER))
    return found[1] if found else _nvml_version()


def _nvml_version() -> str:
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # such as on a Jetson before JetPack 6
        return ""
    return version.decode() if isinstance(version, bytes) else str(version)


def _l4t() -> str:
    """Release of Jetson Linux, such as "36.4.3"; "" on other machines."""
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _read(JETSON_LINUX))
    return f"{found[1]}.{found[2]}" if found else ""


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
