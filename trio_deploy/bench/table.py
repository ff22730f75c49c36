"""Measurements as text for a terminal, as Markdown, and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trio_deploy.bench.case import GROUPS, OTHER
from trio_deploy.bench.environment import machine_text
from trio_deploy.files import write_together
from trio_deploy.pipeline.ran_as import RanAs

_MIB = 2**20
NOTE = (
    "Medians (quartiles) of runs by turns after warm-up, new pictures in each. FLOPs are "
    "multiply-adds of the language model's prefill, selection counted; their limit is the speed-up "
    "that the prefill would have if time were proportional to them. Peak memory is that of a fresh "
    "process for each line."
)

_COST_HEAD = (
    "against no pruning|first token|prefill|FLOPs limit|reached|tokens/s|prefill FLOPs|KV MiB|"
    "peak MiB"
).split("|")
_SWEEP_HEAD = (
    "visual tokens|budget|first token s|(quartiles)|prefill s|against no pruning|FLOPs limit|"
    "reached|prefill FLOPs|KV MiB"
).split("|")
_WAITING_HEAD = (
    "budget|rows|bound on the gap|longest gap s|tokens/s|against no bound|first token s|"
    "against no bound|tokens/s, nobody joins"
).split("|")
WAITING_NOTE = (
    "Rows that are being decoded, while prompts with pictures join them one after another, with a "
    "bound on the gap (`max_gap_ms`) and without one by turns. The gap is the longest time between "
    "two tokens of a row in any run; tokens per second are those of all rows, first tokens those "
    "of the prompts that join: medians."
)


def to_text(result: Mapping[str, Any]) -> str:
    """Tables of `measure` or `sweep` for a terminal."""
    lines = [_title(result), ""]
    for table in _tables(result):
        lines += [*_aligned(table), ""]
    lines += _said(result)
    lines += [f"{name}: {reason}" for name, reason in _skipped(result).items()]
    return "\n".join(lines).rstrip()


def to_markdown(result: Mapping[str, Any], command: str, picture: str | None = None) -> str:
    """The same tables as Markdown, with the machine, the command and, if named, the chart."""
    lines = [f"# {_title(result)}", "", f"Command: `{command}`.", ""]
    machine = machine_text(result["machine"], result["load_before"], result["load_after"])
    lines += [f"Machine: {machine}", "", WAITING_NOTE if "waiting" in result else NOTE, ""]
    if picture:
        lines += [f"![{_title(result)}]({picture})", ""]
    for head, *rows in _tables(result):
        lines += [_piped(head), "|" + "---|" * len(head), *map(_piped, rows), ""]
    lines += [line for said in _said(result) for line in (said, "")]
    lines += [f"Left out: {name}, {reason}" for name, reason in _skipped(result).items()]
    return "\n".join(lines).rstrip() + "\n"


def _title(result: Mapping[str, Any]) -> str:
    model = result["model"]
    title = f"{model['name']}, {model['layers']} layers, hidden size {model['hidden_size']}"
    if "points" in result:
        counts = [point["workload"]["visual_tokens"] for point in result["points"]]
        return f"{title}: {min(counts)} to {max(counts)} visual tokens"
    work = result["workload"]
    return f"{title}: {work['visual_tokens']} visual + {work['text_tokens']} text tokens"


def _said(result: Mapping[str, Any]) -> list[str]:
    """Sentences about the cases: how they ran, and remarks."""
    if "waiting" in result:
        return [f"{RanAs(**result['ran_as'])}."]
    points = result.get("points", [result])
    cases = [case for point in points for case in point["cases"]]
    remarks = {f"{case['name']}: {case['remark']}." for case in cases if case.get("remark")}
    return [*ran_text(cases), *sorted(remarks)]


def ran_text(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per way in which cases ran, with their names."""
    ways: dict[str, list[str]] = {}
    for case in cases:
        if case.get("ran_as"):
            ways.setdefault(str(RanAs(**case["ran_as"])), []).append(case["name"])
    return [f"{', '.join(dict.fromkeys(names))}: {ran}." for ran, names in ways.items()]


def _skipped(result: Mapping[str, Any]) -> dict[str, str]:
    return dict(result.get("skipped", {}))


def _tables(result: Mapping[str, Any]) -> list[list[list[str]]]:
    """Tables as rows of cells, heads first."""
    if "points" in result:
        return [_sweep_table(result["points"])]
    if "waiting" in result:
        return [_waiting_table(result["waiting"])]
    cases = result["cases"]
    return [_time_table(cases), _cost_table(cases)]


