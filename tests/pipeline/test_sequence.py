"""Times of an answer count from the call."""

from __future__ import annotations

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.hand_clock import HandClock
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, ask
from trio_deploy import Pipeline, Request
from trio_deploy.pipeline.batch import DecodeBatch


@pytest.fixture
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


def test_the_first_token_is_timed_from_the_call_and_the_rate_from_the_first_token(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock(monkeypatch)
    clock.before(pipeline._preparer, "_open", 10)
    clock.before(pipeline, "prefill", 1000)
    clock.before(DecodeBatch, "step", 4)
    request = Request(ask(COLOR, 2), [make_picture(), make_picture(seed=1)], max_new_tokens=3)
    for answer in pipeline.generate_batch([request, request]):
        assert answer.first_token_s == 2 * 10 + 1000  # two distinct pictures
        assert answer.tokens_per_s == 2 / (2 * 4)
    with pipeline.stream(request) as stream:
        clock.now += 50  # nothing runs until it is iterated
        assert "".join(stream)
    assert stream.generation.first_token_s == 2 * 10 + 1000
    single = pipeline.generate(Request("what ?", max_new_tokens=1))
    assert (single.first_token_s, single.tokens_per_s) == (1000, 0.0)
