"""Measure speed and size of pruned inference, and compare them with the project's bounds.

    python scripts/bench_core.py --out docs/measurements            # the published figures
    python scripts/bench_core.py --quick                            # a smoke test in seconds

Measuring itself is `trio_deploy.bench`, as for `trio bench`: contenders run by turns in this
one process (or, for another Python environment, in a child that waits for its turn), with new
pictures in every run, after warm-up; medians are reported. Peak memory is that of a fresh process
per pipeline.

Model: a random-initialised LLaVA-1.5 with five pictures of 576 tokens in its prompt, so 2880 visual
and 64 text tokens; weights do not change what a matrix product costs. OpenVINO GenAI is optional
and needs an environment of its own (optimum-intel pins an older transformers): make one with
`pip install openvino-genai optimum-intel` (and `pip uninstall torchvision` where torch is the CPU
build, which PyPI's torchvision does not fit), and pass its interpreter as --genai-python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from trio_deploy import Bundle, RuntimeOptions, Schedule, TrioError, export_model, plan
from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.contenders.contenders import Contenders
from trio_deploy.bench.contenders.genai import missing
from trio_deploy.bench.contenders.oracle import autograd_probe
from trio_deploy.bench.environment import machine, machine_text
from trio_deploy.bench.measure import interleave
from trio_deploy.bench.peak_memory import peak_memory, peak_mib
from trio_deploy.bench.synthetic import Size, write_checkpoint
from trio_deploy.bench.workload import Workload, fit_prompt
from trio_deploy.runtimes.registry import open_engine

IMAGES = 5
TEXT_TOKENS = 64
SECTIONS = ("ort", "openvino", "count", "genai", "saliency", "export", "decode")
SELECTION_SHARE = 0.17  # maximum at d = 1024 on a CPU; 10.4 % of the multiply-adds are its
COUNTED_SHARE = 0.06  # maximum at 7B, by counting


@dataclass(frozen=True)
class Setting:
    """A model to measure; `saliency`: size of the model for comparing saliency."""

    model: Size
    saliency: Size
    schedule: str
    runs: int
    new_tokens: int

    @property
    def visual(self) -> int:
        """Visual tokens of all pictures together."""
        return IMAGES * (self.model.image // self.model.patch) ** 2


def setting(sizes: str, saliency: str, schedule: str, runs: int, new_tokens: int) -> Setting:
    """A setting from sizes as in `trio bench --size`; the saliency model has two layers."""
    return Setting(
        Size.parse(sizes), Size.parse(f"{sizes},layers=2,{saliency}"), schedule, runs, new_tokens
    )


SIZES = {
    # 11.1 % of 2880 visual tokens, averaged over the 16 layers: (2880 + 4·292 + 3·171 + 8·70) / 16
    "full": setting(
        "d=1024,layers=16,vocab=32000,heads=16,mlp=2816,image=336",
        "d=2048,heads=16,mlp=5504",
        "1:292,5:171,8:70",
        7,
        48,
    ),
    "small": setting(
        "d=256,layers=16,vocab=4096,heads=4,mlp=704,image=168",
        "d=512,heads=4,mlp=1408",
        "1:73,5:43,8:18",
        3,
        24,
    ),
    "quick": setting(
        "d=64,layers=10,vocab=512,heads=4,mlp=128,image=56", "d=64", "1:8,5:5,8:2", 2, 8
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure, its bound, and whether the bound is met."""

    what: str
    ours: str
    other: str
    figure: str
    bound: str
    met: bool | None


# --------------------------------------------------------------------------- models and what runs


def checkpoint(cache: Path, size: Size) -> Path:
    """Checkpoint of a size with random weights, written once."""
    return write_checkpoint(cache / size.name, size.config(), progress=False)


def bundle_of(source: Path, out: Path, schedule: str | Schedule, dialect: str) -> Bundle:
    """A float32 bundle of a checkpoint, with weights linked to the checkpoint's files."""
    return export_model(
        source,
        out,
        schedule=schedule,
        dialect=dialect,
        dtype="float32",
        link_weights=True,
        force=True,
        progress=False,
    )


