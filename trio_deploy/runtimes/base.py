"""The interface of runtimes: engines, which run one graph each, and what can be asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target
from trio_deploy.config.yaml_files import DTYPES
from trio_deploy.errors import TrioError
from trio_deploy.quant.schemes import WHOLE_NUMBERS

Array = Any
"""A numpy array, or memory of the engine's device from `Engine.empty`.

ONNX Runtime's device memory cannot be sliced; `update_inplace(array)` writes all of it. TensorRT's
(`tensorrt/device.py`) can; the functions of `arrays.py` take it as they take numpy arrays.
"""

QUERY_BLOCK = 256
"""Queries at a time in graphs for a runtime that holds all scores: those of 16 heads with 16,384
keys are 256 MiB then."""

Step = Callable[[], None]
"""A bound run: works on the same arrays at each call."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        shape: sizes; the name of a dynamic axis or None where a size is not fixed.
        most: greatest sizes that an engine which is built for a range takes; None: any.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    most: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Execution:
    """How an opened engine runs, as the runtime itself reports it, whatever was asked for.

    Attributes:
        device: processor, provider or GPU, by the runtime's name for it.
        precision: float type of the products of activations and weights.
        target: target that the engine was built for, where engines are built.
        activations: what activations are rounded to in products with quantised matrices, `int8`;
            None: to nothing.
    """

    device: str
    precision: str
    target: str | None = None
    activations: str | None = None


class Engine(Protocol):
    """One graph, ready to run."""

    @property
    def execution(self) -> Execution:
        """How it runs, read back from the runtime."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        ...

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: every input by name.
            into: arrays to write outputs into, by name.
            host: outputs to return as numpy arrays (None: all); the rest stay on the device.

        Returns:
            The outputs that are not in `into`, by name.

        Raises:
            TrioError: inputs are missing, unknown, of a wrong type, or too large.
        """
        ...

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """A step that runs on these arrays at each call.

        All outputs must be in `into`; the caller changes inputs in place between calls.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Uninitialised memory for `run` and `bind`, on the device or quick to reach from it."""
        ...


@runtime_checkable
class Blocks(Protocol):
    """An engine whose memory can be cut into arrays."""

    def empties(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> Sequence[Array]:
        """Several arrays of one lifetime in one piece of memory; otherwise as `Engine.empty`."""
        ...


class Moment(Protocol):
    """A point in an engine's work."""

    def since(self, earlier: Any) -> float:
        """Seconds since an earlier moment of this runtime; may wait until this one is reached."""
        ...


@dataclass(frozen=True)
class HostMoment:
    """A moment of the host's clock, for engines that return when they are done."""

    seconds: float

    @classmethod
    def now(cls) -> HostMoment:
        """The current moment."""
        return cls(time.perf_counter())

    def since(self, earlier: HostMoment) -> float:
        """See `Moment.since`."""
        return self.seconds - earlier.seconds


class Runtime(Protocol):
    """Opens the graphs of one bundle with one set of options.

    Attributes:
        concurrent: whether several threads may run its engines at once.
        max_rows: maximum number of rows per batch; None: any number.
    """

    concurrent: bool
    max_rows: int | None

    def shares_cache(self, dialect: str) -> bool:
        """Whether past and present of a layer are one buffer in a decode step.

        If true, a prefill whose graph takes a past fills that buffer as well, and any other returns
        a present of its own. If false, a decode step reads one buffer and writes another.

        Raises:
            TrioError: this runtime cannot run graphs of this dialect.
        """
        ...

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        *,
        keep_precision: bool = False,
        shares_weights: bool = False,
    ) -> Engine:
        """Load a graph.

        Args:
            weights: where the graph's weights are stored, relative to its folder, for runtimes that
                share them between graphs. Those that are inputs of the graph are bound to the
                engine, and are not among its `inputs`.
            keep_precision: compute all but products with weights in the graph's own precision,
                whatever the options say, since the graph decides which tokens are kept.
            shares_weights: whether other graphs use the same weights (select, embed): refer to the
                file instead of making a rearranged copy.
        """
        ...

    def sequence(self, steps: Sequence[Step]) -> Step:
        """One step that runs several, one after another."""
        ...

    def moment(self) -> Moment:
        """The point that the engines' work has reached."""
        ...


