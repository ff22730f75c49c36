"""What the pipeline asks of whatever runs a graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trio_deploy.errors import TrioError

Array = Any
"""A numpy array, or memory of the engine's own as `Engine.empty` gives it (on a GPU).

What is not a numpy array cannot be sliced; `update_inplace(array)` writes the whole of it.
"""


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        shape: sizes; the name of a dynamic axis, or None, where the size is not fixed.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]


class Engine(Protocol):
    """One graph, ready to run."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        ...

    def run(
        self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: every input by name.
            into: outputs to be written into arrays of the caller's.

        Returns:
            The other outputs by name.

        Raises:
            TrioError: inputs are missing, unknown, or of the wrong type.
        """
        ...

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Callable[[], None]:
        """A function that runs on these very arrays each time it is called.

        All outputs must be in `into`; the caller changes the inputs in place in between.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Uninitialised memory that `run` and `bind` take, near the device."""
        ...


class Runtime(Protocol):
    """Opens the graphs of one bundle with one set of options."""

    def shares_cache(self, dialect: str) -> bool:
        """Whether past and present of a layer may be one buffer, which a prefill fills as well.

        Where not, a decode step reads one buffer and writes another, and a prefill (C = 0)
        returns presents of its own.

        Raises:
            TrioError: this runtime cannot run graphs of this dialect.
        """
        ...

    def open(self, path: Path, *, exact: bool = False, probing: bool = False) -> Engine:
        """Load a graph.

        Args:
            exact: compute in the graph's own precision whatever the runtime was told.
            probing: a graph whose weights other graphs hold as well (select, embed): refer to
                the file rather than make a rearranged copy.
        """
        ...


def open_runtime(
    name: str = "onnxruntime",
    *,
    threads: int | None = None,
    low_memory: bool = False,
    provider: str | None = None,
    precision: str | None = None,
) -> Runtime:
    """The runtime called `name`.

    Args:
        name: `onnxruntime` or `openvino`.
        threads: of one operator; None leaves the choice to the runtime.
        low_memory: keep weights in the page cache alone (ONNX Runtime).
        provider: ONNX Runtime's execution provider, by its full name or as `cpu`, `cuda`.
        precision: `float32` or `bfloat16`, what OpenVINO computes in; None means float32.

    Raises:
        TrioError: an unknown name, or a runtime that is not installed.
    """
    if threads is not None and threads < 1:
        raise TrioError(f"threads must be 1 or more, got {threads}")
    if name == "onnxruntime":
        from trio_deploy.runtime.ort import OrtRuntime

        if precision not in (None, "float32"):
            raise TrioError(
                f"ONNX Runtime computes in the bundle's own dtype, not in {precision}: export "
                "with that dtype, or run with --runtime openvino"
            )
        return OrtRuntime(threads=threads, low_memory=low_memory, provider=provider)
    if name == "openvino":
        from trio_deploy.runtime.ov import OvRuntime

        if provider is not None:
            raise TrioError("execution providers belong to ONNX Runtime, not to OpenVINO")
        if low_memory:
            raise TrioError("the low-memory option belongs to ONNX Runtime, not to OpenVINO")
        return OvRuntime(threads=threads, precision=precision or "float32")
    raise TrioError(f"unknown runtime {name!r}: choose onnxruntime or openvino")


def open_engine(
    path: str | os.PathLike[str], runtime: str = "onnxruntime", **options: Any
) -> Engine:
    """One graph on its own; `options` as in `open_runtime`."""
    return open_runtime(runtime, **options).open(Path(path))


def check_feeds(engine: Engine, feeds: Mapping[str, Array]) -> None:
    """Raises TrioError unless `feeds` has exactly the engine's inputs, of the right types."""
    missing = [name for name in engine.inputs if name not in feeds]
    unknown = [name for name in feeds if name not in engine.inputs]
    if missing or unknown:
        raise TrioError(
            f"this graph takes {', '.join(engine.inputs)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    for name, spec in engine.inputs.items():
        value = feeds[name]
        if isinstance(value, np.ndarray) and value.dtype != spec.dtype:
            raise TrioError(f"input {name} must be {spec.dtype}, got {value.dtype}")
