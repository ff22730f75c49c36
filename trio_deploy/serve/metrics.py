"""A service's metrics as families that a monitoring system reads.

Families that vLLM has, too, have its names behind our prefix and mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from trio_deploy.pipeline.batcher.metrics import BOUNDS_S, Histogram, Metrics

PREFIX = "trio_"
OUTCOMES = ("stop", "length", "deadline", "cancelled", "refused", "invalid", "failed")
_SUCCESSES = ("stop", "length")


@dataclass(frozen=True)
class Family:
    """Metrics of one name.

    Attributes:
        kind: `counter`, `gauge` or `histogram`.
        read: its value, a histogram, or values by that of the label.
        label: name of the label; empty: there is none.
        shared: whether vLLM has it, too.
    """

    name: str
    kind: str
    description: str
    read: Callable[[Metrics], float | Histogram | Mapping[str, float]]
    label: str = ""
    shared: bool = False


FAMILIES = (
    Family(
        "trio_num_requests_running",
        "gauge",
        "Requests being prefilled or decoded",
        lambda metrics: metrics.prefilling + metrics.active,
        shared=True,
    ),
    Family(
        "trio_num_requests_waiting",
        "gauge",
        "Requests that wait for their prefill",
        lambda metrics: metrics.queued,
        shared=True,
    ),
    Family(
        "trio_prompt_tokens_total",
        "counter",
        "Tokens of prefilled prompts, visual ones before pruning included",
        lambda metrics: metrics.prompt_tokens,
        shared=True,
    ),
    Family(
        "trio_generation_tokens_total",
        "counter",
        "Tokens of answers that ended",
        lambda metrics: metrics.tokens,
        shared=True,
    ),
    Family(
        "trio_request_success_total",
        "counter",
        "Answers by why they ended",
        lambda metrics: {reason: metrics.outcomes.get(reason, 0) for reason in _SUCCESSES},
        "finished_reason",
        shared=True,
    ),
    Family(
        "trio_time_to_first_token_seconds",
        "histogram",
        "Seconds from requests to their first tokens",
        lambda metrics: metrics.first_token,
        shared=True,
    ),
    Family(
        "trio_inter_token_latency_seconds",
        "histogram",
        "Seconds from each token to the next",
        lambda metrics: metrics.between_tokens,
        shared=True,
    ),
    Family(
        "trio_e2e_request_latency_seconds",
        "histogram",
        "Seconds from requests to the ends of their answers",
        lambda metrics: metrics.latency,
        shared=True,
    ),
    Family(
        "trio_request_queue_time_seconds",
        "histogram",
        "Seconds that requests waited for their prefill or gave up waiting",
        lambda metrics: metrics.queue,
        shared=True,
    ),
    Family(
        "trio_requests_total",
        "counter",
        "Requests by how they ended",
        lambda metrics: {outcome: metrics.outcomes.get(outcome, 0) for outcome in OUTCOMES},
        "outcome",
    ),
    Family(
        "trio_visual_tokens_total",
        "counter",
        "Visual tokens of prefilled prompts",
        lambda metrics: metrics.visual_tokens,
    ),
    Family(
        "trio_kept_tokens_total",
        "counter",
        "Visual tokens that the last pruning point kept",
        lambda metrics: metrics.kept_tokens,
    ),
    Family("trio_decode_steps_total", "counter", "Decode steps", lambda metrics: metrics.steps),
    Family(
        "trio_decode_rows_total",
        "counter",
        "Sum of the rows of all decode steps",
        lambda metrics: metrics.step_rows,
    ),
    Family(
        "trio_vision_cache_hits_total",
        "counter",
        "Pictures whose features were kept from earlier requests",
        lambda metrics: metrics.vision_cache_hits,
    ),
    Family(
        "trio_vision_cache_misses_total",
        "counter",
        "Pictures that the vision tower ran for",
        lambda metrics: metrics.vision_cache_misses,
    ),
    Family(
        "trio_vision_cache_bytes",
        "gauge",
        "Bytes of the features that are kept",
        lambda metrics: metrics.vision_cache_bytes,
    ),
    Family(
        "trio_kv_bytes",
        "gauge",
        "Bytes of keys and values of the tokens of answers being decoded",
        lambda metrics: metrics.kv_bytes,
    ),
    Family(
        "trio_kv_bytes_allocated",
        "gauge",
        "Bytes of their buffers",
        lambda metrics: metrics.kv_bytes_allocated,
    ),
)


def values(family: Family, metrics: Metrics) -> Iterator[tuple[str, str, float]]:
    """(name, value of the label or nothing, value) of a family; of a histogram its sum and count.

    These are what a monitoring system without histograms can keep.
    """
    value = family.read(metrics)
    if isinstance(value, Histogram):
        yield f"{family.name}_sum", "", value.total
        yield f"{family.name}_count", "", value.count
    elif isinstance(value, Mapping):
        for label, each in value.items():
            yield family.name, label, each
    else:
        yield family.name, "", value


def prometheus_text(metrics: Metrics, prefix: str = PREFIX) -> str:
    """All families in Prometheus' text format.

    Args:
        prefix: of those that vLLM has, too; the others keep their own.
    """
    return "".join(line + "\n" for family in FAMILIES for line in _lines(family, metrics, prefix))


def _lines(family: Family, metrics: Metrics, prefix: str) -> Iterator[str]:
    name = prefix + family.name.removeprefix(PREFIX) if family.shared else family.name
    yield f"# HELP {name} {family.description}"
    yield f"# TYPE {name} {family.kind}"
    value = family.read(metrics)
    if isinstance(value, Histogram):
        counts = accumulate(value.buckets)
        for bound, count in zip((*BOUNDS_S, math.inf), counts, strict=True):
            text = "+Inf" if bound == math.inf else f"{bound:g}"
            yield f'{name}_bucket{{le="{text}"}} {count}'
        yield f"{name}_sum {value.total:.9g}"
        yield f"{name}_count {value.count}"
        return
    for _, label, number in values(family, metrics):
        where = f'{{{family.label}="{label}"}}' if label else ""
        yield f"{name}{where} {number}"
