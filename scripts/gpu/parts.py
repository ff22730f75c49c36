"""The parts of the GPU check, each in a process of its own, so that a crash ends only one.

    python -m scripts.gpu.parts PART --settings FILE --result FILE

Run by scripts/gpu_check.py. The result file always holds the results so far and the current step,
so that both remain if the process ends.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scripts.gpu.report import NEW_TOKENS, slug, speed_bounds

ROOT = Path(__file__).parent.parent.parent
#: Modules that the oracle, transformers and the export need.
TORCH_NEEDS = (
    *("torch", "transformers", "safetensors", "numpy", "onnx", "onnx_ir", "onnxscript"),
    *("onnxruntime", "ml_dtypes", "PIL", "tokenizers", "jinja2", "yaml", "msgspec"),
    *("huggingface_hub", "tqdm"),
)
#: Bytes copied to measure the bandwidth of memory.
COPIED = 1 << 30
#: Files that a bundle and its results depend on, in addition to the model's content.
_SOURCES = ("trio_deploy/**/*.py", "export/*.yaml")
#: File next to a bundle with its inputs and an id of the export.
_MARK = "exported.json"
_TARGET = """
description: the GPU of this check
runtime: tensorrt
tensorrt: "{tensorrt}"
dialect: {dialect}
decode_layout: {layout}
dtype: {dtype}
{device}limits:
  max_batch: {batch}
  max_images: {images}
  max_text_tokens: {text}
  max_visual_tokens: {visual}
  max_new_tokens: {new}
  max_budget: 1
  typical_text_tokens: {text}
  typical_visual_tokens: {usual}
  typical_new_tokens: {new}
"""
#: Model in place of 7B that TensorRT-RTX is timed with, of which constants do not fit 24 GB, and
#: that is built in every scheme.
MIDDLE_SIZE = "d=2048,layers=16,tower=clip-l-336"
#: Scheme → bytes of its segments' engines, as a share of float16's at most.
NARROW = {"int8": 0.6, "int4": 0.35, "fp8": 0.6, "nvfp4": 0.4}
#: Questions that scales of activations are measured over.
QUESTIONS = ROOT / "examples" / "questions.jsonl"
_RTX_TARGET = """
description: the card of this check
runtime: tensorrt-rtx
compute_capabilities: ["{capability}"]
dialect: onnx
weights: {weights}
dtype: float16
limits:
  max_text_tokens: 128
  max_visual_tokens: {visual}
  max_new_tokens: 128
  max_budget: 1
"""


class Result:
    """Results of a part, written to disk at every step.

    Attributes:
        checks: name → passed, text and figures.
        figures: figures for the report's JSON.
        crashed: steps that ended the process.
        of: checksum of the bundle and engines that the results are about, from `made`.
        now: current step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.checks: dict[str, Any] = known.get("checks", {})
        self.figures: dict[str, Any] = known.get("figures", {})
        self.crashed: list[str] = known.get("crashed", [])
        self.of: str = known.get("of", "")
        self.now = ""

    def note(self, name: str, passed: bool, text: str, **figures: Any) -> None:
        """Add a line of the report."""
        self.checks[name] = {"passed": bool(passed), "text": text, **figures}
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {text}", flush=True)
        self.save()

    def failed(self, name: str, error: Exception) -> None:
        """Add a line for an exception, with the traceback of one that is not a TrioError."""
        from trio_deploy import TrioError

        if isinstance(error, TrioError):
            self.note(name, False, str(error))
            return
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        text = f"{type(error).__name__}: {error}"
        self.note(name, False, text[:1000], traceback=trace[-4000:])

    def doing(self, what: str) -> None:
        """Set the current step, which is reported if the process ends."""
        self.now = what
        print(f"     {what} …", flush=True)
        self.save()

    def has(self, name: str) -> bool:
        """Whether the check `name` has passed, in an earlier process of this part too."""
        return bool(self.checks.get(name, {}).get("passed"))

    def save(self, done: bool = False) -> None:
        """Write the results so far; `done`: they are complete."""
        content = {
            "checks": self.checks,
            "figures": self.figures,
            "crashed": self.crashed,
            "of": self.of,
            "now": "" if done else self.now,
            "done": done,
        }
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1))
        beside.replace(self._path)


