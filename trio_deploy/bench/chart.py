"""Measurements as pictures: a stacked bar for each case, or lines over the visual tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trio_deploy.bench.cases import GROUPS, OTHER
from trio_deploy.bench.table import split, times, where
from trio_deploy.errors import TrioError

_MIB = 2**20

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey.
COLOURS = {
    "preprocess": "#999999",
    "vision": "#56b4e9",
    "embed": "#f0e442",
    "layers": "#0072b2",
    "selection": "#d55e00",
    OTHER: "#cccccc",
}
_LINES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the chart of `measure` or of `sweep`; the ending says which format.

    Raises:
        TrioError: matplotlib is not installed.
    """
    if not available():
        raise TrioError("charts need matplotlib: pip install 'trio-deploy[plots]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _sweep(pyplot, result) if "points" in result else _bars(pyplot, result)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def _bars(pyplot: Any, result: Mapping[str, Any]) -> Any:
    """Time to the first token by stage, a bar a case."""
    cases, work = result["cases"], result["workload"]
    figure, axes = pyplot.subplots(figsize=(9.5, 1.5 + 0.62 * len(cases)), layout="constrained")
    longest = max(case["first_token_s"]["q3"] for case in cases)
    for row, case in enumerate(cases):
        left, first = 0.0, case["first_token_s"]
        for group, seconds in split(case).items():
            axes.barh(row, seconds, left=left, color=COLOURS[group], height=0.62)
            left += seconds
        error = [[first["median"] - first["q1"]], [first["q3"] - first["median"]]]
        axes.errorbar(first["median"], row, xerr=error, color="#333333", capsize=3, lw=1)
        ratio = case["against_unpruned"]["first_token"]
        note = f"{first['median']:.3g} s" + (f"  ({times(ratio)})" if row else "")
        axes.text(first["q3"] + 0.015 * longest, row, note, va="center")
    axes.set_yticks(range(len(cases)), [f"{case['name']}\n{where(case)}" for case in cases])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xlabel("seconds to the first token (medians; whiskers: quartiles)")
    axes.set_title(
        f"{result['model']['name']}: {work['visual_tokens']} visual + {work['text_tokens']} text "
        "tokens",
        loc="left",
    )
    shown = [
        group for group in (*GROUPS, OTHER) if any(split(case).get(group, 0) > 0 for case in cases)
    ]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[group]) for group in shown]
    labels = ["other, or not told apart" if group == OTHER else group for group in shown]
    figure.legend(handles, labels, frameon=False, ncols=len(shown), loc="outside lower left")
    return figure


def _sweep(pyplot: Any, result: Mapping[str, Any]) -> Any:
    """Prefill seconds, KV cache and multiply-adds over the visual tokens, a line a budget."""
    points = result["points"]
    names = [case["name"] for case in points[0]["cases"]]
    counts = [point["workload"]["visual_tokens"] for point in points]
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    most = max(case["flops"]["prefill"] for point in points for case in point["cases"])
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if most >= s), (1e6, "M"))
    values = (
        ("seconds of prefill", lambda case: case["prefill_s"]["median"]),
        (f"multiply-adds of prefill ({unit})", lambda case: case["flops"]["prefill"] / size),
        ("KV cache (MiB)", lambda case: case["kv_bytes"] / _MIB),
    )
    for panel, (label, value) in zip(panels, values, strict=True):
        for row, name in enumerate(names):
            colour = _LINES[row % len(_LINES)]
            cases = [point["cases"][row] for point in points]
            panel.plot(counts, [value(case) for case in cases], color=colour, marker="o", ms=4,
                       label=name)  # fmt: skip
            if "seconds" in label:
                low = [case["prefill_s"]["q1"] for case in cases]
                high = [case["prefill_s"]["q3"] for case in cases]
                panel.fill_between(counts, low, high, color=colour, alpha=0.15, lw=0)
        panel.set_xlabel("visual tokens")
        panel.set_title(label, loc="left")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.2)
    panels[0].legend(frameon=False)
    figure.suptitle(result["model"]["name"], x=0.01, ha="left")
    return figure
