"""The first run of an engine: it loads, has room for its largest shapes, gives finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.arrays import to_host
from trio_deploy.runtimes.base import TensorSpec
from trio_deploy.runtimes.tensorrt.bindings import TensorRT
from trio_deploy.runtimes.tensorrt.profiles import Profile
from trio_deploy.runtimes.tensorrt.runtime import TrtRuntime

CORNERS = ("min", "opt", "max")
"""The shapes that a profile names: least, typical and largest."""
_FIRST_RUNS = {"opt": "typical", "max": "largest"}


def run_once(bundle: Bundle, tensorrt: TensorRT, folder: Path, stage: str) -> None:
    """Load the engine of a stage and run it at the typical and largest shapes of its profiles.

    Raises:
        TrioError: it does not load or run, lacks memory, or gives what is not finite.
    """
    runtime = TrtRuntime(folder, bundle, tensorrt=tensorrt)
    runtime.record = runtime.record.with_verified(stage)  # for this once, in memory alone
    engine = runtime.open(bundle.graph(stage))
    for profile in runtime.record.stages[stage].profiles:
        for corner, shapes in _FIRST_RUNS.items():
            where = f"at the {shapes} shapes of the {profile.name} profile"
            try:
                outputs = engine.run(example_feeds(engine.inputs, profile, corner), host=())
            except TrioError as error:
                raise TrioError(
                    f"{where}, which follow from the limits of {runtime.record.target}: {error}"
                ) from error
            while outputs:  # one at a time in the host's memory
                name, array = outputs.popitem()
                if array.dtype.kind == "f" and not np.isfinite(to_host(array)).all():
                    raise TrioError(f"{name} is not finite for small numbers {where}")


def example_feeds(
    inputs: Mapping[str, TensorSpec], profile: Profile, corner: str = "opt"
) -> dict[str, np.ndarray]:
    """Inputs of a profile's shapes whose values a stage can make sense of.

    Floats are small random numbers; a row of a selection starts and ends with text, drops one token
    at least and keeps what its width has room for; a row of a segment is full.

    Args:
        inputs: of the graph or its engine, which may lack what the graph does not read.
        corner: which of the profile's shapes, one of `CORNERS`.
    """
    random = np.random.default_rng(0)
    shapes = {name: getattr(bounds, corner) for name, bounds in profile.shapes.items()}
    tokens = next((shape[1] for name, shape in shapes.items() if name == "position_ids"), 1)
    capacities = [shape[2] for name, shape in shapes.items() if name.startswith("past.")]
    capacity = min(capacities, default=0)
    width = tokens
    if "width" in profile.values:
        width = min(getattr(profile.values["width"], corner)[0], tokens)
    text = max(1, width // 2)
    visual = np.zeros(tokens, np.bool_)
    visual[1 : tokens - text + 1] = True
    rows: dict[str, Any] = {
        "position_ids": np.arange(tokens),
        "source_index": np.arange(shapes["source_index"][1]) if "source_index" in shapes else None,
        "visual_mask": visual,
        "lengths": np.int64(capacity - 1 if "input_ids" in shapes else tokens),
        "past_lengths": np.int64(max(capacity - 1, 0)),
        # If it kept all, its loops would have nothing to do.
        "keep": np.int64(min(width - text, max(int(visual.sum()) - 1, 0))),
        "width": np.int64(width),
    }
    feeds: dict[str, np.ndarray] = {}
    for name, spec in inputs.items():
        shape, dtype = shapes[name], spec.dtype
        if rows.get(name) is not None:
            feeds[name] = np.ascontiguousarray(np.broadcast_to(rows[name], shape).astype(dtype))
        elif dtype.kind in "iub" or name.startswith("past."):
            feeds[name] = np.zeros(shape, dtype)
        else:
            feeds[name] = (0.1 * random.standard_normal(shape)).astype(dtype)
    return feeds
