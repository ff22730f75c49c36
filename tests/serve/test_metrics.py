"""Metric families: every value of a batcher's metrics has one."""

from __future__ import annotations

import dataclasses

from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.serve.metrics import COUNTERS, GAUGES, OUTCOMES, metric_values


def test_every_family_has_its_values() -> None:
    values = list(metric_values(Metrics(outcomes={"stop": 3})))
    assert {name for name, _, _ in values} == {*COUNTERS, *GAUGES}
    outcomes = {outcome: value for name, outcome, value in values if outcome}
    assert outcomes == dict.fromkeys(OUTCOMES, 0) | {"stop": 3}


def test_every_number_of_the_metrics_is_a_value() -> None:
    numbers = [field.name for field in dataclasses.fields(Metrics) if field.name != "outcomes"]
    metrics = Metrics(**{name: 100 + i for i, name in enumerate(numbers)})  # type: ignore[arg-type]
    exported = {value for _, outcome, value in metric_values(metrics) if not outcome}
    missing = {name for name in numbers if getattr(metrics, name) not in exported}
    assert missing == {"prefills"}, "told by the steps and first tokens"
