"""What a bundle says of itself: model, graphs, schedule, and its cost by counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trio_deploy.bench.results import PROBES
from trio_deploy.bench.table import operations, times
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.describe import quantised_widths
from trio_deploy.bundle.manifest import ENGINES, WEIGHTS, StageInfo
from trio_deploy.cost.flops import account, vision_flops
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import request_limits
from trio_deploy.files import format_bytes
from trio_deploy.runtimes.tensorrt.record import RECORD, Record
from trio_deploy.schedule.schedule import Schedule

_TEXT_TOKENS = 60  # as `trio plan` and the paper count

_WORK = {
    "vision": "pictures to image features",
    "embed": "prompt and image features to hidden states",
    "decode": "one token after another",
}


def exported(bundle: Bundle) -> dict[str, Any]:
    """Facts, stages and engines of a bundle."""
    manifest, config = bundle.manifest, bundle.config
    text = config.text
    weights = [i.size for name, i in manifest.files.items() if name.startswith(f"{WEIGHTS}/")]
    state = {
        "copied": "in the bundle",
        "linked": "hard links to the checkpoint",
        "planned": "not there yet",
    }.get(manifest.weights, manifest.weights)
    runs_on = ", ".join(filter(None, (manifest.runtime, manifest.provider)))
    revision = f" at {manifest.model.revision}" if manifest.model.revision else ""
    facts = [
        ("Model", f"{manifest.model.source}{revision}"),
        (
            "Language model",
            f"{text.num_layers} layers, hidden size {text.hidden_size}, {text.num_heads} heads "
            f"({text.num_kv_heads} for keys and values), vocabulary {text.vocab_size}",
        ),
        (
            "Vision tower",
            f"{config.vision.describe()}, up to "
            f"{request_limits(config).visual_tokens} visual tokens per picture",
        ),
        ("Target", f"{manifest.target} ({runs_on})"),
        ("Graphs", f"{manifest.dialect} dialect, {manifest.dtype}, decode {manifest.decode}"),
        ("Pruning", str(bundle.schedule)),
        *(
            (f"At a budget of {budget:g}", str(other))
            for budget, other in bundle.budgets.items()
            if other != bundle.schedule
        ),
        (
            "Selection",
            f"probe {manifest.probe}, positions {manifest.positions}, "
            f"similarity threshold {manifest.threshold:g}",
        ),
        ("Weights", f"{format_bytes(sum(weights))}, {state}"),
        *((("Quantised", "; ".join(widths)),) if (widths := quantised_widths(manifest)) else ()),
        ("Made with", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
    ]
    stages = [
        {
            "name": stage.name,
            "work": _work(stage, bundle),
            "file": stage.file,
            "size": format_bytes(manifest.files[stage.file].size),
        }
        for stage in manifest.stages
    ]
    return {
        "name": manifest.model.name,
        "scheme": manifest.quantization.scheme if manifest.quantization else "",
        "facts": facts,
        "stages": stages,
        "engines": _engines(bundle.path / ENGINES),
    }


def _engines(folder: Path) -> list[dict[str, str]]:
    """Engines of `trio build` per target, by their records."""
    found = []
    for record in sorted(folder.glob(f"*/{RECORD}")):
        try:
            built = Record.load(record.parent)
        except TrioError as error:
            found.append({"target": record.parent.name, "problem": str(error)})
            continue
        size = sum(stage.bytes for stage in built.stages.values())
        gpu = built.gpu
        of = f"{gpu.name} ({gpu.compute_capability}, driver {gpu.driver})" if gpu else ""
        found.append(
            {
                "target": built.target,
                "problem": "",
                "gpu": of or built.built_for,
                "library": built.library.name,
                "stages": str(len(built.stages)),
                "size": format_bytes(size),
            }
        )
    return found


def _work(stage: StageInfo, bundle: Bundle) -> str:
    if stage.kind in _WORK:
        return _WORK[stage.kind]
    if stage.kind == "select" and stage.index is not None:
        layer = bundle.schedule.points[stage.index - 1].layer
        return f"chooses visual tokens before layer {layer}, by {stage.method}"
    first, last = stage.layers[0], stage.layers[-1]
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def schedule(bundle: Bundle) -> dict[str, Any]:
    """Visual tokens at every layer, for a picture with the maximum number of them."""
    text = bundle.config.text
    visual = request_limits(bundle.config).visual_tokens
    kept = bundle.schedule.visual_per_layer(visual, text.num_layers)
    points = zip(bundle.schedule.points, bundle.schedule.resolve(visual), strict=True)
    return {
        "visual": visual,
        "layers": [
            {"number": number, "kept": count, "share": count / visual}
            for number, count in enumerate(kept)
        ],
        "points": [{"layer": p.layer, "keep": keep, "method": p.method} for p, keep in points],
        "average": sum(kept) / len(kept),
        "share": sum(kept) / len(kept) / visual,
    }


def arithmetic(bundle: Bundle) -> dict[str, Any]:
    """Operations and KV cache by counting, against no pruning, for the largest picture."""
    config = bundle.config
    largest = request_limits(config)
    visual = largest.visual_tokens
    size = 4 if bundle.manifest.dtype == "float32" else 2

    def cost(of: Schedule) -> Any:
        return account(config.text, of, visual, _TEXT_TOKENS, item_bytes=size, probes=PROBES)

    ours, full = cost(bundle.schedule), cost(Schedule())
    tower = vision_flops(config, largest.tiles)
    rows = [
        ("Prefill of the language model", ours.prefill, full.prefill),
        ("– in its layers", ours.layers, full.layers),
        ("– in selecting", ours.selection, 0),
        ("Vision tower", tower, tower),
    ]
    table = [
        (name, operations(a), operations(b) if b else "–", times(b / a) if a and b else "")
        for name, a, b in rows
    ]
    table.append(
        (
            f"KV cache, {bundle.manifest.dtype}",
            format_bytes(ours.kv_bytes),
            format_bytes(full.kv_bytes),
            times(full.kv_bytes / ours.kv_bytes),
        )
    )
    return {
        "rows": table,
        "visual": visual,
        "text": _TEXT_TOKENS,
        "flops_ratio": full.prefill / ours.prefill,
        "kv_ratio": full.kv_bytes / ours.kv_bytes,
    }
