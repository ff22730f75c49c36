"""Memory of a batch whose rows come and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, ask
from trio_deploy import Pipeline, Request
from trio_deploy.pipeline.prefill import Clock


@pytest.fixture(scope="module")
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


def test_engines_of_one_capacity_need_all_of_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's that update in place are made for one; a number in a signature stands for it."""
    for segment in pipeline._stages.segments:
        inputs: Any = pipeline.engine(segment).inputs
        for name, spec in list(inputs.items()):
            if name.startswith("past."):
                shape = (*spec.shape[:2], 900, *spec.shape[3:])
                monkeypatch.setitem(inputs, name, replace(spec, shape=shape))
    running = pipeline.decode_batch(2)
    for images in ([], [make_picture()]):
        prompt = ask(COLOR, len(images))
        row = pipeline.prepare(Request(prompt, images, max_new_tokens=3))
        needed = running.required_bytes([row])
        prefilled = pipeline.prefill([row], Clock())
        row.advance(prefilled.logits[0])
        running.join([row], prefilled)
        assert running.kv_bytes_allocated == needed
    assert {cache.capacity for cache in running._caches.values()} == {900}
