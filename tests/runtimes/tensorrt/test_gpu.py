"""What is recorded of the GPU and its drivers, from files that machines of each kind have."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes.tensorrt.install import install
from trio_deploy.runtimes.tensorrt import gpu
from trio_deploy.runtimes.tensorrt.device import Device
from trio_deploy.runtimes.tensorrt.record import Gpu

OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.42.02  Release Build
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
TEGRA = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n"
JETSON_LINUX = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"


class Machine:
    """A machine's files about its GPU; none at first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        for name in ("BOARD", "DRIVER", "JETSON_LINUX"):
            monkeypatch.setattr(gpu, name, folder / name)

    def has(self, **files: str) -> None:
        for name, content in files.items():
            (self._folder / name).write_text(content)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return Machine(tmp_path, monkeypatch)


def test_a_jetson_is_known_by_its_board_its_multiprocessors_and_its_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, gpu="Orin", capability=(8, 7), memory=62 * 2**30, multiprocessors=16)
    board = "NVIDIA Jetson AGX Orin Developer Kit\0"
    machine.has(BOARD=board, DRIVER=TEGRA, JETSON_LINUX=JETSON_LINUX)
    assert gpu.this_gpu(Device()) == Gpu(
        name="Orin",
        compute_capability="8.7",
        driver="12.4",
        multiprocessors=16,
        memory_gib=62.0,
        model="NVIDIA Jetson AGX Orin Developer Kit",
        driver_version="540.4.0",
        l4t="36.4.3",
    )


@pytest.mark.parametrize(("text", "version"), [(OPEN, "555.42.02"), (CLOSED, "470.57.02")])
def test_a_discrete_gpu_has_a_drivers_version_beside_the_cuda_that_it_supports(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, text: str, version: str
) -> None:
    install(monkeypatch)
    machine.has(DRIVER=text)
    here = gpu.this_gpu(Device())
    assert (here.driver, here.driver_version) == ("12.4", version)
    assert (here.model, here.l4t, here.multiprocessors, here.memory_gib) == ("", "", 132, 2.0)


def test_the_board_of_a_machine_that_is_no_jetson_is_nothing_to_engines(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    machine.has(BOARD="Ampere Altra server\0")
    assert gpu.this_gpu(Device()).model == ""


@pytest.mark.parametrize("answer", ["550.54.15", b"550.54.15", None])
def test_nvml_is_asked_where_the_driver_shows_no_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    install(monkeypatch)
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})

    def start() -> None:
        if answer is None:
            raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit, nvml.nvmlShutdown = start, lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: answer
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu.this_gpu(Device()).driver_version == ("550.54.15" if answer else "")
