"""The one maker of charts: time by stage, cost over visual tokens, retention over the budget.

Each is drawn at one of `SIZES`, for a page or as a file; all text keeps its size of 12 px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from trio_deploy.bench.case import GROUPS, OTHER
from trio_deploy.bench.table import split, times, where
from trio_deploy.evaluation.configurations import BLIND, UNPRUNED
from trio_deploy.evaluation.results import Results
from trio_deploy.report.svg import (
    GLYPH,
    RADIUS,
    Drawing,
    element,
    line,
    line_legend,
    line_style,
    mark,
    path,
    swatch_legend,
    text,
)

#: Width of a chart, and height of one panel of lines, in pixels: `narrow` fits a telephone; a file
#: is wide enough for a desktop and can still be read on one.
SIZES = {"wide": (720, 330), "narrow": (350, 360), "file": (480, 400)}

_MIB = 2**20
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 34, 54  # pixels around the plot
_TICK_GAP = 40  # pixels: labels of ticks that are closer become one
_SHIFT, _SHIFT_SHARE = 5.0, 0.09  # pixels between lines at one budget; share of the width for all

STRETCHED = 0.95
"""Above this the axis of shares is stretched, if lines are crowded there and others far below."""
_FAR_BELOW = 0.90
_TOP_SHARE = 0.55  # of a stretched axis, for the part above `STRETCHED`

Point = tuple[float, float, float, float]
"""Share of tokens, value, lower and upper end of its interval (NaN: none)."""


# ------------------------------------------------------------------------------------------ bench


def bench_chart(result: Mapping[str, Any]) -> str:
    """The SVG file of what `measure` or `sweep` returned."""
    return (sweep(result) if "points" in result else bars(result)).file()


def bars(result: Mapping[str, Any], size: str = "file", *, heading: bool = True) -> Drawing:
    """Seconds to the first token by stage: a stacked bar per case."""
    cases, work, width = result["cases"], result["workload"], SIZES[size][0]
    label = (
        f"{result['model']['name']}: {work['visual_tokens']} visual + {work['text_tokens']} text "
        "tokens"
    )
    left, top, row, thick = 12, 34 if heading else 4, 52, 20
    longest = max(case["first_token_s"]["q3"] for case in cases)
    value_room = GLYPH * len("0.0000 s  (10.00x)") + 8
    scale = (width - left - value_room) / longest
    drawn = [text(left, 20, label, class_="head")] if heading else []
    for number, case in enumerate(cases):
        y = top + number * row
        name = case["name"]
        drawn.append(text(left, y + 14, name, class_="ink"))
        drawn.append(text(left + GLYPH * len(name) + 10, y + 14, where(case)))
        x = float(left)
        for group, seconds in split(case).items():
            part = element("title", f"{group}: {1000 * seconds:.3g} ms")
            if seconds > 0:
                drawn.append(element("rect", part, class_=f"part {group}", x=x, y=y + 20,
                                     width=seconds * scale, height=thick))  # fmt: skip
            x += seconds * scale
        first, middle = case["first_token_s"], y + 20 + thick / 2
        low, high = left + first["q1"] * scale, left + first["q3"] * scale
        whisker = (
            f"M{low:.1f},{middle}H{high:.1f}M{low:.1f},{middle - 4}v8M{high:.1f},{middle - 4}v8"
        )
        drawn.append(element("path", class_="whisker", d=whisker))
        ratio = times(case["against_unpruned"]["first_token"])
        said = f"{first['median']:.3g} s" + (f"  ({ratio})" if number and ratio else "")
        drawn.append(text(high + 8, middle + 4, said, class_="ink"))
    y = top + len(cases) * row
    ticks, axis = _ticks(longest), element("path", class_="grid", d=f"M{left},{y}H{width - 8}")
    drawn.append(axis)
    drawn += [text(left + tick * scale, y + 16, f"{tick:g}", class_="x", text_anchor="middle")
              for tick in ticks]  # fmt: skip
    drawn.append(text(left, y + 36, "seconds to the first token (medians; whiskers: quartiles)"))
    shown = [g for g in (*GROUPS, OTHER) if any(split(case).get(g, 0) > 0 for case in cases)]
    names = [(g, "other, or not told apart" if g == OTHER else g) for g in shown]
    legend, height = swatch_legend(names, left, y + 46, width - 2 * left)
    return Drawing(width, round(y + 46 + height + 10), label, "".join([*drawn, legend]))


def sweep(result: Mapping[str, Any], size: str = "file") -> Drawing:
    """Seconds and multiply-adds of the prefill, and KV cache, over the visual tokens."""
    points = result["points"]
    names = [case["name"] for case in points[0]["cases"]]
    counts = [point["workload"]["visual_tokens"] for point in points]
    largest = max(case["flops"]["prefill"] for point in points for case in point["cases"])
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if largest >= s), (1e6, "M"))
    panels: tuple[tuple[str, Callable[[Any], float]], ...] = (
        ("seconds of prefill (band: quartiles)", lambda case: case["prefill_s"]["median"]),
        (f"multiply-adds of prefill ({unit})", lambda case: case["flops"]["prefill"] / scale),
        ("KV cache (MiB)", lambda case: case["kv_bytes"] / _MIB),
    )
    width, label = SIZES[size][0], str(result["model"]["name"])
    drawn = [text(12, 20, label, class_="head")]
    height = 190
    for number, (title, value) in enumerate(panels):
        top = 30 + number * height
        cases = [[point["cases"][row] for point in points] for row in range(len(names))]
        bands = None
        if number == 0:
            bands = [
                [(case["prefill_s"]["q1"], case["prefill_s"]["q3"]) for case in line_of]
                for line_of in cases
            ]
        values = [[value(case) for case in line_of] for line_of in cases]
        drawn.append(_panel(title, counts, values, bands, (width, top, top + height)))
    y = 30 + len(panels) * height
    drawn.append(text(_LEFT, y + 2, "visual tokens"))
    legend, rows = line_legend(names, _LEFT, y + 8, width - _LEFT - _RIGHT)
    return Drawing(width, round(y + 8 + rows + 10), label, "".join([*drawn, legend]))


def _panel(
    title: str,
    counts: Sequence[int],
    values: Sequence[Sequence[float]],
    bands: Sequence[Sequence[tuple[float, float]]] | None,
    frame: tuple[float, float, float],
) -> str:
    """Lines over `counts`, both axes from 0; `frame`: width, top and bottom in pixels."""
    width, top, bottom = frame
    left, right, high, low = _LEFT, width - _RIGHT - 10, top + 26, bottom - 30
    ends = chain.from_iterable([*values, *([end for pair in band for end in pair]
                                           for band in bands or ())])  # fmt: skip
    ticks = _ticks(max(ends))
    ceiling, last = ticks[-1], max(counts)

    def at(count: float, value: float) -> tuple[float, float]:
        return left + (right - left) * count / last, low - (low - high) * value / ceiling

    drawn = [text(left, top + 14, title)]
    for tick in ticks:
        y = at(0, tick)[1]
        drawn.append(element("path", class_="grid", d=f"M{left},{y:.1f}H{right}"))
        drawn.append(text(left - 8, y + 4, f"{tick:g}", text_anchor="end"))
    for count in (0, *counts):
        drawn.append(text(at(count, 0)[0], low + 18, str(count), class_="x", text_anchor="middle"))
    for number in reversed(range(len(values))):
        style = line_style(number)
        places = [at(c, v) for c, v in zip(counts, values[number], strict=True)]
        inside = ""
        if bands:
            edges = [[at(c, pair[side]) for c, pair in zip(counts, bands[number], strict=True)]
                     for side in (0, 1)]  # fmt: skip
            inside = element("path", class_="band", d=path([*edges[0], *edges[1][::-1]]) + "Z")
        inside += line(path(places), style) + "".join(mark(x, y, style) for x, y in places)
        drawn.append(element("g", inside, class_=f"c{style.colour}" + " first" * (number == 0)))
    return "".join(drawn)


def _ticks(highest: float) -> list[float]:
    """Round values from 0 up to `highest` or just above, at most seven."""
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough - 1e-12)
    return [round(i * step, 10) for i in range(math.ceil(highest / step - 1e-9) + 1)]


# -------------------------------------------------------------------------------------- retention


@dataclass(frozen=True)
class Retention:
    """Lines of a retention chart, by the configuration's name; the first one lies on top.

    Attributes:
        lines: points of each line, by rising share.
        scored: whether values are retained right answers, not equal answers.
        heading: what was asked, above the chart; empty on a page that says it.
    """

    lines: Mapping[str, Sequence[Point]]
    scored: bool
    heading: str = ""

    @classmethod
    def of(cls, results: Results, first: str | None = None) -> Retention:
        """All configurations but the unpruned and the blind one; `first` comes first."""
        lines: dict[str, list[Point]] = {}
        for one in sorted(results.results, key=lambda one: first is None or one.name != first):
            if one.name not in (UNPRUNED, BLIND):
                found = one.overall.retention or one.agreement
                point = (one.share, found.value, found.low, found.high)
                lines.setdefault(one.name, []).append(point)
        return cls(
            {name: sorted(points) for name, points in lines.items()},
            bool(results.results and results.results[0].overall.retention),
            f"{results.model}: {results.questions} questions, {results.data}",
        )


def retention_chart(results: Results) -> str:
    """The SVG file of an evaluation: retention (agreement without references) over the budget."""
    return retention(Retention.of(results), "file").file()


def retention(shown: Retention, size: str, *, heading: bool = True) -> Drawing:
    """Retention over the share of visual tokens: a line per configuration, with intervals."""
    width, height = SIZES[size]
    drawn: list[str] = []
    top = 0
    if heading and shown.heading:
        for said in _wrapped(shown.heading, width - _LEFT - _RIGHT):
            top += 18
            drawn.append(text(_LEFT, top, said, class_="head"))
    where_ = geometry(shown, width, height)
    title = where_["title"] if where_ else "retention"
    label = f"{title} over the share of visual tokens"
    if where_ is None:
        drawn.append(text(_LEFT, top + 20, "nothing was pruned"))
        return Drawing(width, top + 36, label, "".join(drawn))
    drawn.append(element("g", _frame(where_) + "".join(map(_line, where_["lines"])),
                         transform=f"translate(0 {top})"))  # fmt: skip
    y = top + height - 6
    for note in notes(shown) if heading else ():
        drawn.append(text(_LEFT, y + 12, note))
        y += 16
    legend, rows = line_legend(list(shown.lines), _LEFT, y, width - _LEFT - _RIGHT)
    return Drawing(width, round(y + rows + 12), label, "".join([*drawn, legend]))


def notes(shown: Retention) -> list[str]:
    """What a reader of the chart has to know beside its labels."""
    values = [[point[1] for point in points] for points in shown.lines.values()]
    aside = ["lines are set side by side where budgets are equal"] if len(values) > 1 else []
    bent = [f"the scale is stretched above {STRETCHED:.0%}"] if stretched(values) else []
    return aside + bent


def _wrapped(said: str, width: float) -> list[str]:
    lines = [""]
    for word in said.split():
        if lines[-1] and GLYPH * (len(lines[-1]) + 1 + len(word)) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _frame(at: Mapping[str, Any]) -> str:
    """Grid, ticks and titles of the axes."""
    left, right, top, bottom = (at[side] for side in ("left", "right", "top", "bottom"))
    drawn = []
    if at["stretched"] is not None:
        drawn.append(element("rect", class_="high", x=left, y=top, width=right - left,
                             height=at["stretched"] - top))  # fmt: skip
    for tick in at["y_ticks"]:
        kind = "grid" + " whole" * tick["whole"] + " seam" * tick["seam"]
        drawn.append(element("line", class_=kind, x1=left, x2=right, y1=tick["at"], y2=tick["at"]))
        drawn.append(text(left - 8, tick["at"] + 4, tick["text"], text_anchor="end"))
    drawn += [
        text(tick["at"], bottom + 20, tick["text"], class_="x", text_anchor="middle")
        for tick in at["x_ticks"]
    ]
    drawn.append(text(left, top - 14, at["title"]))
    drawn.append(text(left, bottom + 42, "visual tokens per layer, share of all"))
    return "".join(drawn)


def _line(drawn: Mapping[str, Any]) -> str:
    """A line with its intervals and marks."""
    style, parts = drawn["style"], [line(drawn["path"], drawn["style"])]
    for point in drawn["points"]:
        if point["low"] is not None:
            parts.append(element("line", class_="range", x1=point["x"], x2=point["x"],
                                 y1=point["low"], y2=point["high"]))  # fmt: skip
        parts.append(mark(point["x"], point["y"], style, point["text"]))
    return element("g", "".join(parts), class_=f"c{style.colour}" + " first" * drawn["first"])


def geometry(shown: Retention, width: int, height: int) -> dict[str, Any] | None:
    """Where lines, marks, intervals and ticks of a retention chart lie; None without points.

    The first line comes last, over the others. Lines at one budget are set side by side, labels
    that would touch become one, and the top of the axis is stretched if many lines are crowded
    there.
    """
    lines = shown.lines
    if not lines:
        return None
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    points = [point for line in lines.values() for point in line]
    y_of, y_ticks = _y_axis(lines, points, top, bottom)
    aside = min(_SHIFT, _SHIFT_SHARE * width / max(1, len(lines) - 1))
    margin = aside * (len(lines) - 1) / 2 + 2 * RADIUS
    least, most = min(p[0] for p in points), max(p[0] for p in points)
    if least == most:
        least, most = least - 0.01, most + 0.01
    begin, end = left + margin + 16, right - margin - 16

    def x_of(share: float) -> float:
        return begin + (end - begin) * (share - least) / (most - least)

    drawn = []
    for number, (name, points_of) in enumerate(lines.items()):
        shift = aside * (number - (len(lines) - 1) / 2)
        drawn.append(
            {
                "name": name,
                "first": number == 0,
                "style": line_style(number),
                "path": _bent([(x_of(p[0]) + shift, p[1]) for p in points_of], y_of),
                "points": [_point(name, p, x_of(p[0]) + shift, y_of) for p in points_of],
            }
        )
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "title": "right answers retained" if shown.scored else "same answer as without pruning",
        "stretched": y_of(STRETCHED) if any(tick["seam"] for tick in y_ticks) else None,
        "y_ticks": y_ticks,
        "x_ticks": _x_ticks([p[0] for p in points], x_of, width),
        "lines": drawn[::-1],
    }


def _point(name: str, point: Point, x: float, y_of: Callable[[float], float]) -> dict[str, Any]:
    share, value, low, high = point
    known = not math.isnan(low)
    return {
        "x": round(x, 1),
        "y": y_of(value),
        "low": y_of(low) if known else None,
        "high": y_of(high) if known else None,
        "text": f"{name}, {share:.1%}: {value:.1%}"
        + (f" ({low:.1%} to {high:.1%})" if known else ""),
    }


def stretched(lines: Sequence[Sequence[float]]) -> bool:
    """Whether two lines or more reach above `STRETCHED` and something lies far below."""
    high = sum(max(line, default=0.0) >= STRETCHED for line in lines)
    return high > 1 and min(chain.from_iterable(lines), default=1.0) < _FAR_BELOW


def scale(floor: float, ceiling: float, *, stretch: bool) -> Callable[[float], float]:
    """Shares to heights 0 to 1; with `stretch` two straight pieces that meet at `STRETCHED`."""
    if not stretch:
        return lambda value: (value - floor) / (ceiling - floor)
    below = 1 - _TOP_SHARE

    def height(value: float) -> float:
        if value <= STRETCHED:
            return below * (value - floor) / (STRETCHED - floor)
        return below + _TOP_SHARE * (value - STRETCHED) / (ceiling - STRETCHED)

    return height


def _y_axis(
    lines: Mapping[str, Sequence[Point]], points: Sequence[Point], top: float, bottom: float
) -> tuple[Callable[[float], float], list[dict[str, Any]]]:
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
        floor = min(floor, ceiling - step)  # if every answer is right
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


def _bent(points: Sequence[tuple[float, float]], y_of: Callable[[float], float]) -> str:
    """A path through (x, share), bent where the axis is."""
    bent = [points[0]]
    for (x0, v0), (x1, v1) in pairwise(points):
        if (v0 - STRETCHED) * (v1 - STRETCHED) < 0:
            bent.append((x0 + (x1 - x0) * (STRETCHED - v0) / (v1 - v0), STRETCHED))
        bent.append((x1, v1))
    return path((x, y_of(v)) for x, v in bent)


def _x_ticks(
    shares: Sequence[float], x_of: Callable[[float], float], width: float
) -> list[dict[str, Any]]:
    """A tick per budget; those whose labels would touch share one, `10.9–11.1 %`."""
    groups = [[share] for share in sorted({round(share, 3) for share in shares})]

    def tick(group: Sequence[float]) -> dict[str, Any]:
        low, high = (f"{100 * end:.1f}" for end in (group[0], group[-1]))
        said = f"{low} %" if low == high else f"{low}–{high} %"
        half = GLYPH * len(said) / 2
        middle = (x_of(group[0]) + x_of(group[-1])) / 2
        return {"at": round(min(max(middle, half), width - half), 1), "text": said, "half": half}

    while len(groups) > 1:
        ticks = [tick(group) for group in groups]
        room = [
            min(b["at"] - a["at"] - _TICK_GAP, b["at"] - b["half"] - a["at"] - a["half"] - 6)
            for a, b in pairwise(ticks)
        ]
        tightest = min(range(len(room)), key=lambda i: room[i])
        if room[tightest] >= 0:
            break
        groups[tightest : tightest + 2] = [groups[tightest] + groups[tightest + 1]]
    return [tick(group) for group in groups]