def cases(cache: Path, at: Setting, runtime: str, threads: int) -> tuple[Case, Case]:
    """The pruned and the unpruned pipeline, each of a bundle of its own."""
    source = checkpoint(cache, at.model)
    dialect = "ort" if runtime == "onnxruntime" else "primitive"
    result = []
    for name, schedule in (("pruned", Schedule.parse(at.schedule)), ("unpruned", Schedule())):
        bundle = bundle_of(source, cache / f"{source.name}-{dialect}-{name}", schedule, dialect)
        options = RuntimeOptions(runtime, threads=threads)
        result.append(Case(name, "trio", str(bundle.path), options=options))
    return result[0], result[1]


def in_precision(case: Case, precision: str | None) -> Case:
    """The case computed in another float type; None: the runtime's own."""
    return replace(case, options=replace(case.options, precision=precision))


def workload(at: Setting, bundle: str, new_tokens: int) -> Workload:
    """The request of a run, with a prompt of `TEXT_TOKENS` text tokens."""
    side = at.model.image
    asked = Workload(IMAGES, side, side, "?", new_tokens)
    work, tiles = fit_prompt(asked, Bundle.load(bundle), TEXT_TOKENS)
    assert tiles == IMAGES, tiles
    return work


def checked(run: Callable[[int], Run], at: Setting) -> Callable[[int], Run]:
    """A contender that asserts the number of prompt tokens that the bounds are for."""

    def answer(seed: int) -> Run:
        result = run(seed)
        assert result.visual_tokens == at.visual, result.visual_tokens
        assert result.prompt_tokens == at.visual + TEXT_TOKENS, result.prompt_tokens
        return result

    return answer


def summary(runs: Sequence[Run]) -> dict[str, float]:
    """Medians in seconds: prefill (embedding, segments, selections), selections, first token."""
    return {
        "prefill_s": median(run.prefill_s for run in runs),
        "select_s": median(run.groups["selection"] for run in runs),
        "vision_s": median(run.groups["vision"] + run.groups["preprocess"] for run in runs),
        "first_token_s": median(run.first_token_s for run in runs),
        "kv_mib": median(run.kv_bytes or 0 for run in runs) / 2**20,
    }


# ---------------------------------------------------------------------------------------- sections


def bench_prefill(
    cache: Path, at: Setting, threads: int, runtime: str, precisions: list[str | None]
) -> tuple[dict[str, Any], list[Row]]:
    """Pruned against unpruned prefill, the selections' share and peak memory."""
    pair = cases(cache, at, runtime, threads)
    work = workload(at, pair[0].bundle, 1)
    lines = {
        f"{case.name} {precision or 'float32'}": in_precision(case, precision)
        for precision in precisions
        for case in pair
    }
    with Contenders() as opened:
        contenders = {key: checked(opened.open(case, work), at) for key, case in lines.items()}
        results = {key: summary(runs) for key, runs in interleave(at.runs, contenders).items()}
    del opened, contenders
    for key, case in lines.items():
        results[key]["peak_mib"] = peak_memory(case, work) or 0.0
    rows = []
    for precision in precisions:
        label = precision or "float32"
        ours, other = results[f"pruned {label}"], results[f"unpruned {label}"]
        ratio, share = other["prefill_s"] / ours["prefill_s"], ours["select_s"] / ours["prefill_s"]
        bound = 4.5 if precision == "bfloat16" else 6.0
        rows += [
            Row(
                f"{runtime} {label}: prefill, pruned against unpruned",
                f"{ours['prefill_s']:.3f} s",
                f"{other['prefill_s']:.3f} s",
                f"{ratio:.2f}x",
                f"≥ {bound}x",
                ratio >= bound,
            ),
            Row(
                f"{runtime} {label}: saliency and selection, share of the pruned prefill",
                f"{ours['select_s']:.3f} s",
                f"{ours['prefill_s']:.3f} s",
                f"{share:.1%}",
                f"≤ {SELECTION_SHARE:.0%}" if runtime == "onnxruntime" else "",
                share <= SELECTION_SHARE if runtime == "onnxruntime" else None,
            ),
            Row(
                f"{runtime} {label}: peak memory, pruned against unpruned",
                f"{ours['peak_mib']:.0f} MiB",
                f"{other['peak_mib']:.0f} MiB",
                f"{ours['peak_mib'] / other['peak_mib']:.2f}",
                "≤ 1" if runtime == "onnxruntime" else "",
                ours["peak_mib"] <= other["peak_mib"] if runtime == "onnxruntime" else None,
            ),
        ]
    return results, rows


