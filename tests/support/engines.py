"""Bundles with simulated TensorRT engines, for tests of what runs around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.fakes.tensorrt.install import Simulation
from trio_deploy import Bundle, export_model
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.bindings import Log, Progress, load
from trio_deploy.runtimes.tensorrt.build import build_engines
from trio_deploy.runtimes.tensorrt.compiling import Compiled, Job, compile_here
from trio_deploy.runtimes.tensorrt.record import Gpu

TARGET = """
description: a GPU of the tests
runtime: tensorrt
tensorrt: "{tensorrt}"
dialect: {dialect}
decode_layout: {layout}
weights: {weights}
dtype: float32
compute_capability: "9.0"
memory_gib: 2
workspace_gib: 1
limits:
  max_batch: 4
  max_images: 2
  max_text_tokens: 64
  max_visual_tokens: 176
  max_new_tokens: 24
  typical_text_tokens: 16
  typical_visual_tokens: 60
  typical_new_tokens: 8
"""

#: TensorRT version, dialect and decode layout: one of each kind that the adapter tells apart.
KINDS = [
    ("8.6.1", "primitive", "shared"),
    ("10.3.0", "primitive", "shared"),
    ("10.3.0", "primitive", "separate"),
    ("10.15.1", "onnx", "separate"),
    ("11.4.0", "onnx", "separate"),
]


def make_target(
    folder: Path, tensorrt: str, dialect: str, layout: str, weights: str = "constants"
) -> Path:
    """A target's file with small limits."""
    file = folder / "test-gpu.yaml"
    version = ".".join(tensorrt.split(".")[:2])
    text = TARGET.format(tensorrt=version, dialect=dialect, layout=layout, weights=weights)
    file.write_text(text)
    return file


def export_for(checkpoint: Path, folder: Path, target: Path, schedule: str) -> Bundle:
    """A bundle for the target, without engines."""
    return export_model(
        checkpoint,
        folder / "bundle",
        schedule=schedule,
        target=target,
        link_weights=True,
        progress=False,
    )


class Here:
    """Compiles in this process, where a simulated TensorRT or a stub is."""

    def __init__(self, tensorrt: Any) -> None:
        self.tensorrt, self.version = tensorrt, tensorrt.version

    def compile(self, job: Job, log: Log, progress: Progress) -> Compiled:
        return compile_here(self.tensorrt, job, log, progress)


def unverified(folder: Path, stage: str) -> None:
    """Takes an engine as it is, which saves its first run."""


def build(bundle: Bundle, target: Path, simulation: Simulation) -> Path:
    """Engines by the simulated TensorRT; returns their folder."""
    gpu = Gpu("NVIDIA H200", "9.0", "12.4")
    outcome = build_engines(
        bundle, load_target(target), Here(load()), gpu, verify=unverified, progress=False
    )
    assert simulation.tensorrt.__version__ == outcome.record.tensorrt
    return outcome.folder
