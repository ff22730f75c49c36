"""Compare engines with ONNX Runtime on the same inputs, by NVIDIA's Polygraphy.

The oracle's inputs are a few prompts. Here every engine runs at the minimum, typical and maximum
shapes of each of its profiles, since TensorRT tunes each profile separately, and selections get
tokens that suppress each other.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.errors import TrioError
from trio_deploy.reference.trace import Stage, Tensors
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.tensorrt.first_run import CORNERS
from trio_deploy.runtimes.tensorrt.profiles import Profile
from trio_deploy.verify.compare import (
    SEGMENTS,
    ParityRow,
    Tolerance,
    compare_outputs,
    compare_selection,
    past_lengths_of,
)
from trio_deploy.verify.inputs import cases

Open = Callable[[str], Engine]
"""Function that opens the engine of a stage."""


def compare_engines(
    profiles: Mapping[str, Sequence[Profile]],
    open_reference: Open,
    open_engine: Open,
    tolerance: Tolerance,
    *,
    threshold: float,
    stages: Mapping[str, StageInfo],
    segments: Tolerance | None = None,
) -> list[ParityRow]:
    """Compare stage by stage, at three shapes per use of a profile, on the cases of `inputs`.

    Args:
        profiles: stage → profiles that its engine was built for.
        open_reference: opens ONNX Runtime's engine, which is closed before the next is opened.
        open_engine: opens the engine to compare.
        threshold: cosine similarity of the greedy suppression.
        stages: the bundle's stages by name.
        segments: tolerance of the stages that run layers, where it is another one.

    Returns:
        One row per stage, profile and shape; `problem` names the tensor that is beyond tolerance.

    Raises:
        TrioError: Polygraphy is not installed, or an engine fails.
    """
    polygraphy = _polygraphy()
    rows = []
    for name, found in profiles.items():
        stage, reference, engine = stages[name], open_reference(name), open_engine(name)
        own = segments if segments is not None and stage.kind in SEGMENTS else tolerance
        parts = [part for profile in found for part in profile.parts]
        for profile in parts:
            which = f"{profile.name} " if len(parts) > 1 else ""
            for corner in CORNERS:
                for remark, feeds in cases(stage, reference.inputs, profile, corner, threshold):
                    label = f"{name} [{which}{corner}{remark and ': '}{remark}]"
                    comparison = _Comparison(
                        label, _context(stage, feeds), own, threshold, stage.method
                    )
                    polygraphy.compare(reference, engine, feeds, comparison)
                    rows.append(comparison.row)
    return rows


class _Comparison:
    """Comparison function for Polygraphy: returns output name → whether it is within tolerance.

    Attributes:
        row: the result, once both have run.
    """

    def __init__(
        self,
        name: str,
        inputs: Tensors,
        tolerance: Tolerance,
        threshold: float,
        method: str | None,
    ) -> None:
        self._name, self._inputs = name, inputs
        self._tolerance, self._threshold, self._method = tolerance, threshold, method
        self.row = ParityRow(name, problem="was not compared")

    def __call__(self, theirs: Any, ours: Any) -> OrderedDict[str, bool]:
        trace = Stage(self._inputs, dict(theirs))
        if self._method is None:
            self.row = compare_outputs(self._name, trace, dict(ours), self._tolerance)
        else:
            self.row = compare_selection(
                self._name, trace, dict(ours), self._tolerance, self._threshold, self._method
            )
        return OrderedDict({self.row.worst or self._name: self.row.passed})


def _context(stage: StageInfo, feeds: Tensors) -> dict[str, Any]:
    """A stage's inputs, and other values that the comparison reads."""
    inputs = dict(feeds)
    if "position_ids" in inputs and "lengths" not in inputs:  # a graph that does not read them
        inputs["lengths"] = np.full(len(inputs["position_ids"]), inputs["position_ids"].shape[1])
    if stage.kind == "decode":  # one column per segment
        past = feeds[stage.input_name("past_lengths")][:, 0]
        inputs |= {past_lengths_of(tensor.name): past for tensor in stage.outputs_of("cache")}
    elif "lengths" in inputs:
        inputs.setdefault("past_lengths", np.zeros_like(inputs["lengths"]))  # a prefill has no past
    # The probes' logits are unknown here, so the stricter tolerance of scores applies.
    inputs["probe_logits"] = np.ones(len(next(iter(feeds.values()))), np.float32)
    return inputs


class _Polygraphy:
    """Polygraphy's Comparator over two engines of this package."""

    def __init__(self) -> None:
        from polygraphy.backend.base import BaseRunner
        from polygraphy.common import TensorMetadata
        from polygraphy.comparator import Comparator
        from polygraphy.logger import G_LOGGER

        class EngineRunner(BaseRunner):  # type: ignore[misc]
            def __init__(self, engine: Engine, name: str) -> None:
                super().__init__(name)
                self._engine = engine

            def get_input_metadata_impl(self) -> Any:
                metadata = TensorMetadata()
                for name, spec in self._engine.inputs.items():
                    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
                    metadata.add(name, dtype=spec.dtype, shape=shape)
                return metadata

            def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Any:
                start = time.perf_counter()
                # An engine may lack an input that its graph does not read.
                taken = {name: feed_dict[name] for name in self._engine.inputs}
                outputs = OrderedDict(self._engine.run(taken))
                self.inference_time = time.perf_counter() - start
                return outputs

        self._runner, self._comparator, self._logger = EngineRunner, Comparator, G_LOGGER

    def compare(
        self,
        reference: Engine,
        engine: Engine,
        feeds: Mapping[str, np.ndarray],
        comparison: _Comparison,
    ) -> None:
        """Run both on the same inputs and compare their outputs."""
        runners = [self._runner(reference, "ONNX Runtime"), self._runner(engine, "engine")]
        with self._logger.verbosity(self._logger.CRITICAL):
            results = self._comparator.run(runners, data_loader=[feeds])
            self._comparator.compare_accuracy(results, compare_func=comparison)


def _polygraphy() -> _Polygraphy:
    try:
        return _Polygraphy()
    except ImportError as error:
        raise TrioError(
            f"comparing engines needs Polygraphy ({error}): pip install 'trio-deploy[tensorrt]'"
        ) from error
