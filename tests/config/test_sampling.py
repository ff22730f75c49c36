"""Sampling options are checked in one place, and a request's count before a bundle's."""

from typing import Any

import numpy as np
import pytest

from trio_deploy import TrioError
from trio_deploy.config.sampling import SAMPLING_OPTIONS, SamplingOptions

WRONG: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1, float("nan"), float("inf"), "hot", True, [1.0])],
    *[("top_k", value) for value in (-1, 2.0, "5", True)],
    *[("top_p", value) for value in (0, 1.5, -0.1, float("nan"), "1")],
    *[("min_p", value) for value in (-0.1, 1.1, float("nan"))],
    *[("repetition_penalty", value) for value in (0, -1.0, float("inf"), float("nan"))],
    *[("presence_penalty", value) for value in (-2.1, 2.1, float("nan"))],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, "0")],
    *[
        ("logit_bias", value)
        for value in ({9: 1}, {-1: 1}, {"1": 1}, {1: 101}, {1: -101}, {1: float("nan")}, [1], 5)
    ],
    *[("no_repeat_ngram_size", value) for value in (-1, 1.5)],
    *[("min_new_tokens", value) for value in (-1, 0.5)],
    *[("seed", value) for value in (-3, 1.0)],
    *[("suppress_tokens", value) for value in ([-1], 5, "12", [1.0], [True], [9], {3})],
    *[("begin_suppress_tokens", value) for value in ([-1], 5, [9])],
    *[("bad_words", value) for value in ("word", [1], [""], 3, ["\ud800"])],
    *[("bad_words_ids", value) for value in ([1], [[]], [[-1]], [[1], [9]], "12")],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_a_value_of_the_wrong_kind_or_out_of_range_is_refused_by_name(
    name: str, value: Any
) -> None:
    with pytest.raises(TrioError, match="bad.word" if name.startswith("bad_") else name):
        SamplingOptions(**{name: value}).check(vocabulary=9)


LIMITS: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-300, 100, np.float32(0.5)],
    "top_k": [0, 1, 10**9, np.int64(5)],
    "top_p": [1e-9, 1, 1.0],
    "min_p": [0, 1],
    "repetition_penalty": [1e-9, 1, 50.0],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [{}, {0: -100, 8: 100.0}],
    "no_repeat_ngram_size": [0, 10**9],
    "min_new_tokens": [0, 10**9],
    "suppress_tokens": [[], [0, 8], (1,)],
    "begin_suppress_tokens": [[8]],
    "bad_words": [[], ["a b", "c"]],
    "bad_words_ids": [[], [[0], [8, 1]]],
    "seed": [0, 2**80],
}


@pytest.mark.parametrize("name", SAMPLING_OPTIONS)
def test_the_limits_of_a_range_belong_to_it(name: str) -> None:
    for value in LIMITS[name]:
        SamplingOptions(**{name: value}).check(vocabulary=9)


def test_json_has_what_is_said_and_reads_back() -> None:
    options = SamplingOptions(
        temperature=0.0, top_k=5, suppress_tokens=(1, 2), bad_words_ids=[(3,)]
    )
    plain = {"temperature": 0.0, "top_k": 5, "suppress_tokens": [1, 2], "bad_words_ids": [[3]]}
    assert options.to_json() == plain
    assert SamplingOptions.from_json(plain).to_json() == plain
    assert SamplingOptions.from_json({}) == SamplingOptions()
    with pytest.raises(TrioError, match="'top_kk'; did you mean 'top_k'"):
        SamplingOptions.from_json({"top_kk": 1})
    with pytest.raises(TrioError, match="top_k"):
        SamplingOptions.from_json({"top_k": -1})


def test_what_is_said_counts_before_the_defaults_even_if_it_is_zero_or_empty() -> None:
    defaults = SamplingOptions(temperature=0.7, top_k=50, suppress_tokens=[1], seed=3)
    said = SamplingOptions(temperature=0.0, suppress_tokens=[], min_p=0.1)
    assert said.over(defaults) == SamplingOptions(
        temperature=0.0, top_k=50, suppress_tokens=[], seed=3, min_p=0.1
    )


def test_a_description_names_what_has_an_effect() -> None:
    neutral = {"top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert SamplingOptions(**neutral).describe() == "greedy"
    assert SamplingOptions(top_k=50, temperature=0.0).describe() == "greedy"
    assert SamplingOptions(logit_bias={1: 2.0, 3: 1.0}).describe() == "greedy, 2 logit_bias"
    drawn = SamplingOptions(temperature=0.7, top_k=50, bad_words_ids=[[1], [2, 3]], seed=4)
    assert drawn.describe() == "temperature 0.7, top_k 50, 2 bad_words_ids, seed 4"
    long = SamplingOptions(temperature=0.7, seed=12_345_678, top_k=np.int64(1_234_567))
    assert long.describe() == "temperature 0.7, top_k 1234567, seed 12345678"
    penalised = SamplingOptions(repetition_penalty=1.1, min_new_tokens=2)
    assert penalised.describe() == "greedy, repetition_penalty 1.1, min_new_tokens 2"


@pytest.mark.parametrize(
    ("options", "alters"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 1}, False),
        ({"repetition_penalty": 1.0, "presence_penalty": 0.0, "suppress_tokens": ()}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"logit_bias": {}}, False),
        ({"logit_bias": {3: 1.0}}, True),
        ({"no_repeat_ngram_size": 2}, True),
        ({"min_new_tokens": 1}, True),
        ({"begin_suppress_tokens": (3,)}, True),
        ({"bad_words_ids": ((3,),)}, True),
    ],
)
def test_penalties_and_bans_alone_alter_logits(options, alters):
    assert SamplingOptions(**options).alters_logits is alters
