"""What an evaluation compares, as a user says it: budgets, methods, schedules and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import (
    OWN,
    RECIPE,
    Configuration,
    Source,
    as_exported,
    blind,
    grid,
    named,
    used,
)
from trio_deploy.schedule.budget import read_budget
from trio_deploy.schedule.schedule import Schedule

BUDGETS = (0.111, 0.222, 0.333)


@dataclass(frozen=True)
class Comparison:
    """What is compared with the unpruned model.

    Attributes:
        budgets: average shares of visual tokens per layer, and `own` for a bundle's own schedule,
            also as text, `own,0.222`; empty: 0.111, 0.222 and 0.333, before them the own schedule
            of a bundle that prunes.
        methods: as in `configurations.grid`; empty: `recipe`, unless there are schedules. A bundle
            has its own.
        schedules: `[NAME=]LAYER:KEEP:METHOD,…`, measured before the methods.
        thresholds, probes, positions: options of the selection; each is combined with each.
        seeds: runs of a random selection to average.
        blind: also ask without the picture.
    """

    budgets: str | float | Sequence[str | float] = ()
    methods: str | Sequence[str] = ()
    schedules: str | Schedule | Sequence[str | Schedule] = ()
    thresholds: Sequence[float | None] = ()
    probes: Sequence[str | None] = ()
    positions: Sequence[str | None] = ()
    seeds: int = 1
    blind: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise TrioError(f"seeds must be 1 or more, not {self.seeds}")

    def configurations(self, source: Source) -> tuple[list[Configuration], list[str]]:
        """The configurations, and a sentence for each that is not possible on the model.

        Raises:
            TrioError: a value is wrong, or nothing is left to measure.
        """
        asked = _parts(self.budgets)
        if not asked:
            pruned = source.bundle is not None and source.bundle.schedule.layers
            asked = [OWN] * bool(pruned) + [f"{budget:g}" for budget in BUDGETS]
        shares = [read_budget(part) for part in asked if part != OWN]
        own = [as_exported(source)] if OWN in asked else []
        methods = _parts(self.methods)
        schedules = self.schedules
        if isinstance(schedules, str | Schedule):
            schedules = [schedules]
        if not methods and not schedules and source.bundle is None:
            methods = [RECIPE]
        found: list[Configuration] = []
        refused: list[str] = []
        if methods or source.bundle is not None:
            found, refused = grid(
                source,
                methods,
                shares,
                thresholds=self.thresholds or [None],
                probes=self.probes or [None],
                positions=self.positions or [None],
                seeds=range(self.seeds),
            )
            # A budget at which a bundle has its own schedule would be asked twice.
            same = [used(source, one) for one in own]
            found = own + [one for one in found if used(source, one) not in same]
        found = [named(source, str(schedule)) for schedule in schedules] + found
        if self.blind:
            found.append(blind(source))
        if not found:
            reasons = "".join(f"; {sentence}" for sentence in refused)
            raise TrioError(
                f"nothing is left to measure: pass other budgets, methods or schedules{reasons}"
            )
        return found, refused


def _parts(values: str | float | Sequence[str | float]) -> list[str]:
    """Values as text, those of comma-separated text one by one."""
    if isinstance(values, str | int | float):
        values = [values]
    parts = [part.strip() for value in values for part in str(value).split(",")]
    return [part for part in parts if part]
