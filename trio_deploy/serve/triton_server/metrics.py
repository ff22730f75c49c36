"""A batcher's metrics as families of Triton's metrics endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trio_deploy.pipeline.batcher.metrics import Metrics

OUTCOMES = ("stop", "length", "deadline", "cancelled", "refused", "invalid", "failed")

_COUNTERS = {
    "trio_requests_total": "Requests by how they ended",
    "trio_tokens_total": "Tokens of answers that ended",
    "trio_first_token_seconds_sum": "Seconds from requests to their first tokens",
    "trio_first_token_seconds_count": "Requests that got a first token",
    "trio_queue_seconds_sum": "Seconds that requests waited for their prefill or gave up waiting",
    "trio_queue_seconds_count": "Requests that were prefilled or gave up waiting",
    "trio_visual_tokens_total": "Visual tokens of prefilled prompts",
    "trio_kept_tokens_total": "Visual tokens that the last pruning point kept",
    "trio_decode_steps_total": "Decode steps",
    "trio_decode_rows_total": "Rows that decode steps had, summed up",
}
_GAUGES = {
    "trio_queue_length": "Requests that wait for their prefill",
    "trio_rows_active": "Answers in decoding",
    "trio_kv_bytes": "Bytes of keys and values of the tokens of answers in decoding",
    "trio_kv_bytes_allocated": "Bytes of their buffers",
}


class Exporter:
    """Keeps Triton's metrics at what batchers say.

    Values are added to, gauges too, so that several instances of one model sum up.
    """

    def __init__(self, utils: Any, labels: Mapping[str, str]) -> None:
        """Create the families; `utils` is `triton_python_backend_utils`.

        Raises:
            Exception: of Triton's, if the server exports no metrics.
        """
        self._metrics: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._families = []
        for kind, families in (
            (utils.MetricFamily.COUNTER, _COUNTERS),
            (utils.MetricFamily.GAUGE, _GAUGES),
        ):
            for name, description in families.items():
                family = utils.MetricFamily(name=name, description=description, kind=kind)
                self._families.append(family)
                for outcome in OUTCOMES if name == "trio_requests_total" else ("",):
                    own = {**labels, "outcome": outcome} if outcome else dict(labels)
                    self._metrics[name, outcome] = family.Metric(labels=own)

    def update(self, metrics: Metrics) -> None:
        """Bring the families up to date."""
        for key, value in _values(metrics):
            change = value - self._values.get(key, 0.0)
            if change:
                self._metrics[key].increment(change)
                self._values[key] = value


def _values(metrics: Metrics) -> Iterator[tuple[tuple[str, str], float]]:
    for outcome in OUTCOMES:
        yield ("trio_requests_total", outcome), metrics.outcomes.get(outcome, 0)
    for name, value in {
        "trio_tokens_total": metrics.tokens,
        "trio_first_token_seconds_sum": metrics.first_token_s,
        "trio_first_token_seconds_count": metrics.first_tokens,
        "trio_queue_seconds_sum": metrics.queue_s,
        "trio_queue_seconds_count": metrics.waits,
        "trio_visual_tokens_total": metrics.visual_tokens,
        "trio_kept_tokens_total": metrics.kept_tokens,
        "trio_decode_steps_total": metrics.steps,
        "trio_decode_rows_total": metrics.step_rows,
        "trio_queue_length": metrics.queued,
        "trio_rows_active": metrics.active,
        "trio_kv_bytes": metrics.kv_bytes,
        "trio_kv_bytes_allocated": metrics.kv_bytes_allocated,
    }.items():
        yield (name, ""), float(value)
