"""The page: plain values into HTML, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2
from markupsafe import Markup

import trio_deploy
from trio_deploy.report.charts import bars, notes, retention
from trio_deploy.report.svg import stylesheet
from trio_deploy.schedule.methods import METHODS

_SIZES = ("wide", "narrow")  # the page's style shows one of them
_LABELS = 12  # of layers under a chart, at most


def render(parts: Mapping[str, Any]) -> str:
    """One HTML page of what `gather` found: `bundle`, `schedule`, `arithmetic`, `cost`, `parity`,
    `accuracy`, `answers`.

    Every value is escaped by jinja2; the page forbids scripts and any request by its own policy.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    layers = parts["schedule"]["layers"]
    return environment.from_string(_read("page.html")).render(
        **_with_charts(parts),
        style=Markup(stylesheet() + _read("page.css")),  # our own files
        tiles=_tiles(parts),
        ranges=_ranges(parts["schedule"]),
        label_every=max(1, math.ceil(len(layers) / _LABELS)),
        dropped=dropped(parts["schedule"]["points"]),
        version=trio_deploy.__version__,
        date=date.today().isoformat(),
    )


def _with_charts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts with their charts as SVG, one for wide screens and one for narrow ones."""
    cost, accuracy = dict(parts["cost"]), dict(parts["accuracy"])
    if "result" in cost:
        cost["charts"] = [
            Markup(bars(cost["result"], size, heading=False).inline(size)) for size in _SIZES
        ]
    if "chart" in accuracy:
        drawn = accuracy["chart"] if accuracy["chart"].lines else None
        accuracy["charts"] = [
            Markup(retention(drawn, size, heading=False).inline(f"retention {size}"))
            for size in _SIZES
            if drawn
        ]
        accuracy["notes"] = notes(drawn) if drawn else []
    return {**parts, "cost": cost, "accuracy": accuracy}


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _tiles(parts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that a reader wants first; what is not known is not shown."""
    schedule, arithmetic = parts["schedule"], parts["arithmetic"]
    tiles = [
        _tile(
            "Visual tokens per layer",
            f"{100 * schedule['share']:.1f} %",
            f"{schedule['average']:.1f} of {schedule['visual']} on average",
        ),
        _tile(
            "Operations",
            f"{arithmetic['flops_ratio']:.1f}× fewer",
            "in the prefill, by counting",
        ),
        _tile("KV cache", f"{arithmetic['kv_ratio']:.1f}× smaller", "by counting"),
    ]
    if ratio := parts["cost"].get("prefill_ratio"):
        faster = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
        tiles.append(_tile("Prefill", faster, "measured against no pruning"))
    if headline := parts["accuracy"].get("headline"):
        retained, share = headline
        note = f"at {100 * share:.1f} % of the tokens, {parts['accuracy']['questions']} questions"
        tiles.append(_tile("Right answers kept", f"{100 * retained:.0f} %", note))
    if rows := parts["parity"].get("rows"):
        passed = parts["parity"]["passed"]
        tone = "ok" if passed == len(rows) else "off"
        tiles.append(
            _tile("Parity", f"{passed} of {len(rows)}", "comparisons within tolerance", tone)
        )
    return tiles


def _tile(label: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "tone": tone}


def dropped(points: Sequence[Mapping[str, Any]]) -> str:
    """Whether what a picture loses depends on the question: by method, and on what came before."""
    blind_methods = {name for name, method in METHODS.items() if method.question_blind}
    reads = [point["method"] not in blind_methods for point in points]
    first = reads.index(True) if True in reads else len(points)
    blind, reading = points[:first], points[first:]
    sentences = []
    if blind:
        sentences.append(
            f"What is dropped before {_layers(blind)} does not depend on the question, which "
            "comes after the picture."
        )
    if reading:
        sentences.append(f"What is dropped before {_layers(reading)} depends on the question.")
    return " ".join(sentences)


def _layers(points: Sequence[Mapping[str, Any]]) -> str:
    """`layers 0 and 3 (divprune)`."""
    numbers = [str(point["layer"]) for point in points]
    *most, last = numbers
    text = f"{', '.join(most)} and {last}" if most else last
    methods = ", ".join(dict.fromkeys(point["method"] for point in points))
    return f"layer{'s' * (len(numbers) > 1)} {text} ({methods})"


def _ranges(schedule: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs of layers that see as many tokens, with what pruned before them."""
    layers = schedule["layers"]
    methods = {point["layer"]: point["method"] for point in schedule["points"]}
    starts = sorted({0, *methods})
    return [
        {
            "kept": layers[start]["kept"],
            "layers": f"layer {start}" if stop == start + 1 else f"layers {start} – {stop - 1}",
            "method": methods.get(start),
        }
        for start, stop in pairwise((*starts, len(layers)))
    ]
