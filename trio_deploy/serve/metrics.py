"""A service's metrics as families that a monitoring system reads."""

from __future__ import annotations

from collections.abc import Iterator

from trio_deploy.pipeline.batcher.metrics import Metrics

OUTCOMES = ("stop", "length", "deadline", "cancelled", "refused", "invalid", "failed")

#: Descriptions by name; `trio_requests_total` has one value per outcome.
COUNTERS = {
    "trio_requests_total": "Requests by how they ended",
    "trio_tokens_total": "Tokens of answers that ended",
    "trio_first_token_seconds_sum": "Seconds from requests to their first tokens",
    "trio_first_token_seconds_count": "Requests that got a first token",
    "trio_queue_seconds_sum": "Seconds that requests waited for their prefill or gave up waiting",
    "trio_queue_seconds_count": "Requests that were prefilled or gave up waiting",
    "trio_visual_tokens_total": "Visual tokens of prefilled prompts",
    "trio_kept_tokens_total": "Visual tokens that the last pruning point kept",
    "trio_decode_steps_total": "Decode steps",
    "trio_decode_rows_total": "Sum of the rows of all decode steps",
}
GAUGES = {
    "trio_queue_length": "Requests that wait for their prefill",
    "trio_rows_active": "Answers being decoded",
    "trio_kv_bytes": "Bytes of keys and values of the tokens of answers being decoded",
    "trio_kv_bytes_allocated": "Bytes of their buffers",
}


def metric_values(metrics: Metrics) -> Iterator[tuple[str, str, float]]:
    """(family, outcome or nothing, value) of every metric."""
    for outcome in OUTCOMES:
        yield "trio_requests_total", outcome, metrics.outcomes.get(outcome, 0)
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
        yield name, "", float(value)
