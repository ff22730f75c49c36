"""What a page says about a bundle, as plain values: nothing here knows HTML.

Every part is on its own, so that one that cannot be had (no weights, no torch, no measurement) is a
sentence on the page and leaves the others alone.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trio_deploy.bench.environment import machine_text
from trio_deploy.bench.measure import SCHEMA as BENCH_SCHEMA
from trio_deploy.bench.measure import UNPRUNED, BenchOptions, measure
from trio_deploy.bench.results import PROBES
from trio_deploy.bench.table import operations, times
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import ENGINES, MANIFEST, WEIGHTS, StageInfo
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.recipe import Recipe, list_recipes
from trio_deploy.cost.flops import account, vision_flops
from trio_deploy.errors import TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.evaluation.ask import AskOptions
from trio_deploy.evaluation.configurations import (
    BLIND,
    Configuration,
    Source,
    as_exported,
    grid,
)
from trio_deploy.evaluation.configurations import UNPRUNED as ALL_TOKENS
from trio_deploy.evaluation.evaluate import evaluate
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.evaluation.results import Result, Results
from trio_deploy.families.registry import request_limits
from trio_deploy.files import format_bytes, sha256_of
from trio_deploy.pipeline.draw import kept_panels, pruned_before
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.report.charts import Retention
from trio_deploy.runtimes.tensorrt.record import RECORD, Record
from trio_deploy.schedule.schedule import Schedule
from trio_deploy.verify import check as parity
from trio_deploy.verify.golden import GOLDEN

_MIB = 2**20
_TEXT_TOKENS = 60  # as `trio plan` and the paper count
_BUDGETS = (0.111, 0.222, 0.333)
_APART = 0.02  # budgets nearer to a bundle's own say nothing new

#: Shown where no picture is given: scenes of the test split, (seed, family, questions asked).
_SCENES = ((2_000_039, "busy", (1, 7)), (2_000_011, "busy", (4,)), (2_000_007, "smooth", (9,)))

_WORK = {
    "vision": "pictures to image features",
    "embed": "prompt and image features to hidden states",
    "decode": "one token after another",
}


@dataclass(frozen=True)
class Asked:
    """A question on the page, with its pictures; `truth` where it is known."""

    prompt: str
    images: tuple[Image.Image | Path, ...]
    truth: str | None = None


def default_questions() -> list[Asked]:
    """Questions about generated scenes, two of them about one picture."""
    asked = []
    for seed, family, numbers in _SCENES:
        scene = scenes.generate(seed, family)  # type: ignore[arg-type]
        for number in numbers:
            question = scene.questions[number]
            asked.append(Asked(question.text, (scene.image,), question.answer))
    return asked


# ------------------------------------------------------------------------------------ the bundle


def exported(bundle: Bundle) -> dict[str, Any]:
    """Model, options, graphs and weights."""
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
            f"{request_limits(config).visual_tokens} visual tokens a picture",
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
        "facts": facts,
        "stages": stages,
        "engines": _engines(bundle.path / ENGINES),
    }


def _engines(folder: Path) -> list[dict[str, str]]:
    """What `trio build` made for each target, by its own records."""
    found = []
    for record in sorted(folder.glob(f"*/{RECORD}")):
        try:
            built = Record.load(record.parent)
        except TrioError as error:
            found.append({"target": record.parent.name, "problem": str(error)})
            continue
        size = sum(stage.bytes for stage in built.stages.values())
        gpu = built.gpu
        found.append(
            {
                "target": built.target,
                "problem": "",
                "gpu": f"{gpu.name} ({gpu.compute_capability}, driver {gpu.driver})",
                "tensorrt": built.tensorrt,
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
    """Tokens at every layer for the picture that has most of them."""
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
    """Operations and KV cache by counting, against no pruning; for the picture with most tokens."""
    config = bundle.config
    largest = request_limits(config)
    visual = largest.visual_tokens
    size = 4 if bundle.manifest.dtype == "float32" else 2

    def cost(of: Schedule) -> Any:
        return account(config.text, of, visual, _TEXT_TOKENS, item_bytes=size, probes=PROBES)

    ours, full = cost(bundle.schedule), cost(Schedule())
    tower = vision_flops(config, largest.tiles)
    rows = [
        ("Prefill of the language model", ours.honest, full.honest),
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
        "flops_ratio": full.honest / ours.honest,
        "kv_ratio": full.kv_bytes / ours.kv_bytes,
    }


# ---------------------------------------------------------------------------------- measurements


def check(bundle: Bundle, runtime: Mapping[str, Any]) -> dict[str, Any]:
    """`trio check` against the oracle where torch is there, else against recorded answers."""
    torch = _has_torch()
    if not (torch or (bundle.path / GOLDEN).is_file()):
        return {
            "skipped": "Not checked: that needs torch and transformers "
            "(pip install 'trio-deploy[reference]'), or a reference recorded by "
            "`trio check --record`."
        }
    try:
        report = parity.check(bundle, golden=not torch, **runtime)
    except TrioError as error:
        return {"skipped": f"Not checked: {error}"}
    rows = [
        {
            "stage": row.stage,
            "relative": f"{row.max_rel:.1e}" if row.max_rel else "0",
            "kept": "" if row.overlap is None else f"{row.overlap:.1%}",
            "tokens": {None: "", True: "equal", False: "differ"}[row.tokens_equal],
            "passed": row.passed,
            "problem": row.problem,
        }
        for row in report.rows
    ]
    return {"title": report.title, "rows": rows, "passed": sum(row.passed for row in report.rows)}


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def cost(
    bundle: Bundle, file: Path | None, options: BenchOptions, progress: bool
) -> dict[str, Any]:
    """Measured time and memory: from a file of `trio bench`, or measured now.

    Raises:
        TrioError: the file is none of `trio bench`, or of another model.
    """
    result = read_bench(file, bundle) if file else measure(bundle, options, progress=progress)
    cases = result["cases"]
    best = next((case for case in cases[1:] if case["kind"] == "trio"), cases[0])
    table = [
        {
            "name": case["name"],
            "first": f"{case['first_token_s']['median']:.3f}",
            "spread": f"{case['first_token_s']['q1']:.3f} – {case['first_token_s']['q3']:.3f}",
            "prefill": times(case["against_unpruned"]["prefill"]),
            "limit": times(case["against_unpruned"]["flops_limit"]),
            "speed": f"{case['tokens_per_s']['median']:.1f}" if case["tokens_per_s"] else "",
            "kv": f"{case['kv_bytes'] / _MIB:.1f}" if case["kv_bytes"] else "",
            "peak": f"{case['peak_mib']:.0f}" if case["peak_mib"] else "",
        }
        for case in cases
    ]
    return {
        "result": result,
        "table": table,
        "work": result["workload"],
        "machine": machine_text(result["machine"], result["load_before"], result["load_after"]),
        "prefill_ratio": best["against_unpruned"]["prefill"] if best["name"] != UNPRUNED else None,
        "quick": file is None,
    }


def read_bench(file: Path, bundle: Bundle) -> dict[str, Any]:
    """What `trio bench --out` wrote about this bundle's model.

    Raises:
        TrioError: it cannot be read, is something else, or of another model.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["schema"] != BENCH_SCHEMA or not result["cases"]:
            raise KeyError("schema")
        name = result["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrioError(
            f"{file} holds no measurements of trio bench: write them with "
            "`trio bench BUNDLE --out NAME` and pass NAME.json"
        ) from error
    _same_model(file, str(name), bundle)
    return dict(result)


