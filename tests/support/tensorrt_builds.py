"""Builds by a stand-in of TensorRT's builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.engines import Here, unverified
from trio_deploy import Bundle
from trio_deploy.config.target import Target
from trio_deploy.runtimes.tensorrt import build as builder
from trio_deploy.runtimes.tensorrt.bindings import BuildOptions, Built
from trio_deploy.runtimes.tensorrt.build import build_engines
from trio_deploy.runtimes.tensorrt.record import Gpu

GPU = Gpu("NVIDIA H200", "9.0", "12.4")


class Stub:
    """Makes an engine's bytes from the graph's name and the number of the build."""

    def __init__(self, version: str = "10.3.0", stop_at: str = "", error: Any = None) -> None:
        self.version = version
        self.stop_at, self.error = stop_at, error
        self.built: list[str] = []
        self.caches: list[bytes] = []
        self.workspaces: list[int | None] = []

    def build(
        self,
        onnx: Path,
        profiles: Sequence[Any],
        options: BuildOptions,
        *,
        timing_cache: bytes = b"",
        log: Callable[[str, str], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Built:
        assert profiles and options.dtype == "float32"
        assert log is not None and progress is not None
        log("VERBOSE", "far too much")
        log("WARNING", f"about {onnx.stem}")
        progress("tactics", 1, 2)
        if onnx.stem == self.stop_at:
            raise self.error
        self.built.append(onnx.stem)
        self.caches.append(timing_cache)
        self.workspaces.append(options.workspace)
        plan = f"{onnx.stem} {len(self.built)}".encode()
        return Built(memoryview(plan), timing_cache + b"+" + onnx.stem.encode())


def build(bundle: Bundle, target: Target, tensorrt: Any, **options: Any) -> builder.Outcome:
    options = {"verify": unverified, **options}
    return build_engines(bundle, target, Here(tensorrt), GPU, progress=False, **options)
