"""Retention over budget as a picture: many lines, most of them close to 100 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import BLIND, UNPRUNED
from trio_deploy.evaluation.results import Result, Results
from trio_deploy.evaluation.statistics import Estimate

PLOT = "retention.png"

STRETCHED = 0.95
"""Above this the axis is stretched where some lines are and others fall far below."""
_FAR_BELOW = 0.90
_TOP_SHARE = 0.55  # of a stretched axis that lies above
_APART = 2.6  # points of type between two lines' marks at one budget

_COLOURS = (
    "#111111", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8b1a1a",
    "#7a5cc2", "#8a8d00", "#b15928", "#e7298a", "#6b7280", "#4d9221",
)  # fmt: skip
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
_MARKERS = "os^DvP*X<hp>8"


def style(number: int) -> dict[str, Any]:
    """Colour, dashes and mark of a line; any hundred of them differ from each other."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def stretched(lines: Sequence[Sequence[float]]) -> bool:
    """Whether the axis of shares should give its top more room than its length: two lines or more
    reach into it, and something lies far below.
    """
    high = sum(max(line, default=0.0) >= STRETCHED for line in lines)
    return high > 1 and min(chain.from_iterable(lines), default=1.0) < _FAR_BELOW


def scale(floor: float, ceiling: float, *, stretch: bool) -> Callable[[float], float]:
    """Shares to heights 0 to 1; two straight pieces that meet at `STRETCHED` where asked for."""
    if not stretch:
        return lambda value: (value - floor) / (ceiling - floor)
    below = 1 - _TOP_SHARE

    def height(value: float) -> float:
        if value <= STRETCHED:
            return below * (value - floor) / (STRETCHED - floor)
        return below + _TOP_SHARE * (value - STRETCHED) / (ceiling - STRETCHED)

    return height


def low_of(estimate: Estimate) -> float:
    """The lower end of the interval; the value where there is no interval."""
    return estimate.value if math.isnan(estimate.low) else min(estimate.low, estimate.value)


def high_of(estimate: Estimate) -> float:
    """The upper end of the interval; the value where there is no interval."""
    return estimate.value if math.isnan(estimate.high) else max(estimate.high, estimate.value)


def draw(results: Results, file: Path) -> None:
    """Retention (agreement without references) over the budget, a line a method, with intervals.

    The first configuration is drawn last, over the others. What lies at one budget is drawn side by
    side.

    Raises:
        TrioError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise TrioError(
            "the plot needs matplotlib: pip install 'trio-deploy[plots]', or pass --no-plot"
        ) from None
    figure = _figure(pyplot, results)
    try:
        spare = file.with_name(f".{file.name}.part")
        figure.savefig(spare, dpi=130, format="png")
        spare.replace(file)
    except OSError as error:
        raise TrioError(f"cannot write the plot to {file}: {error}") from None
    finally:
        pyplot.close(figure)


def _figure(pyplot: Any, results: Results) -> Any:
    from matplotlib.transforms import ScaledTranslation

    scored = bool(results.results and results.results[0].overall.retention)
    lines = _lines(results, scored)
    figure, axes = pyplot.subplots(figsize=(8.4, 6.2), layout="constrained")
    estimates = [[estimate for _, estimate in points] for points in lines.values()]
    _axis(axes, "retention, % of the unpruned model" if scored else "same answer, %", estimates)
    for number, (name, points) in enumerate(lines.items()):
        first = number == 0
        aside = _APART * (number - (len(lines) - 1) / 2) / 72
        values = [100 * one.value for _, one in points]
        axes.errorbar(
            [100 * share for share, _ in points],
            values,
            yerr=[
                [100 * (one.value - low_of(one)) for _, one in points],
                [100 * (high_of(one) - one.value) for _, one in points],
            ],
            label=name,
            capsize=2,
            elinewidth=1,
            markersize=7 if first else 5,
            linewidth=2.6 if first else 1.3,
            zorder=10 if first else 3,
            transform=axes.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans),
            **style(number),
        )
    shares = [100 * share for points in lines.values() for share, _ in points] or [0.0, 100.0]
    room = 0.1 * (max(shares) - min(shares)) or 2.0
    axes.set_xlim(min(shares) - room, max(shares) + room)
    axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(
        "visual tokens a layer sees, % of all"
        + (" (lines are set side by side where budgets are equal)" if len(lines) > 1 else "")
    )
    axes.set_title(f"{results.model}: {results.questions} questions, {results.data}", fontsize=10)
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(fontsize=8, ncols=min(6, len(lines)), loc="outside lower center",
                      handlelength=3.6)  # fmt: skip
    return figure


def _lines(results: Results, scored: bool) -> dict[str, list[tuple[float, Estimate]]]:
    """(share of tokens, estimate) of each method, by share."""
    lines: dict[str, list[tuple[float, Estimate]]] = {}

    def estimate(one: Result) -> Estimate | None:
        return one.overall.retention if scored else one.agreement

    for one in results.results:
        found = estimate(one)
        if one.name not in (UNPRUNED, BLIND) and found is not None:
            lines.setdefault(one.name, []).append((one.share, found))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in lines.items()}


def _axis(axes: Any, label: str, estimates: Sequence[Sequence[Estimate]]) -> None:
    """Limits, ticks and label of the axis of shares; its top is stretched where `stretched` says
    so.
    """
    axes.set_ylabel(label)
    everything = list(chain.from_iterable(estimates))
    low = min(map(low_of, everything), default=0.0)
    high = max((*map(high_of, everything), 1.0))
    if not stretched([[one.value for one in line] for line in estimates]):
        room = 0.04 * (high - low) or 0.01
        axes.set_ylim(100 * (low - room), 100 * (high + room))
        return
    floor, ceiling = np.floor(10 * low - 0.01) / 10, high + 0.003
    to_height = scale(floor, ceiling, stretch=True)
    middle = to_height(STRETCHED)

    def back(height: float) -> float:
        if height <= middle:
            return float(floor + (STRETCHED - floor) * height / middle)
        return float(STRETCHED + (ceiling - STRETCHED) * (height - middle) / (1 - middle))

    axes.set_yscale(
        "function",
        functions=(
            lambda ys: np.vectorize(lambda y: to_height(y / 100), otypes=[float])(ys),
            lambda hs: np.vectorize(lambda h: 100 * back(h), otypes=[float])(hs),
        ),
    )
    axes.set_ylim(100 * floor, 100 * ceiling)
    axes.set_ylabel(f"{label}; the scale is stretched above {STRETCHED:.0%}")
    ticks = [*range(round(100 * floor), 95, 10), *range(95, int(100 * high + 1e-6) + 1)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.axhspan(95, 100 * ceiling, color="#0b63b0", alpha=0.05, linewidth=0)
    axes.axhline(95, color="grey", linewidth=0.8)
