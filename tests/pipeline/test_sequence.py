"""Times of an answer count from the call."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.hand_clock import HandClock
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, SCHEDULE, ask
from trio_deploy import Bundle, Pipeline, Request
from trio_deploy.pipeline.batch import DecodeBatch
from trio_deploy.pipeline.sampling import log_softmax


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


def test_log_probabilities_are_of_the_raw_logits_one_per_token(pipeline: Pipeline) -> None:
    request = Request(
        ask(COLOR), make_picture(), max_new_tokens=3, top_logprobs=2, logit_bias={7: 100.0}
    )
    answer = pipeline.generate(request)
    assert answer.token_ids == [7, 7, 7] == [each.token_id for each in answer.token_logprobs]
    first = answer.token_logprobs[0]
    assert answer.first_logits is not None
    expected = log_softmax(answer.first_logits)
    assert first.logprob == expected[7] < first.top[1][1] <= first.top[0][1] == expected.max()
    assert pipeline.generate(replace(request, top_logprobs=None)).token_logprobs == []


def test_an_answer_goes_on_after_an_end_token_where_that_is_asked(bundles: Bundles) -> None:
    bundle = Bundle.load(bundles.path("tiny", schedule=SCHEDULE))
    request = Request(ask(COLOR), make_picture(), max_new_tokens=6)
    pipeline = Pipeline.open(bundle.with_end_tokens(range(bundle.config.text.vocab_size)))
    assert len(pipeline.generate(request).token_ids) == 1
    answer = pipeline.generate(replace(request, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")
