"""Metric families: every value of a batcher's metrics has one."""

from __future__ import annotations

import dataclasses

from trio_deploy.pipeline.batcher.metrics import BOUNDS_S, Histogram, Metrics
from trio_deploy.serve.metrics import FAMILIES, OUTCOMES, prometheus_text, values


def test_labelled_families_have_a_value_for_each_label() -> None:
    found = [item for family in FAMILIES for item in values(family, Metrics(outcomes={"stop": 3}))]
    outcomes = {label: value for name, label, value in found if name == "trio_requests_total"}
    assert outcomes == dict.fromkeys(OUTCOMES, 0) | {"stop": 3}
    successes = {label: value for name, label, value in found if "success" in name}
    assert successes == {"stop": 3, "length": 0}


def test_every_number_of_the_metrics_is_a_value() -> None:
    fields = [field for field in dataclasses.fields(Metrics) if field.name != "outcomes"]
    numbers = {
        field.name: Histogram(total=100.0 + i) if field.type == "Histogram" else 100 + i
        for i, field in enumerate(fields)
    }
    metrics = Metrics(**numbers)  # type: ignore[arg-type]
    exported = {value for family in FAMILIES for _, _, value in values(family, metrics)}
    missing = {name for i, name in enumerate(numbers) if 100 + i not in exported}
    # Prefills are told by the steps and first tokens, and what runs is one value.
    assert missing == {"prefills", "prefilling", "active"}
    assert numbers["prefilling"] + numbers["active"] in exported


def test_the_text_has_each_family_once_and_buckets_that_add_up() -> None:
    times = Histogram().including([0.0005, 0.3, 0.4, 1e6])
    text = prometheus_text(Metrics(first_token=times, queued=2, outcomes={"length": 5}))
    lines = text.splitlines()
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) == len(FAMILIES)
    name = "trio_time_to_first_token_seconds"
    buckets = [line for line in lines if line.startswith(f"{name}_bucket")]
    assert len(buckets) == len(BOUNDS_S) + 1
    assert buckets[0] == f'{name}_bucket{{le="0.001"}} 1'
    assert f'{name}_bucket{{le="0.5"}} 3' in buckets and f'{name}_bucket{{le="0.25"}} 1' in buckets
    assert buckets[-1] == f'{name}_bucket{{le="+Inf"}} 4' and f"{name}_count 4" in lines
    assert "trio_num_requests_waiting 2" in lines
    assert 'trio_request_success_total{finished_reason="length"} 5' in lines


def test_another_prefix_is_of_the_families_that_others_have_too() -> None:
    lines = prometheus_text(Metrics(), "vllm:").splitlines()
    assert "vllm:num_requests_running 0" in lines and "trio_kept_tokens_total 0" in lines
    assert not any(line.startswith("trio_num_requests") for line in lines)
