"""What only a GPU can show: engines of TensorRT built, right, and as fast as they should be.

Run by scripts/gpu_check.sh. In order: the tests marked gpu; the tiny model in both decode layouts,
each engine against ONNX Runtime and, where torch is at hand, against the oracle; a 7B LLaVA-NeXT
with random weights, likewise, and its times with and without pruning, beside torch on the same GPU
(transformers unpruned, and the oracle, which prunes by autograd). What was found is written to
docs/measurements/gpu-<name>.json and .md; the exit status is 0 where all holds.

The bounds on speed hold for 7B in float16, batch 1, 2880 visual tokens, 11.1 % of them on average.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trio_deploy import parity
from trio_deploy.bench.cases import Case
from trio_deploy.bench.runner import UNPRUNED, Options, measure
from trio_deploy.bench.synthetic import model_of, write_checkpoint
from trio_deploy.build import adapter
from trio_deploy.build.builder import build_engines, weight_bytes
from trio_deploy.build.record import Gpu
from trio_deploy.build.verify import run_once
from trio_deploy.bundle import Bundle, write_atomically
from trio_deploy.errors import TrioError
from trio_deploy.export import export
from trio_deploy.machine import machine
from trio_deploy.parity.compare import TOLERANCES
from trio_deploy.parity.engines import compare_engines
from trio_deploy.recipe import load_target
from trio_deploy.runtime.cuda import Device
from trio_deploy.runtime.ort import OrtRuntime
from trio_deploy.runtime.trt import TrtRuntime, engine_folder
from trio_deploy.schedule import max_visual_tokens

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 64
PARTS = ("tests", "tiny", "large", "torch")
_COPIED = 1 << 30  # bytes, to measure the bandwidth of memory
_TARGET = """
description: the GPU of this check
runtime: tensorrt
tensorrt: "{tensorrt}"
dialect: {dialect}
decode_layout: {layout}
dtype: {dtype}
compute_capability: "{capability}"
memory_gib: {memory}
workspace_gib: {workspace}
limits:
  max_batch: {batch}
  max_images: {images}
  max_text_tokens: {text}
  max_visual_tokens: {visual}
  max_new_tokens: {new}
  typical_text_tokens: {text}
  typical_visual_tokens: {usual}
  typical_new_tokens: {new}
