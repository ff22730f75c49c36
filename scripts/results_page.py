"""Bring docs/results.md up to date: its tables and plots are made from what was measured.

    python scripts/results_page.py

Takes docs/measurements/eval-*.json (`trio eval` writes them as results.json) and what `trio plan`
says of the paper's models, and puts them between the markers of docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

from readme_figures import replace

from trio_deploy.evaluate.plot import PLOT, draw
from trio_deploy.evaluate.results import Results
from trio_deploy.machine import machine_text
from trio_deploy.plan import make_plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
PLANS = ("llava-1.5-7b", "llava-next-7b")


def measured(name: str) -> str:
    """The tables of docs/measurements/eval-NAME.json; over budgets a plot, too."""
    results = Results.load(ROOT / "docs" / "measurements" / f"eval-{name}.json")
    about = f"Machine: {machine_text(results.machine, None, None)}"
    text = f"{results.to_text()}\n{about}\n"
    if name == "budgets":
        draw(results, ROOT / "docs" / PLOT)
        text = f"![retention over budget]({PLOT})\n\n{text}"
    return text


def arithmetic() -> str:
    """The paper's figures beside what `trio plan` counts, where no weights are needed."""
    lines = [
        "| model | what | ours, pruned | the paper's | ours, unpruned | the paper's |",
        "|---|---|---|---|---|---|",
    ]
    for model in PLANS:
        plan = make_plan(model)
        paper = {row.unit: row for row in plan.paper}
        counted = (
            ("FLOPs, the paper's formula", "T", plan.cost.paper / 1e12, plan.unpruned.paper / 1e12),
            ("KV cache, 16-bit", "MiB", plan.cost.kv_bytes / 2**20, plan.unpruned.kv_bytes / 2**20),
        )
        for what, unit, pruned, unpruned in counted:
            theirs = paper[unit]
            lines.append(
                f"| {model} | {what} | {pruned:.3g} {unit} | {theirs.pruned:g} {unit} | "
                f"{unpruned:.4g} {unit} | {theirs.unpruned:g} {unit} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("budgets", "busy", "close", "smooth"):
        text = replace(text, name, measured(name))
    PAGE.write_text(replace(text, "arithmetic", arithmetic()), encoding="utf-8")


if __name__ == "__main__":
    main()
