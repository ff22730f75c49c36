"""Figures of runs: medians, the cost that counting predicts, and ratios to no pruning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trio_deploy.bench.case import GROUPS, OTHER, Case, Run
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.cost.flops import Cost, account, vision_flops
from trio_deploy.quant.stored_weight import ITEM_BITS
from trio_deploy.schedule.schedule import PruningPoint, Schedule

PROBES = 4


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, minimum (`least`) and maximum (`most`) of several measurements."""

    median: float
    q1: float
    q3: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles are interpolated linearly between the sorted values."""
        q1, middle, q3 = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else (values[0],) * 3
        )
        return cls(middle, q1, q3, min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def case_figures(case: Case, runs: Sequence[Run], bundle: Bundle, tiles: int) -> dict[str, Any]:
    """Figures of one case as plain JSON, in seconds, bytes and multiply-adds.

    Args:
        tiles: tiles of all pictures of a prompt, for the operations of the vision tower.
    """
    last = runs[-1]
    split = bool(last.stages)
    figures: dict[str, Any] = {
        "name": case.name,
        "kind": case.kind,
        "budget": case.budget,
        "runtime": case.options.runtime,
        "precision": last.precision,
        "ran_as": last.ran_as and last.ran_as.to_json(),
        "remark": last.remark,
        "tokens": {
            "prompt": last.prompt_tokens,
            "visual": last.visual_tokens,
            "keep": list(last.keep),
            "ranges": [list(entry) for entry in last.layer_ranges],
        },
        "first_token_s": Spread.of([run.first_token_s for run in runs]).to_json(),
        "prefill_s": None,
        "groups_s": None,
        "stages_s": None,
        "tokens_per_s": None,
        "kv_bytes": last.kv_bytes,
        "kv_bytes_counted": None,
        "flops": None,
        "peak_mib": None,
        "against_unpruned": None,
    }
    if split:
        figures["prefill_s"] = Spread.of([run.prefill_s for run in runs]).to_json()
        figures["groups_s"] = {
            group: Spread.of([run.groups[group] for run in runs]).to_json()
            for group in (*GROUPS, OTHER)
        }
        figures["stages_s"] = {
            stage: Spread.of([run.stages.get(stage, 0.0) for run in runs]).to_json()
            for stage in last.stages
        }
    if last.tokens_per_s:
        figures["tokens_per_s"] = Spread.of([run.tokens_per_s for run in runs]).to_json()
    if last.layer_ranges:
        cost = cost_of(last, bundle)
        figures["kv_bytes_counted"] = cost.kv_bytes
        if case.kind != "oracle":  # its probes run whole layers forward and backward
            rows = last.visual_tokens // tiles if tiles else 0
            vision = vision_flops(bundle.config, tiles, rows)
            figures["flops"] = {**cost.prefill_json(), "vision": vision}
    return figures


def cost_of(run: Run, bundle: Bundle) -> Cost:
    """Cost by counting, for the tokens that a run had at each layer."""
    points = zip(bundle.schedule.points, run.keep, strict=False)
    schedule = Schedule(
        tuple(PruningPoint(point.layer, keep, point.method) for point, keep in points)
    )
    return account(
        bundle.config.text,
        schedule,
        run.visual_tokens,
        run.prompt_tokens - run.visual_tokens,
        item_bytes=ITEM_BITS[run.precision] // 8,  # keys and values are stored as computed
        probes=PROBES,
    )


def compare(figures: Mapping[str, Any], unpruned: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of no pruning to a case, above 1 if the case is better; None if one is unknown.

    `flops_limit`: speed-up of the prefill if time were proportional to operations, selection
    included; `flops_limit_free_selection`: if selection cost nothing; `of_limit`: share of
    `flops_limit` that the prefill reached.
    """

    def ratio(over: Any, under: Any) -> float | None:
        return over / under if over and under else None

    def median(entry: Mapping[str, Any], key: str) -> float | None:
        return entry[key]["median"] if entry[key] else None

    limit = free = None
    ours, theirs = figures["flops"], unpruned["flops"]
    if ours and theirs:
        limit = ratio(theirs["prefill"], ours["prefill"])
        free = ratio(theirs["prefill"], ours["layers"] + ours["lm_head"])
    prefill = ratio(median(unpruned, "prefill_s"), median(figures, "prefill_s"))
    return {
        "name": unpruned["name"],
        "first_token": ratio(median(unpruned, "first_token_s"), median(figures, "first_token_s")),
        "prefill": prefill,
        "flops_limit": limit,
        "flops_limit_free_selection": free,
        "of_limit": ratio(prefill, limit),
        "tokens_per_s": ratio(median(figures, "tokens_per_s"), median(unpruned, "tokens_per_s")),
        "kv_bytes": ratio(unpruned["kv_bytes"], figures["kv_bytes"]),
        "peak_mib": ratio(unpruned["peak_mib"], figures["peak_mib"]),
    }