"""


class Check:
    """One machine's check.

    Attributes:
        found: what goes into the JSON.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tensorrt, self.device = adapter.load(), Device()
        self.gpu = Gpu(self.device.name, self.device.compute_capability, self.device.driver)
        _, total = self.device.memory()
        self.dialect = "onnx" if self.tensorrt.updates_in_place else "primitive"
        self.found: dict[str, Any] = {
            "gpu": self.gpu.name,
            "compute_capability": self.gpu.compute_capability,
            "driver": self.gpu.driver,
            "memory_gib": round(total / 2**30, 1),
            "tensorrt": self.tensorrt.version,
            "dialect": self.dialect,
            "machine": machine(None),
            "copy_gb_per_s": self.bandwidth() / 1e9,
            "checks": {},
        }

    @property
    def passed(self) -> bool:
        """Whether everything that was looked at holds."""
        return all(check["passed"] for check in self.found["checks"].values())

    def note(self, name: str, passed: bool, text: str, **figures: Any) -> None:
        """One line of the report."""
        self.found["checks"][name] = {"passed": passed, "text": text, **figures}
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {text}", flush=True)

    def attempt(self, name: str, step: Callable[[], None]) -> None:
        """A step whose failure is reported, and does not keep the others from running."""
        start = time.monotonic()
        try:
            step()
        except TrioError as error:
            self.note(name, False, str(error))
        print(f"     {name}: {time.monotonic() - start:.0f} s", flush=True)

    def bandwidth(self) -> float:
        """Bytes a second that a copy within the GPU's memory reads and writes."""
        size = min(_COPIED, self.device.memory()[0] // 4)
        source, target = (self.device.empty((size,), "bool", "a copy") for _ in range(2))
        best = float("inf")
        for _ in range(10):
            start = self.device.event()
            self.device.copy(target, source)
            best = min(best, self.device.event().since(start))
        return 2 * size / best

    # ------------------------------------------------------------------------------- the steps

    def run_tests(self) -> None:
        """pytest -m gpu."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/gpu"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = (out.stdout.strip().splitlines() or [out.stderr.strip()])[-1]
        passed = out.returncode == 0 and "passed" in last
        self.note("pytest -m gpu", passed, last)
        if not passed:
            print(out.stdout[-4000:], out.stderr[-4000:])

    def check_tiny(self) -> None:
        """The trained tiny model, float32 and float16, in every decode layout there is."""
        layouts = ("separate",) if self.dialect == "onnx" else ("shared", "separate")
        for layout in layouts:
            for dtype in ("float32", "float16"):
                name = f"tiny {dtype} {layout}"
                self.attempt(name, lambda n=name, d=dtype, y=layout: self._tiny(n, d, y))

    def _tiny(self, name: str, dtype: str, layout: str) -> None:
        bundle = self.bundle(self.args.tiny, dtype, layout, batch=4, images=2, text=64, new=32)
        if torch_is_here():
            report = parity.check(bundle, runtime="tensorrt")
            rows, against = report.rows, "the oracle and ONNX Runtime"
        else:
            rows, against = self.engines(bundle), "ONNX Runtime (the oracle needs torch)"
        self._note_rows(name, rows, against)

    def check_large(self) -> None:
        """The 7B model's engines against ONNX Runtime."""
        name, config, preprocessing = model_of(self.args.size)
        checkpoint = write_checkpoint(
            self.args.work / f"{name}-float16", config, preprocessing, dtype="float16"
        )
        # Weights twice on the device where there is room: a decode engine of its own is faster.
        roomy = self.device.memory()[0] > 3 * 2 * _parameters(checkpoint)
        layout = "separate" if roomy or self.dialect == "onnx" else "shared"
        self.large = self.bundle(
            checkpoint,
            "float16",
            layout,
            link=True,
            batch=1,
            images=1,
            text=128,
            new=2 * NEW_TOKENS,
        )
        self.found["large"] = {"name": name, "decode_layout": layout}
        if not self.args.no_large_parity:
            self._note_rows(f"{name} parity", self.engines(self.large), "ONNX Runtime")

    def time_large(self) -> None:
        """Times of the 7B model, and the bounds on them."""
        options = Options(
            new_tokens=NEW_TOKENS,
            runs=self.args.runs,
            baselines=(),
            memory=False,
            runtime="tensorrt",
        )
        result = measure(self.large, options)
        self.found["large"]["bench"] = result
        cases = {case["name"]: case for case in result["cases"]}
        pruned = next(case for name, case in cases.items() if name != UNPRUNED)
        bounds = self.args.size == "llava-next-7b"
        for name, passed, text, value in judge(
            cases[UNPRUNED], pruned, self._decode_bytes(), 1e9 * self.found["copy_gb_per_s"]
        ):
            self.note(name, passed or not bounds, text, value=value)

    def time_torch(self) -> None:
        """torch on the same GPU: transformers unpruned, and the oracle's autograd pruning."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "LD_LIBRARY_PATH")}
        env["PYTHONPATH"] = str(ROOT)
        command = [self.args.torch_python, __file__, "--torch-child", str(self.large.path)]
        command += ["--runs", str(self.args.runs)]
        out = subprocess.run(command, env=env, capture_output=True, text=True)
        lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
        if out.returncode or not lines:
            reason = (out.stderr.strip().splitlines() or ["it said nothing"])[-1]
            self.found["large"]["torch"] = None
            print(f"     torch was not timed: {reason}", flush=True)
            return
        self.found["large"]["torch"] = json.loads(lines[-1])

    # --------------------------------------------------------------------------------- helpers

    def bundle(
        self, model: Any, dtype: str, layout: str, *, link: bool = False, **limits: int
    ) -> Bundle:
        """A bundle with engines for this GPU; `link`: its weights are the checkpoint's files."""
        folder = self.args.work / f"{Path(str(model)).name}-{dtype}-{layout}"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{slug(self.gpu.name)}.yaml"

        def write_target(usual: int) -> None:
            _, total = self.device.memory()
            free = self.device.memory()[0] / 2**30
            target.write_text(
                _TARGET.format(
                    tensorrt=".".join(map(str, self.tensorrt.release)),
                    dialect=self.dialect,
                    layout=layout,
                    dtype=dtype,
                    capability=self.gpu.compute_capability,
                    memory=max(1, round(total / 2**30)),
                    workspace=max(1, min(8, int(free / 4))),
                    visual=limits["images"] * usual,
                    usual=usual,
                    **limits,
                )
            )

        write_target(usual=1)
        bundle = export(
            model,
            folder / "bundle",
            budget=self.args.budget,
            target=target,
            dtype=dtype,
            link_weights=link,
            force=True,
            progress=False,
        )
        write_target(usual=max_visual_tokens(bundle.config))
        outcome = build_engines(
            bundle,
            load_target(target),
            self.tensorrt,
            self.gpu,
            verify=lambda place, stage: run_once(bundle, self.tensorrt, place, stage),
        )
        seconds = {stage: entry.seconds for stage, entry in outcome.record.stages.items()}
        sizes = {stage: entry.bytes for stage, entry in outcome.record.stages.items()}
        self.found.setdefault("built", {})[folder.name] = {"seconds": seconds, "bytes": sizes}
        return bundle

    def engines(self, bundle: Bundle) -> list[parity.ParityRow]:
        """Every engine of a bundle against ONNX Runtime, at three shapes a profile."""
        runtime = TrtRuntime(engine_folder(bundle), bundle, tensorrt=self.tensorrt)
        reference = OrtRuntime()
        return compare_engines(
            {stage: runtime.record.stages[stage].profiles for stage in bundle.stages},
            lambda stage: reference.open(bundle.graph(stage)),
            lambda stage: runtime.open(bundle.graph(stage)),
            TOLERANCES[bundle.manifest.dtype],
            threshold=bundle.manifest.threshold,
            methods=bundle.schedule.methods,
        )

    def _note_rows(self, name: str, rows: list[parity.ParityRow], against: str) -> None:
        failed = [row for row in rows if not row.passed]
        worst = max((row.max_rel for row in rows), default=0.0)
        text = f"{len(rows)} comparisons with {against}, largest relative difference {worst:.1e}"
        if failed:
            text += f"; {len(failed)} failed, first {failed[0].stage}: {failed[0].problem}"
        self.note(name, not failed, text, worst=worst)

    def _decode_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all layers and the head, one embedding row."""
        text = self.large.config.text
        if self.large.manifest.decode == "separate":
            table = 2 * text.vocab_size * text.hidden_size  # of float16
            table *= not text.tie_word_embeddings  # the head's own weights, then
            return weight_bytes(self.large, "decode") - table
        segments = [stage for stage in self.large.stages if stage.startswith("prefill_")]
        return sum(weight_bytes(self.large, stage) for stage in segments)

    def write(self) -> Path:
        """The figures as JSON and Markdown; returns the JSON's path."""
        folder = self.args.out
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gpu-{slug(self.gpu.name)}.json"
        write_atomically(path, (json.dumps(self.found, indent=1) + "\n").encode())
        write_atomically(path.with_suffix(".md"), to_markdown(self.found).encode())
        return path


def judge(
    unpruned: dict[str, Any], pruned: dict[str, Any], decode_bytes: int, bandwidth: float
) -> list[tuple[str, bool, str, float]]:
    """The bounds on speed: name, whether it holds, what was found, its value.

    Args:
        unpruned, pruned: cases of `trio bench`'s JSON, generating `NEW_TOKENS` tokens.
        decode_bytes: of weights that a decode step reads.
        bandwidth: bytes a second of a copy, read and written.
    """

    def whole(case: dict[str, Any]) -> float:
        later = (NEW_TOKENS - 1) / case["tokens_per_s"]["median"]
        return float(case["first_token_s"]["median"] + later)

    prefill = unpruned["prefill_s"]["median"] / pruned["prefill_s"]["median"]
    share = pruned["groups_s"]["selection"]["median"] / pruned["prefill_s"]["median"]
    end_to_end = whole(unpruned) / whole(pruned)
    floor = decode_bytes / bandwidth
    step = 1 / pruned["tokens_per_s"]["median"]
    return [
        ("prefill", prefill >= 4.5, f"{prefill:.2f}x faster than unpruned (bound 4.5x)", prefill),
        ("selection", share <= 0.05, f"{share:.1%} of the prefill (bound 5 %)", share),
        (
            "end to end",
            end_to_end >= 2.14,
            f"{end_to_end:.2f}x faster with {NEW_TOKENS} new tokens (bound 2.14x)",
            end_to_end,
        ),
        (
            "decode",
            step <= 1.15 * floor,
            f"{1e3 * step:.2f} ms a token, {step / floor:.2f} times the {1e3 * floor:.2f} ms that "
            "reading the weights takes at the bandwidth of a copy (bound 1.15)",
            step / floor,
        ),
    ]


def torch_child(path: str, runs: int) -> None:
    """In torch's own process: prints the baselines' times as JSON."""
    import torch

    from trio_deploy.bench.baselines import open_baseline
    from trio_deploy.bench.cases import fitted
    from trio_deploy.bench.timing import Spread, interleave
    from trio_deploy.bench.workload import Workload, picture_size

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bundle = Bundle.load(Path(path))
    width, height = picture_size(bundle.config)
    work, _ = fitted(Workload(1, width, height, "?", NEW_TOKENS), bundle, Options().text_tokens)
    result: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for kind in ("transformers", "oracle"):
        case = Case(kind, kind, path)
        dtype = bundle.manifest.dtype if device == "cuda" else "float32"
        answer = open_baseline(case, bundle, work, device=device, dtype=dtype)
        found = interleave(runs, {kind: answer})[kind]
        result[kind] = {
            "dtype": dtype,
            "prefill_s": Spread.of([run.prefill_s for run in found]).to_json(),
            "first_token_s": Spread.of([run.first_token_s for run in found]).to_json(),
            "tokens_per_s": Spread.of([run.tokens_per_s for run in found]).to_json(),
        }
        del answer
    print(json.dumps(result))


def torch_is_here() -> bool:
    """Whether the oracle can be asked in this process."""
    from trio_deploy.bench import baselines

    return baselines.available()


def to_markdown(found: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"# {found['gpu']}",
        "",
        "Command: `scripts/gpu_check.sh`.",
        "",
        f"Compute capability {found['compute_capability']}, CUDA {found['driver']} by its driver, "
        f"{found['memory_gib']} GiB; TensorRT {found['tensorrt']}, {found['dialect']} graphs; a "
        f"copy in its memory reads and writes {found['copy_gb_per_s']:.0f} GB/s.",
        "",
        "| check | holds | found |",
        "|---|---|---|",
    ]
    for name, check in found["checks"].items():
        lines.append(f"| {name} | {'yes' if check['passed'] else '**no**'} | {check['text']} |")
    large = found.get("large", {})
    rows = [(case["name"], "TensorRT", case) for case in large.get("bench", {}).get("cases", [])]
    torch = large.get("torch") or {}
    rows += [
        (kind, f"torch, {torch['device']}, {torch[kind]['dtype']}", torch[kind])
        for kind in ("transformers", "oracle")
        if kind in torch
    ]
    if rows:
        lines += ["", f"## {large['name']}, random weights, {large['decode_layout']} decode", ""]
        lines += ["| case | with | prefill | first token | tokens/s |", "|---|---|---|---|---|"]
        for name, by, case in rows:
            prefill, first, rate = (
                case[key]["median"] for key in ("prefill_s", "first_token_s", "tokens_per_s")
            )
            lines.append(
                f"| {name} | {by} | {1e3 * prefill:.1f} ms | {1e3 * first:.1f} ms | {rate:.1f} |"
            )
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """A GPU's name for a file: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parameters(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) // 2


def main(arguments: list[str] | None = None) -> int:
    """All steps; 0 where everything holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="for bundles")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    parser.add_argument("--size", default="llava-next-7b", help="recipe or sizes, as trio bench's")
    parser.add_argument("--tiny", default="tiny", help="recipe or checkpoint of the small model")
    parser.add_argument("--budget", type=float, default=0.111)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip", action="append", default=[], choices=PARTS)
    parser.add_argument(
        "--no-large-parity", action="store_true", help="ONNX Runtime takes minutes for 7B on a CPU"
    )
    parser.add_argument("--torch-python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--torch-child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.torch_child:
        torch_child(args.torch_child, args.runs)
        return 0
    try:
        check = Check(args)
    except TrioError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    if "tests" not in args.skip:
        check.attempt("pytest -m gpu", check.run_tests)
    if "tiny" not in args.skip:
        check.check_tiny()
    if "large" not in args.skip:
        check.attempt("large", check.check_large)
        if hasattr(check, "large"):
            check.attempt("times", check.time_large)
            if "torch" not in args.skip:
                check.attempt("torch", check.time_torch)
    print(f"written: {check.write()}")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
