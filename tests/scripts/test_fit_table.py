"""README's table of what fits which target has every target, and the verdicts of the plan."""

from __future__ import annotations

import re

import pytest

from scripts.fit_table import MODELS, README, WEIGHTS, targets, verdict


def table() -> dict[str, list[str]]:
    """The cells of each target's line."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- fit: begin -->\n(.*)\n<!-- fit: end -->", text, flags=re.S)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].split("\n")]
    assert rows[0][2:] == list(MODELS)
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def test_every_target_for_engines_is_in_the_table_with_its_memory() -> None:
    rows = table()
    assert {t.name: f"{t.usable_gib:g} GiB" for t in targets()} == {
        n: r[0] for n, r in rows.items()
    }
    assert {cell for row in rows.values() for cell in row[1:]} <= {
        "no",
        *WEIGHTS,
        *(f"{each}?" for each in WEIGHTS),
    }


@pytest.mark.parametrize("name", ["jetson-orin-nx-16gb", "jetson-agx-orin-64gb"])
def test_a_verdict_of_the_table_is_the_plans(name: str) -> None:
    (target,) = (each for each in targets() if each.name == name)
    assert table()[name][1] == verdict(MODELS[0], target)