class Part:
    """Settings and methods of all parts.

    Args:
        settings: what `gpu_check.Check.run` writes to settings.json: folders, the command line's
            options, and as `host` the figures found so far (of the host, and of the export).
    """

    def __init__(self, settings: Mapping[str, Any], result: Result) -> None:
        self.work, self.result = Path(settings["work"]), result
        self.size, self.tiny = settings["size"], settings["tiny"]
        self.budget, self.runs = float(settings["budget"]), int(settings["runs"])
        self.host: Mapping[str, Any] = settings["host"]
        self.torch_python = settings["torch_python"]
        self.dialect = self.host.get("dialect", "primitive")
        self.middle_size = MIDDLE_SIZE if self.size == "llava-next-7b" else self.size

    # ------------------------------------------------------------------------------- the hosts

    def run_host(self) -> None:
        """Look up GPU, TensorRT and other modules; measure the bandwidth of the GPU's memory."""
        from trio_deploy import TrioError
        from trio_deploy.bench.environment import machine
        from trio_deploy.runtimes.tensorrt import bindings as adapter
        from trio_deploy.runtimes.tensorrt.device import Device
        from trio_deploy.runtimes.tensorrt.gpu import this_gpu
        from trio_deploy.runtimes.tensorrt.target import RTX_CAPABILITIES, parse_version

        figures = self.result.figures
        figures["machine"] = machine(None)
        libraries = []
        try:
            tensorrt = adapter.load()
            figures["tensorrt"] = tensorrt.version
            figures["release"] = ".".join(map(str, parse_version(tensorrt.version)))
            figures["dialect"] = "onnx" if tensorrt.updates_in_place else "primitive"
            libraries.append(tensorrt.name)
        except TrioError as error:
            figures["no_tensorrt"] = str(error)
        device = Device()
        gpu = this_gpu(device)
        try:
            rtx = adapter.load("rtx")
            if gpu.compute_capability in RTX_CAPABILITIES:
                figures["rtx"] = rtx.version
                libraries.append(rtx.name)
            else:
                figures["no_rtx"] = f"{rtx.name} has no {gpu.compute_capability}"
        except TrioError as error:
            figures["no_rtx"] = str(error)
        free, total = device.memory()
        figures |= {
            "gpu": gpu.name,
            "compute_capability": gpu.compute_capability,
            "driver": gpu.driver,
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
        }
        for name in ("onnxruntime", "polygraphy"):
            importlib.import_module(name)
        figures["copy_gb_per_s"] = bandwidth(device) / 1e9
        if not libraries:
            raise TrioError(figures["no_tensorrt"])
        self.result.note("host", True, ", ".join((gpu.name, *libraries)))

    def run_torch_host(self) -> None:
        """Look up the modules of the Python with torch, and whether torch finds the GPU."""
        missing = [name for name in TORCH_NEEDS if importlib.util.find_spec(name) is None]
        self.result.figures["missing"] = missing
        if missing:
            text = (
                f"{sys.executable} lacks {', '.join(missing)}: install them there, or carry them "
                "as wheels (pip install --no-index --target DIR *.whl) and set PYTHONPATH=DIR; "
                "--torch-python names another Python"
            )
            self.result.note("torch's Python", False, text)
            return
        import torch
        import transformers

        self.result.figures["versions"] = f"{torch.__version__}, {transformers.__version__}"
        if not torch.cuda.is_available():
            self.result.note("torch's Python", False, f"torch {torch.__version__} finds no GPU")
            return
        self.result.figures["gpu"] = torch.cuda.get_device_name()
        text = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.result.note("torch's Python", True, text)

    # ------------------------------------------------------------------------------- the parts

    def run_tests(self) -> None:
        """Run pytest -m gpu."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/gpu"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(out.stdout, out.stderr, flush=True)
        last = (out.stdout.strip().splitlines() or [out.stderr.strip()[-300:]])[-1]
        # pytest's status is 0 where all are skipped.
        self.result.note("pytest -m gpu", out.returncode == 0 and "passed" in last, last)

    def run_tiny(self, dtype: str, layout: str) -> None:
        """Compare the tiny model's engines with the oracle and ONNX Runtime."""
        from trio_deploy.bench.contenders import torch_model
        from trio_deploy.verify import check as parity

        name = f"tiny {dtype} {layout}"
        limits = {"batch": 4, "images": 2, "text": 64, "new": 32}
        bundle, target = self.bundle(self.tiny, dtype, layout, link=False, **limits)
        self.build(bundle, target)
        of, known = made(bundle.path), self.result.checks
        if self.result.of == of and known and all(check["passed"] for check in known.values()):
            return  # an earlier run compared these very engines
        self.result.of = of
        self.result.checks.clear()
        golden, missing = False, ""
        if not torch_model.has_torch():
            self.result.doing("the oracle, in torch's Python")
            missing = self._record(bundle.path)
            golden = not missing
        self.result.doing("parity")
        if missing:
            rows, against = self.engines(bundle, bundle.stages), "ONNX Runtime"
        else:
            rows = parity.check(bundle.path, runtime="tensorrt", golden=golden).rows
            against = "the oracle and ONNX Runtime"
        self.note_rows(name, rows, against)
        if missing and self.torch_python:
            self.result.note(f"{name}, oracle", False, f"the oracle did not run: {missing}")

    def _record(self, path: Path) -> str:
        """Record the oracle's tensors in a bundle with torch's Python; "", or why that failed."""
        if not self.torch_python:
            return "torch is skipped"
        command = [self.torch_python, "-m", "scripts.gpu.parts", "golden", "--bundle", str(path)]
        out = subprocess.run(command, cwd=ROOT, env=host_env(), capture_output=True, text=True)
        print(out.stdout, out.stderr, flush=True)
        return "" if out.returncode == 0 else _last_line(out.stderr)

    def run_export(self) -> None:
        """Export the 7B model with random weights, for a target of this GPU."""
        name, checkpoint = self.checkpoint(self.size)
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        # A separate decode engine is faster, if the device has room for the weights twice.
        roomy = self.host.get("free_gib", 0) * 2**30 > 3 * weights
        layout = "separate" if roomy or self.dialect == "onnx" else "shared"
        self.result.doing("graphs")
        limits = {"batch": 1, "images": 1, "text": 128, "new": 2 * NEW_TOKENS}
        bundle, target = self.bundle(checkpoint, "float16", layout, link=True, **limits)
        self.result.figures["large"] = {"name": name, "decode_layout": layout}
        self.result.figures["paths"] = {"bundle": str(bundle.path), "target": str(target)}
        self.result.note("export", True, f"{name}, {', '.join(bundle.stages)}")

    def run_rtx(self) -> None:
        """Compile for this card with TensorRT-RTX: parity, and weights as inputs or constants.

        The times of the two are of one model, of which constants fit the card twice.
        """
        from trio_deploy import RuntimeOptions
        from trio_deploy.bench.measure import UNPRUNED, BenchOptions, measure

        name, checkpoint = self.checkpoint(self.middle_size)
        options = BenchOptions(
            new_tokens=NEW_TOKENS,
            runs=self.runs,
            baselines=(),
            memory=False,
            runtime=RuntimeOptions("tensorrt-rtx"),
        )
        found: dict[str, Any] = {}
        tiny = self.rtx_bundle(self.tiny, "inputs")
        self.result.doing("rtx, parity")
        self.note_rows("rtx, parity", self.engines(tiny, list(tiny.stages)), "ONNX Runtime")
        for weights in ("inputs", "constants"):
            bundle = self.rtx_bundle(checkpoint, weights)
            self.result.doing(f"rtx, weights as {weights}: times of {name}")
            cases = {case["name"]: case for case in measure(bundle, options)["cases"]}
            found[weights] = next(case for each, case in cases.items() if each != UNPRUNED)
        self.result.figures["rtx_times"] = {"model": name, **found}
        for key, what in (("prefill_s", "prefill"), ("tokens_per_s", "decode, tokens/s")):
            bound, constant = (found[weights][key]["median"] for weights in found)
            text = f"{bound / constant:.2f} times that of constants, {name}"
            self.result.note(f"rtx, weights as inputs, {what}", True, text, value=bound / constant)

    def run_quantised(self) -> None:
        """Build a model in float16 and in each scheme: sizes of segments' engines, and parity.

        ONNX Runtime has no floats of 4 bit to compare with.
        """
        from trio_deploy.quant.schemes import NO_SCHEME
        from trio_deploy.runtimes.registry import load_target
        from trio_deploy.runtimes.tensorrt.target import target_schemes

        name, checkpoint = self.checkpoint(self.middle_size)
        layout = "separate" if self.dialect == "onnx" else "shared"
        limits = {"batch": 1, "images": 1, "text": 128, "new": NEW_TOKENS}

        def built(scheme: str) -> tuple[Any, Path, int]:
            self.result.doing(f"quantised, {scheme}: engines of {name}")
            bundle, target = self.bundle(
                checkpoint, "float16", layout, link=False, quantize=scheme, **limits
            )
            self.build(bundle, target)
            sizes = self.result.figures["built"][target.parent.name]
            return bundle, target, sum(sizes[s.name]["bytes"] for s in bundle.of_kind("prefill"))

        _, target, whole = built(NO_SCHEME)
        for scheme in filter(NARROW.__contains__, target_schemes(load_target(target))):
            try:
                bundle, _, size = built(scheme)
                text = f"engines of segments have {size / whole:.2f} of float16's bytes"
                good = size <= NARROW[scheme] * whole
                self.result.note(f"quantised, {scheme}, size", good, text, value=size / whole)
                if scheme != "nvfp4":
                    rows = self.engines(bundle, list(bundle.stages))
                    self.note_rows(f"quantised, {scheme}, parity", rows, "ONNX Runtime")
            except Exception as error:
                self.result.failed(f"quantised, {scheme}", error)

    def run_build(self) -> None:
        """Build the 7B model's engines one after another; a failure does not stop the others."""
        bundle, target = self.large()
        for stage in bundle.stages:
            name = f"build {stage}"
            if name in self.result.crashed:
                continue
            self.result.doing(name)
            try:
                self.build(bundle, target, [stage])
                entry = self.result.figures["built"][target.parent.name][stage]
                text = f"{entry['seconds']:.0f} s, {entry['bytes'] / 2**20:,.0f} MiB"
                self.result.note(name, True, text)
            except Exception as error:
                self.result.failed(name, error)

    def run_parity(self) -> None:
        """Compare the 7B model's engines with ONNX Runtime, which takes minutes on a CPU."""
        bundle, _ = self.large()
        for stage in bundle.stages:
            name = f"{self.host['large']['name']} {stage} parity"
            if name in self.result.crashed or self.result.has(name):
                continue
            self.result.doing(name)
            try:
                self.note_rows(name, self.engines(bundle, [stage]), "ONNX Runtime")
            except Exception as error:
                self.result.failed(name, error)

    def run_times(self) -> None:
        """Measure the 7B model and compare its speed with the bounds."""
        from trio_deploy import RuntimeOptions
        from trio_deploy.bench.measure import UNPRUNED, BenchOptions, measure

        bundle, _ = self.large()
        options = BenchOptions(
            new_tokens=NEW_TOKENS,
            runs=self.runs,
            baselines=(),
            memory=False,
            runtime=RuntimeOptions("tensorrt"),
        )
        self.result.doing("times")
        result = measure(bundle, options)
        self.result.figures["large"] = {"bench": result}
        cases = {case["name"]: case for case in result["cases"]}
        pruned = next(case for name, case in cases.items() if name != UNPRUNED)
        bounds = self.size == "llava-next-7b"
        bandwidth = 1e9 * self.host["copy_gb_per_s"]
        for name, passed, text, value in speed_bounds(
            cases[UNPRUNED], pruned, _decode_bytes(bundle), bandwidth
        ):
            self.result.note(name, passed or not bounds, text, value=value)

    def run_torch(self) -> None:
        """Measure torch on the same GPU: transformers unpruned, and the oracle by autograd."""
        import torch

        from trio_deploy.bench.case import Case
        from trio_deploy.bench.contenders.hf import open_transformers
        from trio_deploy.bench.contenders.oracle import open_oracle
        from trio_deploy.bench.measure import BenchOptions, interleave
        from trio_deploy.bench.results import Spread
        from trio_deploy.bench.workload import Workload, fit_prompt, picture_size

        device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle, _ = self.large()
        width, height = picture_size(bundle.config)
        asked = Workload(1, width, height, "?", NEW_TOKENS)
        work, _ = fit_prompt(asked, bundle, BenchOptions().text_tokens)
        found: dict[str, Any] = {"device": device, "torch": torch.__version__}
        self.result.figures["large"] = {"torch": found}
        dtype = bundle.manifest.dtype if device == "cuda" else "float32"
        for kind, open_contender in (("transformers", open_transformers), ("oracle", open_oracle)):
            self.result.doing(f"torch, {kind}")
            answer: Any = None
            try:
                case = Case(kind, kind, str(bundle.path))
                answer = open_contender(case, work, device=device, dtype=dtype)
                runs = interleave(self.runs, {kind: answer})[kind]
                found[kind] = {
                    "dtype": dtype,
                    "prefill_s": Spread.of([run.prefill_s for run in runs]).to_json(),
                    "first_token_s": Spread.of([run.first_token_s for run in runs]).to_json(),
                    "tokens_per_s": Spread.of([run.tokens_per_s for run in runs]).to_json(),
                }
                text = f"prefill {1e3 * found[kind]['prefill_s']['median']:.1f} ms on {device}"
                self.result.note(f"torch, {kind}", device == "cuda", text)
            except Exception as error:
                self.result.failed(f"torch, {kind}", error)
            answer = None  # frees its weights before the next contender

    # --------------------------------------------------------------------------------- helpers

    def checkpoint(self, size: str) -> tuple[str, Path]:
        """Name and folder of a model with random weights in float16, written if it is missing."""
        from trio_deploy.bench import synthetic

        name, config, preprocessing = synthetic.model_of(size)
        self.result.doing("random weights")
        checkpoint = self.work / f"{name}-float16"
        written = checkpoint.with_name(f"{checkpoint.name}.of.json")
        writer = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()
        made_of = {"config": config, "preprocessing": preprocessing, "writer": writer}
        if not written.is_file() or json.loads(written.read_text()) != made_of:
            shutil.rmtree(checkpoint, ignore_errors=True)
        synthetic.write_checkpoint(checkpoint, config, preprocessing, dtype="float16")
        written.write_text(json.dumps(made_of))
        return name, checkpoint

    def rtx_bundle(self, model: Any, weights: str) -> Any:
        """A bundle with engines of TensorRT-RTX for this card, exported and compiled anew.

        Args:
            weights: `inputs` or `constants`.
        """
        from trio_deploy import export_model
        from trio_deploy.families.registry import request_limits
        from trio_deploy.runtimes.registry import load_target
        from trio_deploy.runtimes.tensorrt.build import build_engines
        from trio_deploy.runtimes.tensorrt.compiling import ChildCompiler

        folder = self.work / f"rtx-{Path(str(model)).name}-{weights}"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "rtx.yaml"
        capability = self.host["compute_capability"]
        values = {"capability": capability, "weights": weights}
        target.write_text(_RTX_TARGET.format(**values, visual=1))
        bundle = export_model(
            model, folder / "bundle", budget=self.budget, target=target, force=True, progress=False
        )
        visual = request_limits(bundle.config).visual_tokens
        target.write_text(_RTX_TARGET.format(**values, visual=visual))
        self.result.doing(f"rtx, weights as {weights}: engines of {folder.name}")
        outcome = build_engines(
            bundle, load_target(target), ChildCompiler(self.host["rtx"]), None, verify=None
        )
        seconds = sum(entry.seconds for entry in outcome.record.stages.values())
        size = sum(entry.bytes for entry in outcome.record.stages.values())
        text = f"{seconds:.0f} s, {size / 2**20:,.0f} MiB"
        self.result.note(f"build {folder.name}", True, text, seconds=seconds, bytes=size)
        return bundle

    def bundle(
        self,
        model: Any,
        dtype: str,
        layout: str,
        *,
        link: bool,
        quantize: str = "none",
        **limits: int,
    ) -> tuple[Any, Path]:
        """A bundle for this GPU, exported if missing, and its target's file.

        Args:
            link: hard-link the checkpoint's files instead of copying weights.
            quantize: scheme of its weights.
        """
        from trio_deploy import Bundle, calibrate, export_model
        from trio_deploy.evaluation.configurations import Source
        from trio_deploy.families.registry import request_limits

        kind = dtype if quantize == "none" else quantize
        folder = self.work / f"{Path(str(model)).name}-{kind}-{layout}"
        folder.mkdir(parents=True, exist_ok=True)
        target, place, mark = folder / "this-gpu.yaml", folder / "bundle", folder / _MARK
        capability, memory = self.host.get("compute_capability"), self.host.get("memory_gib")
        device = f'compute_capability: "{capability}"\n' if capability else ""
        if memory:
            device += f"memory_gib: {max(1, round(memory))}\n"

        def write_target(usual: int) -> None:
            target.write_text(
                _TARGET.format(
                    tensorrt=self.host.get("release", "10.3"),
                    dialect=self.dialect,
                    layout=layout,
                    dtype=dtype,
                    device=device,
                    visual=limits["images"] * usual,
                    usual=usual,
                    **limits,
                )
            )

        write_target(usual=1)
        made_of = {
            "target": target.read_text(),
            "budget": self.budget,
            "sources": _sources(),
            "model": Source.open(model).fingerprint,
        }
        known = json.loads(mark.read_text()) if mark.is_file() else {}
        if known != {**made_of, "export": known.get("export")} or not place.is_dir():
            mark.unlink(missing_ok=True)
            engines, aside = place / "engines", folder / "engines"
            if engines.is_dir() and not aside.is_dir():  # engines that still fit are kept
                engines.rename(aside)
            export_model(
                model,
                place,
                budget=self.budget,
                target=target,
                dtype=dtype,
                quantize=quantize,
                calibration=partial(calibrate, model, QUESTIONS) if quantize == "fp8" else None,
                link_weights=link,
                force=True,
                progress=False,
            )
            if aside.is_dir():
                aside.rename(engines)
            mark.write_text(json.dumps({**made_of, "export": uuid.uuid4().hex}))
        bundle = Bundle.load(place)
        write_target(usual=request_limits(bundle.config).visual_tokens)
        return bundle, target

    def large(self) -> tuple[Any, Path]:
        """The bundle that `run_export` made, and its target's file."""
        from trio_deploy import Bundle

        paths = self.host["paths"]
        return Bundle.load(Path(paths["bundle"])), Path(paths["target"])

    def build(self, bundle: Any, target: Path, stages: Sequence[str] | None = None) -> None:
        """Build a bundle's missing engines, each with its first run."""
        from trio_deploy.runtimes.registry import load_target
        from trio_deploy.runtimes.tensorrt import bindings as adapter
        from trio_deploy.runtimes.tensorrt.build import build_engines
        from trio_deploy.runtimes.tensorrt.compiling import ChildCompiler
        from trio_deploy.runtimes.tensorrt.device import Device
        from trio_deploy.runtimes.tensorrt.first_run import run_once
        from trio_deploy.runtimes.tensorrt.gpu import this_gpu

        if not hasattr(self, "_tensorrt"):
            self._tensorrt, self._gpu = adapter.load(), this_gpu(Device())
        outcome = build_engines(
            bundle,
            load_target(target),
            ChildCompiler(self._tensorrt.version),
            self._gpu,
            verify=lambda place, stage: run_once(bundle, self._tensorrt, place, stage),
            stages=stages,
        )
        built = self.result.figures.setdefault("built", {}).setdefault(target.parent.name, {})
        for stage, entry in outcome.record.stages.items():
            built[stage] = {"seconds": entry.seconds, "bytes": entry.bytes}

    def engines(self, bundle: Any, stages: Sequence[str]) -> list[Any]:
        """Compare a bundle's engines with ONNX Runtime, at three shapes per profile."""
        from trio_deploy.runtimes.onnxruntime import OrtRuntime
        from trio_deploy.runtimes.registry import open_runtime
        from trio_deploy.verify.check import tolerance_of_segments
        from trio_deploy.verify.compare import TOLERANCES
        from trio_deploy.verify.engines import compare_engines

        runtime: Any = open_runtime(bundle=bundle)
        tolerance, quantised = TOLERANCES[bundle.manifest.dtype], bundle.manifest.quantization
        calibrated = quantised is not None and quantised.calibration is not None
        reference = OrtRuntime()
        return compare_engines(
            {stage: runtime.record.stages[stage].profiles for stage in stages},
            lambda stage: reference.open(bundle.graph(stage), bundle.places(stage)),
            lambda stage: runtime.open(bundle.graph(stage), bundle.places(stage)),
            tolerance,
            threshold=bundle.manifest.threshold,
            stages=bundle.stages,
            segments=tolerance_of_segments(tolerance, "fp8" if calibrated else None),
        )

    def note_rows(self, name: str, rows: Sequence[Any], against: str) -> None:
        """Add a line for a comparison's rows."""
        failed = [row for row in rows if not row.passed]
        worst = max((row.max_rel for row in rows), default=0.0)
        text = f"{len(rows)} comparisons with {against}, largest relative difference {worst:.1e}"
        if failed:
            text += f"; {len(failed)} failed, first {failed[0].stage}: {failed[0].problem}"
        problems = {row.stage: row.problem for row in failed}
        worst = worst if worst < float("inf") else None
        self.result.note(name, bool(rows) and not failed, text, worst=worst, problems=problems)


