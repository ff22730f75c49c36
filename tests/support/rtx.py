"""Graphs compiled by TensorRT-RTX on this machine's CPU, each once per run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.support.bundles import Bundles, made_once
from tests.support.full_runs import only_in_full_runs
from tests.support.quantised import calibration_of
from tests.support.quantised_checkpoints import quantise_checkpoint
from tests.support.qwen_checkpoints import make_qwen
from tests.support.weights_as_inputs import with_matrices_as_inputs
from trio_deploy import Bundle
from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.config.target import Target
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.ahead import AheadOfTime, compile_ahead
from trio_deploy.runtimes.tensorrt.bindings import MODULES
from trio_deploy.runtimes.tensorrt.compiler_log import NAMES, CompilerReport
from trio_deploy.runtimes.tensorrt.profiles import Profile, profiles

#: One row, so that the heads of attention's scores are seen in their shapes.
TARGET = """
description: a GPU that is compiled for
runtime: tensorrt
tensorrt: "10.15"
dialect: {dialect}
decode_layout: {layout}
weights: {weights}
dtype: {dtype}
limits:
  max_batch: 1
  max_images: 1
  max_text_tokens: 512
  max_visual_tokens: 2928
  max_new_tokens: 256
  max_budget: 0.34
  typical_text_tokens: 64
  typical_visual_tokens: 2928
  typical_new_tokens: 64
"""

#: Few layers with heads as large as the real ones', 80 and 72 in the tower and 128 behind it:
#: kernels are chosen by that size. By family: text_config, vision_config.
_TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_TOWER = {"depth": 4, "num_heads": 2, "out_hidden_size": 512}
SMALL_QWEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        _TEXT | {"rope_parameters": _ROPE},
        _TOWER | {"hidden_size": 160, "intermediate_size": 240, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3_vl": (
        _TEXT
        | {
            "head_dim": 128,
            "rope_parameters": _ROPE | {"mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        _TOWER
        | {"hidden_size": 144, "intermediate_size": 288, "deepstack_visual_indexes": [0, 1, 2]},
    ),
}
#: One of them in AWQ, with zero points, in blocks that TensorRT has.
AWQ = "qwen2_5_vl-awq"
#: One of them whose head is its table of embeddings.
TIED = "qwen2_5_vl-tied"
SMALL = ("tiny", *SMALL_QWEN, AWQ, TIED)

#: What `make rtx-tests` leaves out and `make rtx-tests ALL=1` runs.
in_full_runs = only_in_full_runs("TensorRT-RTX: make rtx-tests")


def require_compiler() -> None:
    """Skip a test where the compiler is missing, or other tests run beside this one."""
    if importlib.util.find_spec(MODULES["rtx"]) is None:
        pytest.skip("TensorRT-RTX is not installed (make rtx-tests installs it)")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.skip("TensorRT-RTX compiles one graph at a time: make rtx-tests")


def require_known(report: CompilerReport) -> None:
    """Skip a test that knows kernels by names of another version of the compiler."""
    if report.version not in NAMES:
        pytest.skip(f"the compiler changed: {report.version} is not one of {', '.join(NAMES)}")


@dataclass(frozen=True)
class Case:
    """A model's graphs as a target has them.

    Attributes:
        model: name of a recipe, a family of `SMALL_QWEN`, `AWQ` or `TIED`; full-size ones have
            their matrices as inputs, by the target in the `onnx` dialect.
        schedule: as for `trio export`; "": the recipe's.
        quantize: scheme of the weights; "": they are float.
        gpu: compute capability that the target names, for schemes that not every GPU has.
        embeddings: where the table of embeddings is; "": in the graphs.
    """

    model: str = "tiny"
    dialect: str = "primitive"
    layout: str = "shared"
    dtype: str = "float16"
    schedule: str = ""
    quantize: str = ""
    gpu: str = ""
    embeddings: str = ""

    def __str__(self) -> str:
        words = (self.model, self.dialect, self.layout, self.dtype, self.schedule, self.quantize)
        words += (self.embeddings,)
        return "-".join(word for word in words if word)


@dataclass(frozen=True)
class Stage:
    """A compiled stage, with what it was compiled from."""

    case: Case
    bundle: Bundle
    info: StageInfo
    graph: onnx.ModelProto
    done: AheadOfTime

    @property
    def report(self) -> CompilerReport:
        return self.done.report

    def count(self, *operators: str) -> int:
        """Number of the graph's nodes of these operators."""
        return sum(node.op_type in operators for node in self.graph.graph.node)


class Compiler:
    """Compiles stages, those that several cases share once."""

    def __init__(self, folder: Path, bundles: Bundles) -> None:
        self._folder, self._bundles = folder, bundles
        self._done: dict[str, AheadOfTime] = {}

    def bundle(self, case: Case) -> tuple[Bundle, Target]:
        """A case's bundle and target, exported once per run."""
        large = case.model not in SMALL
        size = "full-size-" if large else ""
        file = self._folder / f"{size}{case.dialect}-{case.layout}-{case.dtype}{case.gpu}.yaml"
        if not file.exists():
            values = {"dialect": case.dialect, "layout": case.layout, "dtype": case.dtype}
            values["weights"] = "inputs" if (large and case.dialect == "onnx") else "constants"
            named = f'compute_capability: "{case.gpu}"\n' if case.gpu else ""
            file.write_text(TARGET.format(**values) + named)
        options: dict[str, Any] = {"target": file}
        if case.schedule:
            options["schedule"] = case.schedule
        if large:
            options["graphs_only"] = True
        if case.quantize:
            options["quantize"] = case.quantize
        if case.embeddings:
            options["embeddings"] = case.embeddings
        if case.quantize == "fp8":
            options["calibration"] = calibration_of(Path(self._model(case.model)))
        bundle = Bundle.load(self._bundles.path(self._model(case.model), **options))
        return bundle, load_target(file)

    def _model(self, name: str) -> str | Path:
        """A recipe's name as it is; a checkpoint of a family, made once per run."""
        if name == AWQ:
            source = Path(self._model(AWQ.removesuffix("-awq")))
            out = self._folder / AWQ
            return (
                made_once(out, lambda to: quantise_checkpoint(source, to, "awq", block=64)) / "awq"
            )
        family, _, tied = name.partition("-")
        if family not in SMALL_QWEN:
            return name
        text, vision = SMALL_QWEN[family]
        more = {"text": text, "vision": vision, "most_tokens": 1280, "tie": bool(tied)}
        return made_once(self._folder / name, lambda to: make_qwen(to, family, **more))

    def compile(self, case: Case, stage: str, compute_capabilities: Sequence[str] = ()) -> Stage:
        """Compile a stage of a case; TrioError if that fails."""
        bundle, target = self.bundle(case)
        graph = bundle.graph(stage)
        if case.model not in SMALL:
            graph = with_matrices_as_inputs(graph, self._folder / "graph.onnx")
        found = profiles(bundle, target)[stage]
        key = _key(graph, found, compute_capabilities)
        if key not in self._done:
            self._done[key] = compile_ahead(
                graph, found, dtype=case.dtype, compute_capabilities=compute_capabilities
            )
        model = onnx.load(bundle.graph(stage), load_external_data=False)
        return Stage(case, bundle, bundle.stages[stage], model, self._done[key])


def _key(graph: Path, found: Sequence[Profile], capabilities: Sequence[str]) -> str:
    ranges = json.dumps([[profile.to_json() for profile in found], list(capabilities)])
    return hashlib.sha256(graph.read_bytes() + ranges.encode()).hexdigest()
