"""A model's metrics on Triton's endpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fakes import triton as fake_utils
from tests.support.fakes.triton import MetricFamily
from tests.support.tensors import file
from tests.support.triton_models import QUESTION, ask
from tests.support.waiting import wait_for
from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.serve.triton_server.metrics import Exporter


def metric_values(name: str) -> dict[str, float]:
    """Of the model loaded last, by outcome."""
    metrics = MetricFamily.FAMILIES[name].metrics
    assert all(m.labels["model"] == "trio_vlm" and m.labels["version"] == "1" for m in metrics)
    return {m.labels.get("outcome", ""): m.value for m in metrics}


def test_metrics_count_what_happened(load: Callable[..., Any]) -> None:
    model = load()
    ask(model, prompt=QUESTION, images=file(), max_tokens=4).outputs()
    ask(model, prompt=QUESTION, max_tokens=3).outputs()
    ask(model, prompt=QUESTION, top_p=7.0).error()
    ask(model, prompt=QUESTION, images=b"nothing").error()

    values = metric_values
    # All at once, since they are brought up to date one after the other, and again and again.
    expected = {
        "trio_generation_tokens_total": 7,
        "trio_visual_tokens_total": 256,
        "trio_time_to_first_token_seconds_count": 2,
        "trio_num_requests_running": 0,
        "trio_num_requests_waiting": 0,
        "trio_kv_bytes": 0,
    }
    wait_for(lambda: {name: values(name)[""] for name in expected} == expected)
    wait_for(lambda: [values("trio_requests_total")[n] for n in ("length", "invalid")] == [2, 2])
    wait_for(lambda: 256 > values("trio_kept_tokens_total")[""] > 0)
    wait_for(lambda: values("trio_time_to_first_token_seconds_sum")[""] > 0)
    assert MetricFamily.FAMILIES["trio_kv_bytes"].kind == "gauge"


def test_metrics_of_a_model_that_was_unloaded_say_that_nothing_runs(
    load: Callable[..., Any],
) -> None:
    model = load()
    before = MetricFamily.FAMILIES["trio_generation_tokens_total"].metrics[-1]
    model._stop.set()
    model._poller.join()  # as if it were over just before the last answers
    requests = [ask(model, prompt=QUESTION, max_tokens=3) for _ in range(2)]
    wait_for(lambda: model._service.metrics().active > 0 or requests[0].sender.ended.is_set())
    model._export()
    model.finalize()
    last = {name: family.metrics[-1].value for name, family in MetricFamily.FAMILIES.items()}
    assert before.value == last["trio_generation_tokens_total"] == 6
    gauges = ("num_requests_waiting", "num_requests_running", "kv_bytes", "kv_bytes_allocated")
    assert [last[f"trio_{name}"] for name in gauges] == [0, 0, 0, 0]


def test_what_has_ended_is_counted_before_nothing_seems_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Changes reach the server one by one, and a client may read between any two."""
    changed: list[str] = []
    exporter = Exporter(fake_utils.module(), {})
    for (name, _), metric in exporter._metrics.items():
        monkeypatch.setattr(metric, "increment", lambda change, name=name: changed.append(name))
    exporter.update(Metrics(active=1, queued=1))
    changed.clear()
    exporter.update(Metrics(outcomes={"cancelled": 1}, tokens=3, steps=3))
    assert set(changed[:-2]) == {
        "trio_requests_total",
        "trio_generation_tokens_total",
        "trio_decode_steps_total",
    }
    assert changed[-2:] == ["trio_num_requests_running", "trio_num_requests_waiting"]


def test_a_server_without_metrics_serves_without(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any, **named: Any) -> None:
        raise fake_utils.TritonModelException("metrics are not enabled")

    monkeypatch.setattr(sys.modules["triton_python_backend_utils"].MetricFamily, "__init__", none)
    assert ask(load(), prompt=QUESTION, max_tokens=1).outputs()
