"""The first run of an engine: it must load, fit its largest shapes and return finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import Role, StageInfo
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.arrays import to_host
from trio_deploy.runtimes.base import TensorSpec
from trio_deploy.runtimes.tensorrt.bindings import TensorRT
from trio_deploy.runtimes.tensorrt.profiles import Profile
from trio_deploy.runtimes.tensorrt.runtime import TrtEngine, TrtRuntime

CORNERS = ("min", "opt", "max")
"""The shapes of a profile: smallest, typical and largest."""
_FIRST_RUNS = {"opt": "typical", "max": "largest"}


def run_once(bundle: Bundle, tensorrt: TensorRT, folder: Path, stage: str) -> None:
    """Load the engine of a stage and run it at the typical and largest shapes of its profiles.

    Raises:
        TrioError: it does not load or run, lacks memory, or an output is not finite.
    """
    runtime = TrtRuntime(folder, bundle, tensorrt=tensorrt)
    runtime.record = runtime.record.with_verified(stage)  # in memory only, so that it opens
    engine = runtime.open(bundle.graph(stage), bundle.places(stage))
    run_at_corners(engine, bundle.stages[stage])


def run_at_corners(engine: TrtEngine, stage: StageInfo) -> None:
    """Run an engine at the typical and largest shapes of its profiles.

    Raises:
        TrioError: it does not run, lacks memory, or an output is not finite.
    """
    for profile in (part for each in engine.profiles for part in each.parts):
        for corner, shapes in _FIRST_RUNS.items():
            where = f"at the {shapes} shapes of the {profile.name} profile"
            try:
                outputs = engine.run(example_feeds(stage, engine.inputs, profile, corner), host=())
            except TrioError as error:
                raise TrioError(
                    f"{where}, which follow from the limits of {engine.runtime.record.target}: "
                    f"{error}"
                ) from error
            while outputs:  # one at a time in the host's memory
                name, array = outputs.popitem()
                if array.dtype.kind == "f" and not np.isfinite(to_host(array)).all():
                    raise TrioError(f"{name} is not finite for small numbers {where}")


def example_feeds(
    stage: StageInfo, inputs: Mapping[str, TensorSpec], profile: Profile, corner: str = "opt"
) -> dict[str, np.ndarray]:
    """Inputs in a profile's shapes, with values that are valid for the stage.

    Floats are small random numbers; a row of a selection starts and ends with text, drops at least
    one token and keeps as many as its width allows; a row of a segment is full.

    Args:
        inputs: inputs of the graph or its engine, which may lack inputs that the graph does not
            read.
        corner: one of `CORNERS`.
    """
    random = np.random.default_rng(0)
    shapes = {name: getattr(bounds, corner) for name, bounds in profile.shapes.items()}

    def sizes(role: Role, axis: int) -> list[int]:
        return [shapes[tensor.name][axis] for tensor in stage.inputs_of(role)]

    tokens = next(iter(sizes("positions", -1)), 1)
    capacity = min(sizes("cache", 2), default=0)
    width = tokens
    for tensor in stage.inputs_of("width"):
        width = min(getattr(profile.values[tensor.name], corner)[0], tokens)
    text = max(1, width // 2)
    visual = np.zeros(tokens, np.bool_)
    visual[1 : tokens - text + 1] = True
    rows: dict[Role, Any] = {
        "positions": np.arange(tokens),
        "source": np.arange(next(iter(sizes("source", 1)), 1)),
        "visual": visual,
        "lengths": np.int64(tokens),
        "past_lengths": np.int64(max(capacity - 1, 0)),
        # At least one token is dropped, so that loops have work.
        "count": np.int64(min(width - text, max(int(visual.sum()) - 1, 0))),
        "width": np.int64(width),
    }
    feeds: dict[str, np.ndarray] = {}
    for tensor in stage.inputs:
        if tensor.name not in inputs:
            continue
        shape, dtype = shapes[tensor.name], inputs[tensor.name].dtype
        if tensor.role in rows:
            value = np.broadcast_to(rows[tensor.role], shape).astype(dtype)
            feeds[tensor.name] = np.ascontiguousarray(value)
        elif dtype.kind in "iub" or tensor.role == "cache":
            feeds[tensor.name] = np.zeros(shape, dtype)
        else:
            feeds[tensor.name] = (0.1 * random.standard_normal(shape)).astype(dtype)
    return feeds
