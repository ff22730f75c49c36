"""What tests of batching share: a pipeline, requests, a gate, and a look into the queue."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, SCHEDULE, ask
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Batcher, Bundle, Pipeline, Request
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.batcher.queue import Job
from trio_deploy.pipeline.sequence import SequenceState


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


SHORT = Request("what color is the circle ?", max_new_tokens=3)


@functools.cache
def opened(bundles: Bundles, dialect: str = "ort", runtime: str = "onnxruntime") -> Pipeline:
    """Open the shipped model without end tokens, so that its answers are as long as they may."""
    bundle = Bundle.load(bundles.path("tiny", schedule=SCHEDULE, dialect=dialect))
    return Pipeline.open(bundle.with_end_tokens([]), runtime=runtime, threads=1)


def mixed(count: int) -> list[Request]:
    """Requests that differ in everything in which they may differ."""
    requests = []
    for number in range(count):
        scene = scenes.generate(number)
        images: list[Any] = [[scene.image], [], [make_picture(60, 90, number)] * 2][number % 3]
        requests.append(
            Request(
                ask(COLOR if number % 2 else "what shape is red ?", len(images)),
                images,
                max_new_tokens=1 + number * 7 % 12,
                temperature=(0.0, 1.0)[number % 2],
                top_p=0.9,
                seed=number,
                repetition_penalty=(None, 1.3)[number % 2],
                frequency_penalty=(None, 0.4, None)[number % 3],
                no_repeat_ngram_size=(None, None, 2)[number % 3],
                min_new_tokens=min(2, 1 + number * 7 % 12),
                suppress_tokens=range(number % 7),
                stop=["a", "is"] if number % 5 == 4 else (),
                budget=(None, 0.15, 1.0, 0.5)[number % 4],
            )
        )
    return requests


class Gate:
    """Holds a pipeline's prefills up until it is opened."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.turns: list[int] = []
        prefill = pipeline.prefill

        def gated(rows: list[SequenceState], *given: Any) -> Any:
            self.turns.append(len(rows))
            assert self.open.wait(WAIT_S)
            return prefill(rows, *given)

        monkeypatch.setattr(pipeline, "prefill", gated)

    def held(self) -> None:
        """Wait until a prefill is held up."""
        wait_for(lambda: bool(self.turns))
