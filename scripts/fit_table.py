"""Write README.md's table of targets: which of the recipes' models fit which device.

    python scripts/fit_table.py

For each target with TensorRT, at its own float type, decode layout and limits, and for each recipe
at the default budget. Takes some ten minutes. `tests/scripts/test_fit_table.py` compares some of
its cells.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.target import Target, list_targets
from trio_deploy.cost.device_memory import planned
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import parse_config
from trio_deploy.runtimes.registry import check_scheme, load_target
from trio_deploy.runtimes.tensorrt.memory import Fit
from trio_deploy.schedule.budget import budgets_for_layers, for_budget

README = Path(__file__).parent.parent / "README.md"
MODELS = (
    "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "qwen2-vl-2b", "qwen2.5-vl-3b",
    "qwen2.5-vl-7b", "qwen3-vl-4b", "qwen3-vl-8b",
)  # fmt: skip
WEIGHTS = {"16 bit": None, "int8": "int8", "int4": "int4"}  # the widest first


def fits(model: str, target: Target) -> str:
    """`yes`, `maybe` (only the estimate of activations exceeds the memory) or `no`."""
    recipe = load_recipe(model)
    config = parse_config(recipe.architecture)
    schedule = for_budget(None, config.text.num_layers, recipe.schedules)
    budgets = budgets_for_layers(recipe.schedules, schedule)
    try:
        check_scheme(target, target.quantize)
        fit = Fit(target, (planned(config, schedule, target, budgets),))
    except TrioError:  # the target's limits do not suit the model, or its TensorRT not the weights
        return "no"
    return "no" if fit.oversized else "yes" if fit.fits else "maybe"


def verdict(model: str, target: Target) -> str:
    """The widest weights with which a model fits; with `?`: maybe; `no`: with none."""
    found = "no"
    for name, scheme in WEIGHTS.items():
        match fits(model, replace(target, quantize=scheme)):
            case "yes":
                return name
            case "maybe":
                found = f"{name}?"
    return found


def targets() -> list[Target]:
    """The targets that engines are built for, those with the least memory first."""
    found = [load_target(name) for name in list_targets()]
    sized = [each for each in found if each.usable_gib is not None]
    return sorted(sized, key=lambda each: (each.usable_gib or 0.0, each.name))


def main() -> None:
    """Compute the table and put it into the README."""
    devices, columns = targets(), []
    for model in MODELS:  # one after the other, since targets share a model's graphs
        columns.append([verdict(model, device) for device in devices])
        print(model, *columns[-1], file=sys.stderr)
    lines = [f"| target | for engines | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 2) + "|"]
    for device, cells in zip(devices, zip(*columns, strict=True), strict=True):
        lines.append(f"| `{device.name}` | {device.usable_gib:g} GiB | {' | '.join(cells)} |")
    table = "<!-- fit: begin -->\n" + "\n".join(lines) + "\n<!-- fit: end -->"
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"<!-- fit: begin -->.*<!-- fit: end -->", lambda _: table, text, flags=re.S)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
