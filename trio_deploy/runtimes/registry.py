"""The runtimes by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.base import Engine, Runtime


def open_runtime(
    name: str = "onnxruntime",
    *,
    threads: int | None = None,
    low_memory: bool = False,
    provider: str | None = None,
    precision: str | None = None,
    bundle: Bundle | None = None,
    target: str | None = None,
) -> Runtime:
    """The runtime called `name`.

    Args:
        name: `onnxruntime`, `openvino` or `tensorrt`.
        threads: of one operator; None leaves the choice to the runtime.
        low_memory: keep weights in the page cache alone (ONNX Runtime).
        provider: ONNX Runtime's execution provider, by its full name or as `cpu`, `cuda`.
        precision: `float32` or `bfloat16`, what OpenVINO computes in; None means float32.
        bundle: whose engines TensorRT runs.
        target: of which engines to run, where `bundle` has several.

    Raises:
        TrioError: an unknown name, a runtime that is not installed, or no engines for it.
    """
    if threads is not None and threads < 1:
        raise TrioError(f"threads must be 1 or more, got {threads}")
    if name == "onnxruntime":
        from trio_deploy.runtimes.onnxruntime import OrtRuntime

        if precision not in (None, "float32"):
            raise TrioError(
                f"ONNX Runtime computes in the bundle's own dtype, not in {precision}: export "
                "with that dtype, or run with --runtime openvino"
            )
        return OrtRuntime(threads=threads, low_memory=low_memory, provider=provider)
    if name == "openvino":
        from trio_deploy.runtimes.openvino import OvRuntime

        if provider is not None:
            raise TrioError("execution providers belong to ONNX Runtime, not to OpenVINO")
        if low_memory:
            raise TrioError("the low-memory option belongs to ONNX Runtime, not to OpenVINO")
        return OvRuntime(threads=threads, precision=precision or "float32")
    if name == "tensorrt":
        from trio_deploy.runtimes.tensorrt.runtime import TrtRuntime, engine_folder

        for option, value in (("provider", provider), ("precision", precision)):
            if value is not None:
                raise TrioError(f"{option} is settled when TensorRT's engines are built")
        if threads is not None or low_memory:
            raise TrioError("threads and low memory are options of CPU runtimes, not of TensorRT")
        if bundle is None:
            raise TrioError("TensorRT runs the engines of a bundle: open the bundle")
        return TrtRuntime(engine_folder(bundle, target), bundle)
    raise TrioError(f"unknown runtime {name!r}: choose onnxruntime, openvino or tensorrt")


def open_engine(
    path: str | os.PathLike[str], runtime: str = "onnxruntime", **options: Any
) -> Engine:
    """One graph on its own; `options` as in `open_runtime`."""
    return open_runtime(runtime, **options).open(Path(path))