def bandwidth(device: Any) -> float:
    """Bytes read and written per second by a copy in the GPU's memory, which is freed again."""
    size = min(COPIED, device.memory()[0] // 4)
    source, target = (device.empty((size,), "bool", "a copy") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = device.event()
        device.copy(target, source)
        best = min(best, device.event().since(start))
    del source, target
    device.release()
    return 2 * size / best


def _decode_bytes(bundle: Any) -> int:
    """Bytes of weights that a decode step reads: all layers and the head, one embedding row."""
    from trio_deploy.runtimes.tensorrt.build import weight_bytes

    text = bundle.config.text
    if bundle.manifest.decode == "separate":
        table = 2 * text.vocab_size * text.hidden_size  # bytes in float16
        table *= not text.tie_word_embeddings  # tied: the head reads the table
        return int(weight_bytes(bundle, "decode") - table)
    segments = [stage.name for stage in bundle.of_kind("prefill")]
    return sum(weight_bytes(bundle, stage) for stage in segments)


def _sources() -> str:
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def made(bundle: Path) -> str:
    """Checksum that identifies this export of a bundle with its present engines."""
    digest = hashlib.sha256()
    mark = bundle.parent / _MARK
    digest.update(mark.read_bytes() if mark.is_file() else b"")
    for record in sorted(bundle.glob("engines/*/record.json")):
        stages = json.loads(record.read_text())["stages"]
        engines = sorted(record.parent.glob("*.engine"))
        written = {engine.name: engine.stat().st_mtime_ns for engine in engines}
        digest.update(json.dumps([record.parent.name, stages, written], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def host_env() -> dict[str, str]:
    """The environment of torch's Python, without the changes of scripts/gpu_check.sh."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        before = env.pop(f"TRIO_HOST_{name}", None)
        if before is not None:
            env[name] = before
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return env


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def steps(part: Part, name: str) -> Callable[[], None]:
    """Function that runs the part of this name."""
    if name.startswith("tiny "):
        _, dtype, layout = name.split()
        return lambda: part.run_tiny(dtype, layout)
    found: Callable[[], None] = getattr(part, f"run_{slug(name).replace('-', '_')}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one part; failures are in its result, and the exit status is 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--bundle", type=Path)
    args = parser.parse_args(arguments)
    if args.part == "golden":
        from trio_deploy import RuntimeOptions
        from trio_deploy.verify import check as parity

        parity.record(args.bundle, RuntimeOptions("onnxruntime"))
        return 0
    result = Result(args.result)
    try:
        steps(Part(json.loads(args.settings.read_text()), result), args.part)()
    except Exception as error:
        result.failed(args.part, error)
    result.save(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
