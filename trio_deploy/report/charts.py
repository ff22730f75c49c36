"""The accuracy's chart, line by line: where everything lies, in the page's own units of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from trio_deploy.evaluation.plot import STRETCHED, scale, stretched

COLOURS = 14  # page.css has as many, for light and for dark
DASHES = ("", "7 3", "2.5 2.5", "8 3 2 3", "12 4")
_WIDE, _NARROW = (720, 330), (350, 360)  # the narrow one fits a telephone
_LEFT, _EDGE, _TOP, _FOOT = 48, 14, 34, 54
_GLYPH = 6.7  # width of a character of 12 px, at most
_APART = 40  # ticks nearer than this become one
_ASIDE, _SPREAD = 5.0, 0.09  # between lines at one budget, and of the width for all of them
_RADIUS = 4.6


def plot(accuracy: Mapping[str, Any], *, narrow: bool = False) -> dict[str, Any] | None:
    """Where the lines, marks, intervals and ticks of the chart lie; None without points.

    The first line comes last, over the others. What lies at one budget is drawn side by side, ticks
    that would touch become one, and the top of the axis is stretched where many lines meet there.
    """
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]] | None = accuracy.get("lines")
    if not lines:
        return None
    width, height = _NARROW if narrow else _WIDE
    left, right, top, bottom = _LEFT, width - _EDGE, _TOP, height - _FOOT
    points = [point for line in lines.values() for point in line]
    y_of, y_ticks = _y_axis(lines, points, top, bottom)
    aside = min(_ASIDE, _SPREAD * width / max(1, len(lines) - 1))
    margin = aside * (len(lines) - 1) / 2 + 2 * _RADIUS
    least, most = min(p[0] for p in points), max(p[0] for p in points)
    if least == most:
        least, most = least - 0.01, most + 0.01
    begin, end = left + margin + 16, right - margin - 16

    def x_of(share: float) -> float:
        return begin + (end - begin) * (share - least) / (most - least)

    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        shift = aside * (number - (len(lines) - 1) / 2)
        look = style(number)
        drawn.append(
            {
                "name": name,
                "first": number == 0,
                **look,
                "path": _path([(x_of(p[0]) + shift, p[1]) for p in line], y_of),
                "points": [
                    {
                        "x": round(x_of(share) + shift, 1),
                        "y": y_of(value),
                        "low": None if math.isnan(below) else y_of(below),
                        "high": None if math.isnan(above) else y_of(above),
                        "text": f"{name}, {share:.1%}: {value:.1%}"
                        + ("" if math.isnan(below) else f" ({below:.1%} to {above:.1%})"),
                    }
                    for share, value, below, above in line
                ],
            }
        )
    what = "right answers retained" if accuracy["scored"] else "same answer as without pruning"
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "narrow": narrow,
        "title": what,
        "stretched": y_of(STRETCHED) if any(tick["seam"] for tick in y_ticks) else None,
        "y_ticks": y_ticks,
        "x_ticks": _x_ticks([p[0] for p in points], x_of, width),
        "lines": drawn[::-1],
        "legend": drawn,
    }


def style(number: int) -> dict[str, Any]:
    """Colour, dashes and mark of a line; no two of seventy are alike."""
    return {
        "colour": number % COLOURS,
        "dash": DASHES[number % len(DASHES)],
        "mark": _MARKS[number % len(_MARKS)],
    }


def _y_axis(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]],
    points: Sequence[tuple[float, float, float, float]],
    top: float,
    bottom: float,
) -> tuple[Any, list[dict[str, Any]]]:
    """Heights of shares, and the ticks."""
    ends = [end for p in points for end in (p[1], p[2], p[3]) if not math.isnan(end)]
    low, high = min(ends), max(1.0, *ends)
    stretch = stretched([[p[1] for p in line] for line in lines.values()])
    if stretch:
        floor, ceiling = math.floor(10 * low + 1e-9) / 10, max(1.003, high)
        low_ticks = [floor + 0.1 * i for i in range(round(10 * (0.9 - floor)) + 1)]
        low_ticks = low_ticks[:: 1 if len(low_ticks) <= 5 else 2]
        ticks = [*low_ticks, *(STRETCHED + 0.01 * i for i in range(6))]
    else:
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
                    if (high - low) / s <= 6 or s == 0.5)  # fmt: skip
        floor, ceiling = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        floor = min(floor, ceiling - step)  # where every answer is right
        ticks = [floor + step * i for i in range(round((ceiling - floor) / step) + 1)]
    to_height = scale(floor, ceiling, stretch=stretch)

    def y_of(value: float) -> float:
        return round(bottom - (bottom - top) * to_height(value), 1)

    return y_of, [
        {
            "at": y_of(tick),
            "text": f"{100 * tick:.0f} %",
            "whole": math.isclose(tick, 1),
            "seam": stretch and math.isclose(tick, STRETCHED),
        }
        for tick in ticks
    ]


def _path(points: Sequence[tuple[float, float]], y_of: Any) -> str:
    """A line through (x, share), bent where the axis is."""
    bent = [points[0]]
    for (x0, v0), (x1, v1) in pairwise(points):
        if (v0 - STRETCHED) * (v1 - STRETCHED) < 0:
            bent.append((x0 + (x1 - x0) * (STRETCHED - v0) / (v1 - v0), STRETCHED))
        bent.append((x1, v1))
    return "M" + "L".join(f"{x:.1f},{y_of(v)}" for x, v in bent)


def _x_ticks(shares: Sequence[float], x_of: Any, width: float) -> list[dict[str, Any]]:
    """A tick for each budget; those whose labels would touch share one, `10.9–11.1 %`."""
    groups = [[share] for share in sorted({round(share, 3) for share in shares})]

    def tick(group: Sequence[float]) -> dict[str, Any]:
        low, high = (f"{100 * end:.1f}" for end in (group[0], group[-1]))
        text = f"{low} %" if low == high else f"{low}–{high} %"
        half = _GLYPH * len(text) / 2
        middle = (x_of(group[0]) + x_of(group[-1])) / 2
        return {"at": round(min(max(middle, half), width - half), 1), "text": text, "half": half}

    while len(groups) > 1:
        ticks = [tick(group) for group in groups]
        room = [
            min(b["at"] - a["at"] - _APART, b["at"] - b["half"] - a["at"] - a["half"] - 6)
            for a, b in pairwise(ticks)
        ]
        tightest = min(range(len(room)), key=lambda i: room[i])
        if room[tightest] >= 0:
            break
        groups[tightest : tightest + 2] = [groups[tightest] + groups[tightest + 1]]
    return [tick(group) for group in groups]


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> str:
    """Corners on a circle, the first at the top; with `inner` a star."""
    count = corners if inner is None else 2 * corners
    path = []
    for i in range(count):
        radius = _RADIUS * (1.15 if inner is None else 1.45 * (1 if i % 2 == 0 else inner))
        angle = 2 * math.pi * (i / count + turn)
        path.append(f"{radius * math.sin(angle):.1f},{-radius * math.cos(angle):.1f}")
    return "M" + "L".join(path) + "Z"


_MARKS = (
    "M-4.4,0a4.4,4.4 0 1 0 8.8,0a4.4,4.4 0 1 0 -8.8,0Z",
    _polygon(4, 1 / 8),
    _polygon(3),
    _polygon(4),
    _polygon(3, 1 / 2),
    _polygon(4, inner=0.35),
    _polygon(5),
    _polygon(5, inner=0.5),
    _polygon(3, 1 / 4),
    _polygon(4, 1 / 8, 0.35),
    _polygon(6),
    _polygon(3, 3 / 4),
    _polygon(3, inner=0.35),
)