def count_selection() -> tuple[dict[str, Any], list[Row]]:
    """The selections' share of a pruned 7B prefill, by counting multiply-adds."""
    cost = plan("llava-next-7b", budget=0.111).cost
    share = cost.selection / cost.prefill
    row = Row(
        "llava-next-7b: saliency and selection, share of the pruned prefill's multiply-adds",
        f"{cost.selection / 1e9:.0f} G",
        f"{cost.prefill / 1e9:.0f} G",
        f"{share:.1%}",
        f"≤ {COUNTED_SHARE:.0%}",
        share <= COUNTED_SHARE,
    )
    return {"selection": cost.selection, "prefill": cost.prefill}, [row]


def bench_decode(cache: Path, at: Setting, threads: int) -> tuple[dict[str, Any], list[Row]]:
    """Tokens per second after the first: pruned, unpruned, transformers on the same weights."""
    pruned, unpruned = cases(cache, at, "onnxruntime", threads)
    plain = replace(unpruned, name="transformers", kind="transformers")
    work = workload(at, pruned.bundle, at.new_tokens)
    with Contenders() as opened:
        contenders = {
            case.name: checked(opened.open(case, work), at) for case in (pruned, unpruned, plain)
        }
        raw = interleave(max(2, at.runs // 2), contenders, warm_up=1)
    speeds = {name: median(run.tokens_per_s for run in runs) for name, runs in raw.items()}
    kv = {name: raw[name][0].kv_bytes for name in ("pruned", "unpruned")}
    rows = [
        Row(
            f"decode, pruned against {name} (onnxruntime float32)",
            f"{speeds['pruned']:.2f} tokens/s",
            f"{speeds[name]:.2f} tokens/s",
            f"{speeds['pruned'] / speeds[name]:.2f}x",
            "≥ 1x",
            speeds["pruned"] >= speeds[name],
        )
        for name in ("unpruned", "transformers")
    ]
    return {"tokens_per_s": speeds, "kv_bytes": kv}, rows


def bench_saliency(cache: Path, at: Setting, threads: int) -> tuple[dict[str, Any], list[Row]]:
    """A whole select stage (saliency, suppression, compaction) against an autograd probe."""
    source, width = checkpoint(cache, at.saliency), at.saliency.d
    keep = max(1, round(at.visual * 0.111))
    bundle = bundle_of(source, cache / f"{source.name}-saliency", f"1:{keep}", "ort")
    engine = open_engine(bundle.graph("select_1"), threads=threads)
    total = at.visual + TEXT_TOKENS
    rng = np.random.default_rng(0)
    # Rows resemble a picture's: neighbours are similar, so that suppression has work.
    centres = rng.standard_normal((max(8, at.visual // 12), width))
    rows = centres[rng.integers(0, len(centres), total)]
    rows = (rows + 0.4 * rng.standard_normal(rows.shape)).astype(np.float32)
    visual = np.zeros((1, total), bool)
    visual[0, 1 : 1 + at.visual] = True
    feeds = {
        "hidden_states": rows[None],
        "position_ids": np.arange(total, dtype=np.int64)[None],
        "lengths": np.array([total]),
        "visual_mask": visual,
        "keep": np.array([keep]),
        "width": np.array([TEXT_TOKENS + keep]),
    }

    def analytic(_: int) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        out = engine.run(feeds)
        return time.perf_counter() - start, out["saliency"][0]

    probe = autograd_probe(bundle, 1, rows, threads)
    raw = interleave(at.runs, {"analytic": analytic, "autograd": probe})
    ours = median(seconds for seconds, _ in raw["analytic"])
    other = median(seconds for seconds, _ in raw["autograd"])
    a, b = raw["analytic"][0][1][visual[0]], raw["autograd"][0][1][visual[0]]
    # The analytic one is scaled by a power of two and free of cancellation: compare shapes.
    correlation = float(np.corrcoef(a / np.linalg.norm(a), b / np.linalg.norm(b))[0, 1])
    row = Row(
        f"select stage (saliency and suppression) against the autograd probe, d = {width}",
        f"{ours:.3f} s",
        f"{other:.3f} s",
        f"{other / ours:.1f}x",
        "≥ 10x",
        other / ours >= 10,
    )
    figures = {"select_s": ours, "autograd_s": other, "correlation": correlation, "keep": keep}
    return figures, [row]


def bench_export(cache: Path, at: Setting) -> tuple[dict[str, Any], list[Row]]:
    """Full-size graphs without weights, from a fresh process; and what --link-weights writes."""
    seconds, peaks = [], []
    for _ in range(3):
        out = Path(tempfile.mkdtemp(dir=cache)) / "bundle"
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, __file__, "--child-export", str(out)], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        if process.returncode:
            raise RuntimeError(process.stderr)
        peaks.append(float(process.stdout.split()[-1]))
        stages = Bundle.load(out).stages
        shutil.rmtree(out.parent)
    source = checkpoint(cache, at.model)
    linked = bundle_of(source, cache / "linked", at.schedule, "ort")
    own = {path.stat().st_ino for path in source.iterdir()}
    files = list((linked.path / "weights").iterdir())
    written = sum(f.stat().st_size for f in files if f.stat().st_ino not in own)
    whole = sum(f.stat().st_size for f in files)
    took, peak = median(seconds), max(peaks)
    rows = [
        Row(
            "all graphs of llava-next-7b (--graphs-only), time of the command",
            f"{took:.2f} s",
            "",
            f"{len(stages)} graphs",
            "< 5 s",
            took < 5,
        ),
        Row(
            "the same, peak memory",
            f"{peak:.0f} MiB",
            "",
            "",
            "< 500 MiB",
            peak < 500,
        ),
        Row(
            "weight bytes written with --link-weights",
            f"{written} B",
            f"{whole / 2**20:.1f} MiB of weights",
            "",
            "0 B",
            written == 0,
        ),
    ]
    figures = {"graphs_only_s": seconds, "graphs_only_mib": peaks, "linked_bytes_written": written}
    return figures, rows


def child_export(out: str) -> int:
    """Child process of `bench_export`: run `trio export --graphs-only`, print peak memory."""
    from trio_deploy.cli import main as cli

    arguments = ["--model", "llava-next-7b", "--graphs-only", "--out", out]
    with contextlib.redirect_stdout(sys.stderr):
        status = cli.main(["export", *arguments])
    print(peak_mib())
    return status


def bench_genai(
    cache: Path, at: Setting, threads: int, python: str
) -> tuple[dict[str, Any], list[Row]] | str:
    """Time to the first token against OpenVINO GenAI's VLMPipeline, both in bfloat16.

    Returns:
        A message instead of figures if GenAI or optimum-intel is not installed.
    """
    if reason := missing(python):
        return f"skipped: {reason}"
    pruned = in_precision(cases(cache, at, "openvino", threads)[0], "bfloat16")
    genai = replace(
        pruned,
        name="genai",
        kind="genai",
        checkpoint=str(checkpoint(cache, at.model)),
        python=python,
    )
    work = workload(at, pruned.bundle, 1)
    with Contenders() as opened:
        try:
            answers = {"pruned": checked(opened.open(pruned, work), at)}
            answers["genai"] = opened.open(genai, work)
        except TrioError as error:
            return f"skipped: {error}"
        raw = interleave(at.runs, answers)
    ours, other = (median(run.first_token_s for run in raw[name]) for name in ("pruned", "genai"))
    row = Row(
        "time to first token, pruned (openvino bfloat16) against OpenVINO GenAI bfloat16, "
        "unpruned; toy tower",
        f"{ours:.3f} s",
        f"{other:.3f} s",
        f"{other / ours:.2f}x",
        "≥ 4x",
        other / ours >= 4,
    )
    figures = {
        "pruned": summary(raw["pruned"]),
        "genai_first_token_s": other,
        "genai_input_tokens": raw["genai"][0].prompt_tokens,
    }
    return figures, [row]


# ------------------------------------------------------------------------------------------ output


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    """The table in Markdown, with machine and model."""
    size = report["size"]
    lines = [
        "# Speed and size",
        "",
        f"Command: `{report['command']}`.",
        "",
        f"Machine: {machine_text(report['machine'], None, None)}",
        f"Load average before and after: {report['load_before']:.2f}, {report['load_after']:.2f}.",
        "",
        f"Model: random-initialised LLaVA-1.5, d = {size['d']}, {size['layers']} layers, "
        f"{size['heads']} heads, vocabulary {size['vocab']}, {report['visual_tokens']} visual + "
        f"{TEXT_TOKENS} text tokens; pruned to {report['schedule']} (layer:tokens). "
        f"Medians of {report['runs']} interleaved runs after warm-up, new pictures in each.",
        "",
        "| what | ours | against | figure | to reach | reached |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = {True: "yes", False: "**no**", None: ""}[row.met]
        lines.append(
            f"| {row.what} | {row.ours} | {row.other} | {row.figure} | {row.bound} | {met} |"
        )
    for name, message in report["skipped"].items():
        lines += ["", f"{name}: {message}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for core.json and core.md")
    parser.add_argument("--cache", type=Path, help="where checkpoints are kept between runs")
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--child-export", help=argparse.SUPPRESS)
    args = parser.parse_args()
    at = SIZES[args.size]
    if args.child_export:
        return child_export(args.child_export)
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}: choose from {', '.join(SECTIONS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.ExitStack() as stack:
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache.mkdir(parents=True, exist_ok=True)
        sections: dict[str, Callable[[], tuple[dict[str, Any], list[Row]] | str]] = {
            "ort": lambda: bench_prefill(cache, at, args.threads, "onnxruntime", [None]),
            "openvino": lambda: bench_prefill(
                cache, at, args.threads, "openvino", ["float32", "bfloat16"]
            ),
            "count": count_selection,
            "genai": lambda: bench_genai(cache, at, args.threads, args.genai_python),
            "saliency": lambda: bench_saliency(cache, at, args.threads),
            "export": lambda: bench_export(cache, at),
            "decode": lambda: bench_decode(cache, at, args.threads),
        }
        command = "python scripts/bench_core.py"
        if args.size != "full":
            command += f" --size {args.size}"
        if args.only:
            command += f" --only {args.only}"
        report: dict[str, Any] = {
            "command": command,
            "machine": machine(args.threads),
            "size": asdict(at.model),
            "saliency_size": asdict(at.saliency),
            "schedule": at.schedule,
            "runs": at.runs,
            "visual_tokens": at.visual,
            "load_before": os.getloadavg()[0],
            "figures": {},
            "skipped": {},
        }
        rows: list[Row] = []
        for name in wanted:
            print(f"{name} …", file=sys.stderr, flush=True)
            result = sections[name]()
            if isinstance(result, str):
                report["skipped"][name] = result
                continue
            report["figures"][name], lines = result
            # Bounds are for the full size only; at other sizes fixed costs dominate.
            rows += lines if args.size == "full" else [replace(r, met=None) for r in lines]
    report["load_after"] = os.getloadavg()[0]
    report["rows"] = [asdict(row) for row in rows]
    table = markdown(report, rows)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "core.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "core.md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
