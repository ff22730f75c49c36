"""Measure the memory of a Qwen model's vision tower on each CPU runtime, by size of the picture.

    python scripts/tower_memory.py [--model qwen3-vl-2b] [--side 1008] [--way ort] [--out]

The tower has the sizes of a recipe and random weights, in float32. Each run is in a process of its
own, which opens the graph, forgets its peak so far and runs one picture. With --out rows are
written to docs/measurements/tower-memory.json and .md, with the machine; rows of other models,
sides and ways that were measured before stay. A tower of fewer layers (--layers) needs as much
beyond its weights. The table in docs/architecture.md is made of the same rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from trio_deploy.bench.environment import machine, machine_text
from trio_deploy.bundle.manifest import StageInfo, TensorPlace
from trio_deploy.bundle.weights import Layout, plan_layout
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.export.graphs import serialised, used_weights
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.preprocessing import Preprocessor, with_max_pixels
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_vision
from trio_deploy.quant.stored_weight import parts_of
from trio_deploy.runtimes.registry import open_runtime, runtime_spec

DOCS = Path(__file__).parent.parent / "docs"
OUT = DOCS / "measurements" / "tower-memory.json"
PAGE = DOCS / "architecture.md"
MARKS = ("<!-- tower memory: begin -->\n", "<!-- tower memory: end -->")
MODELS = ("qwen3-vl-2b", "qwen2.5-vl-3b")
SIDES = (1008, 2048)
_MIB = 2**20
_CHUNK = 1 << 22  # numbers drawn once, and written again and again


@dataclass(frozen=True)
class Way:
    """Graphs and the runtime that they run on.

    Attributes:
        whole: whether all queries attend at once, as in graphs exported for another runtime.
    """

    dialect: str
    runtime: str
    whole: bool = False

    @property
    def query_block(self) -> int | None:
        """As of `GraphOptions`."""
        return None if self.whole else runtime_spec(self.runtime).query_block(self.dialect)

    @property
    def title(self) -> str:
        """What the table calls it."""
        block = self.query_block
        how = f", {block} queries at a time" if block else ""
        how += ", all queries at once" if self.whole else ""
        return f"{runtime_spec(self.runtime).title}, `{self.dialect}`{how}"


WAYS = {
    "ort": Way("ort", "onnxruntime"),
    "openvino": Way("primitive", "openvino"),
    "onnx": Way("onnx", "onnxruntime"),
    "primitive": Way("primitive", "onnxruntime"),
    "onnx-whole": Way("onnx", "onnxruntime", whole=True),
    "primitive-whole": Way("primitive", "onnxruntime", whole=True),
}


def tower_config(raw: dict[str, Any], layers: int | None = None) -> ModelConfig:
    """A model of a config.json, whose tower has so many layers; None: all.

    With windows the last of them attends to the whole picture; features are taken from the first.
    """
    config = parse_config(raw)
    tower = config.patch_tower
    if layers is None:
        return config
    kept = replace(
        tower,
        num_layers=layers,
        full_layers=() if tower.window is None else (layers - 1,),
        deepstack_layers=tuple(range(min(layers, len(tower.deepstack_layers)))),
    )
    return replace(config, vision=kept)


def write_graph(folder: Path, config: ModelConfig, way: Way) -> dict[str, TensorPlace]:
    """Write vision.onnx and its random weights; returns where they are."""
    options = GraphOptions(way.dialect, positions="original", query_block=way.query_block)
    models = {"vision": build_vision(config, options)}
    stages, stored = [StageInfo("vision", "vision")], options.stored_weights(config)
    layout = plan_layout(parts_of(used_weights(stages, models, stored)))
    _, contents = serialised(stages, models, layout.places)
    (folder / "vision.onnx").write_bytes(contents["vision.onnx"])
    _write_random(folder, layout)
    return dict(layout.places)


def _write_random(folder: Path, layout: Layout) -> None:
    numbers = np.random.default_rng(0).standard_normal(_CHUNK, np.float32) * np.float32(0.02)
    for shard in layout.shards:
        file = folder / shard.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            out.write(shard.header)
            left = sum(math.prod(layout.places[name].shape) for name in shard.names)
            while left:
                count = min(left, _CHUNK)
                out.write(numbers[:count].tobytes())
                left -= count


def feeds_of(config: ModelConfig, settings: dict[str, Any], side: int) -> dict[str, np.ndarray]:
    """The tower's inputs for a square picture that is not scaled down."""
    settings = with_max_pixels(settings, config, 2 * side * side)
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    return Preprocessor(settings, config)(Image.fromarray(noise)).feeds


def _child(folder: Path, runtime: str, threads: int) -> None:
    """Open the graph, run it once, and print figures in MiB as JSON."""
    places = msgspec.json.decode((folder / "places.json").read_bytes(), type=dict[str, TensorPlace])
    with np.load(folder / "feeds.npz") as saved:
        feeds = dict(saved)
    engine = open_runtime(RuntimeOptions(runtime, threads=threads)).open(
        folder / "vision.onnx", places
    )
    opening, loaded = _status("VmHWM"), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started = time.perf_counter()
    out = engine.run(feeds)
    seconds = time.perf_counter() - started
    assert all(np.isfinite(values).all() for values in out.values())
    figures = {"opening": opening, "loaded": loaded, "peak": _status("VmHWM"), "seconds": seconds}
    print(json.dumps(figures))