class HostRuntime:
    """What is common to runtimes whose engines return when they are done."""

    concurrent = True
    max_rows: int | None = None

    def sequence(self, steps: Sequence[Step]) -> Step:
        """See `Runtime.sequence`."""
        steps = list(steps)

        def run() -> None:
            for step in steps:
                step()

        return run

    def moment(self) -> Moment:
        """See `Runtime.moment`."""
        return HostMoment.now()


def float_type(*specs: Mapping[str, TensorSpec]) -> str:
    """Name of the float type of the first tensor that has one; "" if none has."""
    names = (spec.dtype.name for each in specs for spec in each.values())
    return next((name for name in names if name in DTYPES), "")


def _unchanged(target: Target) -> Target:
    return target


@dataclass(frozen=True)
class RuntimeSpec:
    """What a runtime can be asked for, and how it is opened.

    Each runtime's module ends with one, called RUNTIME; `registry.RUNTIMES` names the modules.

    Attributes:
        name: name in targets, manifests and `--runtime`.
        title: name in messages.
        dialects: dialects of the graphs it reads, the preferred one first.
        dtypes: float types of the graphs it runs.
        options: the fields of RuntimeOptions it takes, beside runtime and target, and the values
            of each (shell patterns; none: any value).
        refusals: why it does not take the other options, by name.
        open: opens it with options it takes; the bundle is None for graphs on their own.
        default_target: target to export for when this runtime is asked for; None: name one.
        target_keys: optional keys of a target's file that it takes.
        devices: kinds of devices it runs on (`cpu`, `gpu`), and the provider to use there.
        needs_engines: whether it runs engines built by `trio build`, instead of graphs.
        check_target: checks what this runtime alone knows of a target, and fills in its defaults.
        target_dialects: dialects that the version on a target reads; None: all of `dialects`.
        target_schemes: schemes of quantised weights that the version on a target keeps narrow;
            None: those in whole numbers.
        schemes: those whose bundles it runs, narrow or not, such as for comparisons; none: all.
        holds_scores: dialects in which it computes all scores of an attention (heads × queries ×
            keys, float32) before it goes on: graphs for it attend `QUERY_BLOCK` queries at a time
            where the vision tower takes pictures of any size.
    """

    name: str
    title: str
    dialects: tuple[str, ...]
    dtypes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    open: Callable[[RuntimeOptions, Bundle | None], Runtime]
    refusals: Mapping[str, str] = field(default_factory=dict)
    default_target: str | None = None
    target_keys: tuple[str, ...] = ()
    devices: Mapping[str, str | None] = field(default_factory=lambda: {"cpu": None})
    needs_engines: bool = False
    check_target: Callable[[Target], Target] = _unchanged
    target_dialects: Callable[[Target], tuple[str, ...]] | None = None
    target_schemes: Callable[[Target], tuple[str, ...]] | None = None
    schemes: tuple[str, ...] = ()
    holds_scores: tuple[str, ...] = ()

    def query_block(self, dialect: str) -> int | None:
        """Queries at a time that a tower's graph in a dialect attends with; None: all."""
        return QUERY_BLOCK if dialect in self.holds_scores else None

    def readable_schemes(self, target: Target) -> tuple[str, ...]:
        """Schemes of quantised weights that it keeps narrow on a target."""
        return WHOLE_NUMBERS if self.target_schemes is None else self.target_schemes(target)

    def readable_dialects(self, target: Target) -> tuple[str, ...]:
        """Dialects it reads on a target, the preferred one first."""
        return self.dialects if self.target_dialects is None else self.target_dialects(target)


def check_feeds(engine: Engine, feeds: Mapping[str, Array]) -> None:
    """Raise TrioError unless `feeds` has exactly the engine's inputs, of the right types."""
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
