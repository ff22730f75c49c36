"""The page: plain values into HTML, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2
from markupsafe import Markup

import trio_deploy

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 704, 34, 246
_COLOURS = 8
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
        **parts,
        style=Markup(_read("page.css")),  # our own file
        tiles=_tiles(parts),
        ranges=_ranges(parts["schedule"]),
        label_every=max(1, math.ceil(len(layers) / _LABELS)),
        plot=plot(parts["accuracy"]),
        version=trio_deploy.__version__,
        date=date.today().isoformat(),
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _tiles(parts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that a reader wants first; what is not known is not shown."""
    schedule, arithmetic = parts["schedule"], parts["arithmetic"]
    tiles = [
        _tile(
            "Visual tokens a layer",
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
    if least := parts["accuracy"].get("least"):
        retained, share = least
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


def plot(accuracy: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the lines, intervals and ticks of the accuracy's chart lie; None without points."""
    lines = accuracy.get("lines")
    if not lines:
        return None
    points = [point for line in lines.values() for point in line]
    low = min(point[2] for point in points)
    high = max(1.0, *(point[3] for point in points))
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 6 or s == 0.5)
    floor, ceiling = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    floor = min(floor, ceiling - step)  # where every answer is right
    right = max(point[0] for point in points) * 1.08

    def x(share: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * share / right, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - floor) / (ceiling - floor), 1)

    ticks = [floor + step * i for i in range(round((ceiling - floor) / step) + 1)]
    what = "right answers retained" if accuracy["scored"] else "same answer as without pruning"
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "title": what,
        "y_ticks": [
            {"at": y(tick), "text": f"{100 * tick:.0f} %", "whole": math.isclose(tick, 1)}
            for tick in ticks
        ],
        "x_ticks": [
            {"at": x(share), "text": f"{100 * share:.1f} %"}
            for share in sorted({round(point[0], 3) for point in points})
        ],
        "lines": [
            {
                "name": name,
                "colour": number % _COLOURS,
                "path": "M" + "L".join(f"{x(p[0])},{y(p[1])}" for p in line),
                "points": [
                    {
                        "x": x(share),
                        "y": y(value),
                        "low": y(below),
                        "high": y(above),
                        "text": f"{name}, {share:.1%}: {value:.1%} ({below:.1%} to {above:.1%})",
                    }
                    for share, value, below, above in line
                ],
            }
            for number, (name, line) in enumerate(lines.items())
        ],
    }
