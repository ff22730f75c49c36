"""A look into a batcher's queue, and deadlines that pass without a clock."""

from __future__ import annotations

from dataclasses import replace

from trio_deploy import Batcher
from trio_deploy.pipeline.batcher.queue import Job


def waiting(batcher: Batcher) -> list[Job]:
    """Requests that are prepared and wait for their prefill."""
    return batcher._queue.snapshot().waiting


def unfinished(batcher: Batcher) -> list[Job]:
    """Requests that have not ended."""
    return list(batcher._queue._open.values())


def expire(batcher: Batcher) -> None:
    """Let the deadlines of all requests pass."""
    for job in unfinished(batcher):
        job.entry = replace(job.entry, deadline=0.0)
    batcher._queue.wake()
