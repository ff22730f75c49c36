"""Compile a bundle's stages with TensorRT-RTX on this machine's CPU, and write what it logged.

    pip install '.[rtx]'
    python scripts/compile_stages.py BUNDLE --target rtx-4090 [--stage prefill_1] [--out NAME]

One stage after another, each in a process of its own. The weights of a bundle without weights
(`trio export --graphs-only`) become inputs of its graphs: then the engines hold none, and kernels
and scratch memory are those of engines that are given theirs. With --out the table is written to
docs/measurements/NAME.md and .json, with the machine and the compiler's version; of all stages
the largest scratch memory goes into the table that `trio plan` shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.weights_as_inputs import with_matrices_as_inputs
from trio_deploy import Bundle, TrioError
from trio_deploy.bench.environment import machine
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.ahead import AheadOfTime, compile_ahead
from trio_deploy.runtimes.tensorrt.build import weight_bytes
from trio_deploy.runtimes.tensorrt.logged import FILE, Logged, key_of, written
from trio_deploy.runtimes.tensorrt.memory import as_exported
from trio_deploy.runtimes.tensorrt.profiles import profiles

ROOT = Path(__file__).parent.parent
_MIB = 2**20


def has_weights(bundle: Bundle) -> bool:
    """Whether its weights are there, or only planned."""
    return bundle.manifest.weights != "planned"


def compiled(
    bundle: Bundle, target: str, stages: Sequence[str]
) -> Iterator[tuple[str, AheadOfTime | str]]:
    """Compile stages; yields a stage and its engine, or why there is none."""
    found = profiles(bundle, load_target(target))
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            graph = bundle.graph(stage)
            if not has_weights(bundle):
                graph = with_matrices_as_inputs(graph, Path(folder) / f"{stage}.onnx")
            try:
                yield stage, compile_ahead(graph, found[stage], dtype=bundle.manifest.dtype)
            except TrioError as error:
                yield stage, str(error)


def row(bundle: Bundle, stage: str, done: AheadOfTime) -> dict[str, float | int | str]:
    """The figures of one engine."""
    report = done.report
    return {
        "stage": stage,
        "weights_mib": round(weight_bytes(bundle, stage) / _MIB, 1),
        "held_mib": round(report.weight_bytes / _MIB, 1),
        "activations_mib": round(report.activation_bytes / _MIB, 1),
        "kernels": report.launches,
        "fused_attention": report.attentions,
        "host_waits": report.host_waits,
        "seconds": round(done.compiled.seconds, 1),
        "host_mib": round(done.compiled.peak_bytes / _MIB),
    }


HEADS = {
    "stage": "stage",
    "weights_mib": "weights of the graph, MiB",
    "held_mib": "weights in the engine, MiB",
    "activations_mib": "scratch memory, MiB",
    "kernels": "kernels",
    "fused_attention": "fused attention",
    "host_waits": "waits for the host",
    "seconds": "compiled in, s",
    "host_mib": "memory to compile, MiB",
}


def record(bundle: Bundle, target: str, about: str, version: str, scratch: int) -> None:
    """Enter the largest scratch memory into the table that `trio plan` shows."""
    own = as_exported(bundle, load_target(target))
    if not has_weights(bundle):  # as `compiled` has them
        own = replace(own, weights="inputs")
    key = key_of(bundle.config, bundle.schedule, own)
    file = ROOT / "trio_deploy" / FILE
    entry = Logged(about, f"TensorRT-RTX {version}", scratch, key)
    file.write_text(written(file.read_text(), entry))


def table(rows: Sequence[dict[str, float | int | str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(HEADS.values()) + " |", "|---" * len(HEADS) + "|"]
    lines += ["| " + " | ".join(str(each[key]) for key in HEADS) + " |" for each in rows]
    return "\n".join(lines)


def main() -> int:
    """Print or write the table; 1 if a stage does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", required=True, help="name or file of the target")
    parser.add_argument("--stage", action="append", help="compile only this stage; repeatable")
    parser.add_argument("--out", help="name of the files in docs/measurements/")
    args = parser.parse_args()
    bundle = Bundle.load(args.bundle)
    stages = args.stage or list(bundle.stages)
    rows, scratch, failed, version = [], [], {}, ""
    for stage, done in tqdm(compiled(bundle, args.target, stages), total=len(stages), unit="stage"):
        if isinstance(done, str):
            failed[stage] = done
        else:
            rows.append(row(bundle, stage, done))
            scratch.append(done.report.activation_bytes)
            version = done.compiled.version
    for stage, why in failed.items():
        print(f"{stage}: {why}", file=sys.stderr)
    manifest = bundle.manifest
    where = machine(None)
    about = (
        f"{manifest.model.name}, {manifest.dialect}, {manifest.dtype}, decode {manifest.decode}, "
        f"at the limits of {args.target}"
    )
    if not has_weights(bundle):
        about += "; matrices are inputs of the engines"
    print(f"TensorRT-RTX {version}: {about}\n\n{table(rows)}")
    if args.out:
        file = ROOT / "docs" / "measurements" / f"{args.out}.json"
        if set(stages) == set(bundle.stages) and not failed:
            record(bundle, args.target, about, version, max(scratch))
        raw = {"tensorrt_rtx": version, "about": about, "machine": where, "stages": rows}
        file.write_text(json.dumps(raw, indent=1) + "\n")
        file.with_suffix(".md").write_text(
            f"# {about}\n\nCompiled by TensorRT-RTX {version} on a CPU; nothing ran on a GPU. Made "
            f"by `python scripts/compile_stages.py BUNDLE --target {args.target}`.\n\n"
            f"{table(rows)}\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