def _time_table(cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    groups = (*GROUPS, OTHER)
    rows = [["seconds", "first token", "(quartiles)", *groups, "tokens/s", "computed in"]]
    for case in cases:
        first = case["first_token_s"]
        split = [
            f"{case['groups_s'][group]['median']:.3f}" if case["groups_s"] else ""
            for group in groups
        ]
        rows.append(
            [
                case["name"],
                f"{first['median']:.3f}",
                f"({first['q1']:.3f} – {first['q3']:.3f})",
                *split,
                f"{case['tokens_per_s']['median']:.1f}" if case["tokens_per_s"] else "",
                where(case),
            ]
        )
    return rows


def _cost_table(cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [_COST_HEAD]
    for case in cases:
        ratios = case["against_unpruned"]
        rows.append(
            [
                case["name"],
                times(ratios["first_token"]),
                times(ratios["prefill"]),
                times(ratios["flops_limit"]),
                f"{ratios['of_limit']:.0%}" if ratios["of_limit"] else "",
                times(ratios["tokens_per_s"]),
                operations(case["flops"]["prefill"]) if case["flops"] else "",
                f"{case['kv_bytes'] / _MIB:.1f}" if case["kv_bytes"] else "",
                f"{case['peak_mib']:.0f}" if case["peak_mib"] else "",
            ]
        )
    return rows


def _sweep_table(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [_SWEEP_HEAD]
    for point in points:
        for case in point["cases"]:
            first, ratios = case["first_token_s"], case["against_unpruned"]
            rows.append(
                [
                    str(point["workload"]["visual_tokens"]),
                    case["name"],
                    f"{first['median']:.3f}",
                    f"({first['q1']:.3f} – {first['q3']:.3f})",
                    f"{case['prefill_s']['median']:.3f}",
                    times(ratios["prefill"]),
                    times(ratios["flops_limit"]),
                    f"{ratios['of_limit']:.0%}" if ratios["of_limit"] else "",
                    operations(case["flops"]["prefill"]),
                    f"{case['kv_bytes'] / _MIB:.1f}",
                ]
            )
    return rows


def _waiting_table(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Ratios are to the line without a bound."""
    table, plain = [_WAITING_HEAD], points[0]
    for point in points:
        if point["bound"] == "no bound":
            plain = point
        ratios = (point[key] / plain[key] for key in ("tokens_per_s", "first_token_s"))
        faster, later = ("" if point is plain else f"{ratio:.2f}" for ratio in ratios)
        table.append(
            [
                point["case"],
                str(point["rows"]),
                point["bound"],
                f"{point['gap_s']:.2f}",
                f"{point['tokens_per_s']:.1f}",
                faster,
                f"{point['first_token_s']:.2f}",
                later,
                f"{point['alone_tokens_per_s']:.1f}",
            ]
        )
    return table


def where(case: Mapping[str, Any]) -> str:
    """The runtime that computed a case, and its float type."""
    engine = {
        "transformers": "torch",
        "oracle": "torch",
        "genai": "openvino genai",
        "llama.cpp": "llama.cpp",
    }.get(case["kind"], case["runtime"] or "")
    return f"{engine} {case['precision']}".strip()


def split(case: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per group that add up to the median time to the first token, for a stacked bar.

    Medians of stages need not add up to the median of the whole: `OTHER` takes the difference, and
    if they exceed the whole they are scaled down to it. A case without stages is all `OTHER`.
    """
    whole, groups = case["first_token_s"]["median"], case["groups_s"]
    if groups is None:
        return {OTHER: whole}
    medians = {group: groups[group]["median"] for group in GROUPS}
    total = sum(medians.values())
    shrink = min(1.0, whole / total) if total else 1.0
    parts = {group: seconds * shrink for group, seconds in medians.items()}
    return {**parts, OTHER: max(0.0, whole - sum(parts.values()))}


def times(ratio: float | None) -> str:
    """`7.39x`; empty if unknown."""
    return "" if ratio is None else f"{ratio:.2f}x"


def operations(count: float) -> str:
    """`16.7 T`: a number of multiply-adds with three digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """First column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(result: dict[str, Any], out: Path, chart: str | None) -> list[Path]:
    """Write `out` with .json, .md and, of a chart, .svg appended: figures, tables and the chart.

    Args:
        result: figures, and under `command` their origin.
        chart: an SVG file's content; None: there is none.

    Raises:
        TrioError: they cannot be written.
    """
    files = [out.with_name(f"{out.name}.{ending}") for ending in ("json", "md", "svg")]
    contents = [
        json.dumps(result, indent=1) + "\n",
        to_markdown(result, result["command"], files[2].name if chart else None),
        *([chart] if chart else []),
    ]
    files = files[: len(contents)]
    write_together({file: text.encode() for file, text in zip(files, contents, strict=True)})
    return files
