"""OpenVINO's precision bfloat16 on a CPU without it: weights are rounded, products in float32."""

from __future__ import annotations

from typing import Any

import pytest

from trio_deploy.runtimes import openvino as runtime


class _Core:
    """OpenVINO's core, which claims the arithmetic."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def get_property(self, device: str, name: str) -> Any:
        if name == "OPTIMIZATION_CAPABILITIES":
            return ["BF16"]
        return self._core.get_property(device, name)


def pretend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be changed for bfloat16, and compiled in float32."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core
    monkeypatch.setattr(openvino, "Core", lambda: _Core(core()))
    monkeypatch.setattr(runtime, "_HINTS", {"float32": "f32", "bfloat16": "f32"})
