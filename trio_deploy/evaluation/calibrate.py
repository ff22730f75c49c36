"""Calibration: how large the activations of a float model become over questions.

The model runs on ONNX Runtime with the pruning points of the export that it is for: without them
there would be other tokens in deep layers. Each product with a matrix of a decoder layer says how
large its other operand is. Prompts alone are measured, a question at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.checkpoint.resolve import resolve
from trio_deploy.config.options import Calibration, ExportOptions, RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.questions import QuestionSet, question_set
from trio_deploy.export.cache import find_bundle, is_bundle
from trio_deploy.export.measured import MEASURED, measured
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.prefill import Clock, Stages
from trio_deploy.pipeline.prepare import RequestPreparer
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.pipeline.request import Request
from trio_deploy.quant.quantization_config import read_quantization_config
from trio_deploy.quant.schemes import NO_SCHEME
from trio_deploy.runtimes.base import Array, Step
from trio_deploy.runtimes.onnxruntime import OrtEngine, OrtRuntime

_RUN = RuntimeOptions(runtime="onnxruntime", target="cpu")
_FOLDER = "session.model_external_initializers_file_folder_path"


def calibrate(
    model: str | os.PathLike[str],
    questions: str | os.PathLike[str] | QuestionSet,
    options: ExportOptions | None = None,
    *,
    progress: bool = True,
) -> Calibration:
    """Measure the activations of a float model over questions.

    Args:
        model: what `export_model` takes; it is exported once into the cache, in float32.
        questions: a file that `read_questions` reads, or questions.
        options: those of the export that it is for, whose pruning points, selections, chat template
            and sizes of pictures count here; None: what the recipe says.
        progress: show a progress bar.

    Raises:
        TrioError: the questions or one of their pictures cannot be read, there are none, the model
            is quantised or damaged, or it cannot be exported or answer them.
    """
    asked = question_set(questions)
    if not asked.questions:
        raise TrioError("there are no questions to calibrate with: pass a file that holds some")
    bundle = _float_bundle(model, options or ExportOptions(), progress)
    runtime = _Measuring({bundle.graph(stage.name) for stage in bundle.of_kind("prefill")})
    stages = Stages(bundle, runtime, holds_scores=False)
    ran_as = RanAs.of(bundle, _RUN, stages.engines)
    pipeline = Pipeline(bundle, stages, RequestPreparer(bundle), "float32", ran_as)
    hidden = None if progress else True
    for question in tqdm(asked.questions, "calibration", unit="question", disable=hidden):
        request = Request(question.prompt, question.images, max_new_tokens=1)
        try:
            pipeline.prefill([pipeline.prepare(request)], Clock())
        except TrioError as error:
            raise TrioError(f"question {question.id}: {error}") from None
    return Calibration(asked.data, len(asked.questions), dict(sorted(runtime.found.items())))


def _float_bundle(model: str | os.PathLike[str], options: ExportOptions, progress: bool) -> Bundle:
    """The bundle that is asked.

    Raises:
        TrioError: the model is a bundle, is quantised, or cannot be exported.
    """
    name = os.fspath(model)
    if is_bundle(model):
        raise TrioError(
            f"{name} is a bundle, and calibration exports one of its own: pass the float model "
            "that it was exported from"
        )
    if read_quantization_config(resolve(name, weights_needed=True).raw_config) is not None:
        raise TrioError(
            f"{name} is quantised already, and calibration measures a float model: pass the float "
            "checkpoint that it was made from"
        )
    export = ExportOptions(
        budget=options.budget,
        schedule=options.schedule,
        method=options.method,
        quantize=NO_SCHEME,
        chat_template=options.chat_template,
        max_pixels=options.max_pixels,
        selection=options.selection,
    )
    return Bundle.load(find_bundle(model, _RUN, to_run=True, export=export, progress=progress))


class _Measuring(OrtRuntime):
    """ONNX Runtime whose segments also measure what their matrices are multiplied by.

    Attributes:
        found: the greatest magnitude so far, by name of the matrix.
    """

    def __init__(self, segments: Collection[Path]) -> None:
        super().__init__()
        self.found: dict[str, float] = {}
        self._segments = segments

    def _graph(self, path: Path, options: Any) -> str | bytes:
        if path not in self._segments:
            return super()._graph(path, options)
        options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
        return measured(path)

    def open(
        self, path: Path, weights: Mapping[str, TensorPlace] | None = None, **keywords: bool
    ) -> Any:
        """`Runtime.open`."""
        return _Measured(super().open(path, weights, **keywords), self.found)


class _Measured:
    """An engine whose added outputs are read here, and not by who runs it."""

    def __init__(self, engine: OrtEngine, found: dict[str, float]) -> None:
        self._engine, self._found = engine, found
        self.inputs, self.execution = engine.inputs, engine.execution
        self.outputs = {n: s for n, s in engine.outputs.items() if not n.startswith(MEASURED)}

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """`Engine.run`."""
        outputs = self._engine.run(feeds, into, host=host)
        for output in [name for name in outputs if name.startswith(MEASURED)]:
            name, most = output.removeprefix(MEASURED), float(outputs.pop(output))
            if not math.isfinite(most):
                raise TrioError(
                    f"what {name} is multiplied by is not finite: the weights before it are "
                    "damaged, or too large for float32"
                )
            self._found[name] = max(self._found.get(name, 0.0), most)
        return outputs

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """`Engine.bind`, which measures nothing."""
        return self._engine.bind(feeds, into)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """`Engine.empty`."""
        return self._engine.empty(shape, dtype)