def _status(key: str) -> float:
    """MiB of a line of this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(
    raw: dict[str, Any],
    settings: dict[str, Any],
    way: Way,
    side: int,
    *,
    layers: int | None = None,
    threads: int = 2,
) -> dict[str, Any]:
    """Run a picture in a process of its own.

    Args:
        raw, settings: config.json and preprocessor_config.json.

    Raises:
        RuntimeError: the process failed, for want of memory above all.
    """
    config = tower_config(raw, layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = write_graph(folder, config, way)
        (folder / "places.json").write_bytes(msgspec.json.encode(places))
        feeds = feeds_of(config, settings, side)
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
        command = [sys.executable, __file__, "--child", name, way.runtime, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise RuntimeError(f"{way.title}, {side}: {words:.300}")
    figures = json.loads(done.stdout.splitlines()[-1])
    patches = feeds["pixel_values"].shape[1]
    return {
        "layers": config.patch_tower.num_layers,
        "side": side,
        "patches": patches,
        "graphs": way.title,
        "weights_mib": round(sum(place.nbytes for place in places.values()) / _MIB),
        "opening_mib": round(figures["opening"]),
        "loaded_mib": round(figures["loaded"]),
        "run_mib": round(figures["peak"] - figures["loaded"]),
        "peak_mib": round(max(figures["peak"], figures["opening"])),
        "seconds": round(figures["seconds"], 1),
    }


HEADS = {
    "model": "tower of",
    "layers": "layers",
    "side": "side of the picture",
    "patches": "patches",
    "graphs": "runtime, graphs",
    "weights_mib": "weights, MiB",
    "opening_mib": "peak of opening, MiB",
    "loaded_mib": "held when opened, MiB",
    "run_mib": "more in the run, MiB",
    "peak_mib": "peak, MiB",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(HEADS.values()) + " |", "|---" * len(HEADS) + "|"]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in HEADS) + " |" for row in rows]
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "side", "layers", "graphs"))


def record(rows: Sequence[dict[str, Any]], threads: int) -> None:
    """Add rows to the files in docs/measurements."""
    known = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.is_file() else []
    merged = {_key(row): row for row in (*known, *rows)}
    ordered = [merged[key] for key in sorted(merged, key=lambda key: (key[:2], -key[2], key[3]))]
    where = machine(threads)
    OUT.write_text(json.dumps({"machine": where, "rows": ordered}, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(
        "# Memory of vision towers over pictures of any size\n\n"
        "Resident memory of a process that opens the tower (float32, random weights) and runs one "
        "picture, which is what a float32 bundle's vision stage adds. Weights are pages of their "
        f"file where the runtime maps it. {machine_text(where, None, None)} Made by `python "
        f"scripts/tower_memory.py --out`.\n\n{table(ordered)}\n"
    )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/architecture.md: the memory of runs, of the tower with the most layers."""
    most = {
        (row["model"], row["side"], row["graphs"]): row["run_mib"]
        for row in sorted(rows, key=lambda row: int(row["layers"]))
    }
    columns = sorted({key[:2] for key in most}, key=lambda key: (key[0], key[1]))
    lines = [
        "| runtime, graphs | " + " | ".join(f"`{name}`, {side}²" for name, side in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for way in WAYS.values():
        found = [most.get((*column, way.title)) for column in columns]
        cells = ["" if mib is None else f"{mib / 1024:.1f} GiB" for mib in found]
        if any(cells):
            lines.append(f"| {way.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page() -> None:
    """Put the recorded rows into docs/architecture.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    made = summary(json.loads(OUT.read_text(encoding="utf-8"))["rows"])
    PAGE.write_text(f"{before}{MARKS[0]}{made}\n{MARKS[1]}{after}", encoding="utf-8")


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.model or MODELS:
        recipe = load_recipe(name)
        for side in args.side or SIDES:
            for way in args.way or ("ort", "openvino", "onnx", "primitive"):
                row = measure(
                    recipe.architecture,
                    recipe.preprocessing,
                    WAYS[way],
                    side,
                    layers=args.layers,
                    threads=args.threads,
                )
                yield {"model": name, **row}


def main() -> int:
    """Measure, print, and record."""
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", help="a recipe; repeatable")
    parser.add_argument("--side", action="append", type=int, help="pixels; repeatable")
    parser.add_argument("--way", action="append", choices=WAYS, help="repeatable")
    parser.add_argument("--layers", type=int, help="layers of the tower (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", action="store_true", help="record the rows")
    args = parser.parse_args()
    print(table([]))
    for row in _rows(args):
        print(table([row]).splitlines()[-1], f"{row['seconds']} s", flush=True)
        if args.out:
            record([row], args.threads)
            write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