def accuracy(
    bundle: Bundle,
    file: Path | None,
    scenes_asked: int,
    runtime: Mapping[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Accuracy retained: from a file of `trio eval`, or of questions about generated scenes.

    Raises:
        TrioError: the file is none of `trio eval`, or of another model.
    """
    if file is not None:
        results = Results.load(file)
        _same_model(file, results.model, bundle)
    elif not scenes_asked:
        return {"skipped": "Not measured: run `trio eval` and pass its results as --eval."}
    else:
        results = _ask_scenes(bundle, scenes_asked, RuntimeOptions(**runtime), progress)
    return {**_accuracy(results, bundle), "quick": file is None}


def _ask_scenes(bundle: Bundle, count: int, options: RuntimeOptions, progress: bool) -> Results:
    """The bundle's own schedule, and budgets above it, on scenes of the test split."""
    source = Source.open(bundle.path)
    configurations: list[Configuration] = []
    if bundle.schedule.layers:
        share = schedule(bundle)["share"]
        more = [budget for budget in _BUDGETS if budget > share + _APART]
        configurations = [as_exported(source), *grid(source, [], more)[0]]
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(
            source,
            scene_questions(count),
            configurations,
            Path(folder),
            AskOptions(options, max_new_tokens=16, progress=progress),
            data="generated scenes of the test split",
        )


def _accuracy(results: Results, bundle: Bundle) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    pruned = [result for result in results.results if result.name not in (ALL_TOKENS, BLIND)]
    own = next((result for result in pruned if _is_bundles(result, results, bundle)), None)
    for result in results.results:
        one, kept = result.overall, result.overall.retention
        said = [str(result.schedule)] if result.schedule and result.schedule.points else []
        said += [f"{key} {value}" for key, value in result.options.items()]
        rows.append(
            {
                "name": result.name,
                "own": result is own,
                "schedule": ", ".join(said),
                "share": f"{result.share:.1%}",
                "accuracy": f"{one.accuracy.value:.1%}" if one.accuracy else "",
                "retention": f"{kept.value:.1%}" if kept else "",
                "interval": ""
                if kept is None or math.isnan(kept.low) or kept.low == kept.high
                else f"{kept.low:.1%} – {kept.high:.1%}",
                "agreement": f"{result.agreement.value:.1%}",
                "kl": f"{one.kl:.3f}",
            }
        )
    return {
        "model": results.model,
        "data": results.data,
        "questions": results.questions,
        "pictures": results.pictures,
        "rows": rows,
        "chart": Retention.of(results, first=own.name if own else None),
        "scored": bool(results.results and results.results[0].overall.retention),
        "headline": (own.overall.retention.value, own.share)
        if own and own.overall.retention
        else None,
        "without": _without(bundle) if own is None and bundle.schedule.points else "",
    }


def _is_bundles(result: Result, results: Results, bundle: Bundle) -> bool:
    """Whether a result is that of the bundle as it is: its schedule and its options.

    A result names the options that were asked for. Any other is the measured bundle's own, or where
    bundles were exported for the evaluation what the model has by default.
    """
    if result.schedule != bundle.schedule:
        return False
    manifest = bundle.manifest
    ours = {
        "threshold": manifest.threshold,
        "probe": manifest.probe,
        "positions": manifest.positions,
    }
    if results.bundle not in ("", sha256_of(bundle.path / MANIFEST)):
        return False
    if not results.bundle:
        known = manifest.model.name in list_recipes()
        defaults = load_recipe(manifest.model.name) if known else Recipe
        unnamed = {key: getattr(defaults, key) for key in ours}
    else:
        unnamed = ours
    return {**unnamed, **result.options} == ours


def _without(bundle: Bundle) -> str:
    """What to say where an evaluation lacks the bundle's own configuration."""
    manifest = bundle.manifest
    return (
        f"None of these is this bundle as it is ({bundle.schedule}; probe {manifest.probe}, "
        f"positions {manifest.positions}, threshold {manifest.threshold:g}), so nothing here says "
        "how many right answers it keeps: `trio eval` of the bundle's folder does."
    )


def _same_model(file: Path, name: str, bundle: Bundle) -> None:
    if name != bundle.manifest.model.name:
        raise TrioError(
            f"{file} is about {name}, not about {bundle.manifest.model.name}: pass the figures of "
            "this bundle's model"
        )


# ---------------------------------------------------------------------------------------- answers


def answers(pipeline: Pipeline, asked: Sequence[Asked]) -> dict[str, Any]:
    """Each question's answer with and without pruning, and what was kept of its pictures.

    Raises:
        TrioError: a picture that cannot be read, or a prompt that is too long.
    """
    start = time.perf_counter()
    shown = []
    for question in asked:
        # A text answer is enough to see; a page is no place for essays.
        pruned, whole = (
            pipeline.generate_batch(
                [Request(question.prompt, question.images, max_new_tokens=48, budget=budget)]
            )[0]
            for budget in (None, 1.0)
        )
        shown.append(
            {
                "prompt": question.prompt,
                "answer": pruned.text.strip(),
                "unpruned": whole.text.strip(),
                "truth": question.truth,
                "same": pruned.text.strip() == whole.text.strip(),
                "pictures": _pictures(pruned),
                "first": f"{pruned.first_token_s:.2f} s",
            }
        )
    return {"examples": shown, "seconds": time.perf_counter() - start}


def _pictures(generation: Generation) -> list[list[dict[str, Any]]]:
    """For each picture its panels: everything, then what each pruning point kept."""
    layers = pruned_before(generation)
    strips = []
    for number, (image, processed) in enumerate(
        zip(generation.images, generation.processed, strict=True)
    ):
        kept, total = generation.kept_of_image(number), len(processed.rows)
        whole, *pruned = kept_panels(image, processed, kept)
        strip = [{"src": data_uri(whole), "caption": "all", "count": f"{total} tokens"}]
        strip += [
            {
                "src": data_uri(panel),
                "caption": f"from layer {layer}",
                "count": f"{len(tokens)} of {total}",
            }
            for panel, tokens, layer in zip(pruned, kept, layers, strict=True)
        ]
        strips.append(strip)
    return strips


def data_uri(image: Image.Image) -> str:
    """The picture itself, as a source that needs no file and no network."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
