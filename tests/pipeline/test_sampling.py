"""Tokens are drawn as asked, text streams without broken characters, stop strings never show."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trio_deploy import TrioError
from trio_deploy.checkpoint.generation_config import read_sampling
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import NoChoice
from trio_deploy.pipeline.sampling import (
    Detokenizer,
    Forced,
    Sampler,
    StopScanner,
    TokenLogprobs,
    draw,
    log_softmax,
    process,
    repeated_ngram_ends,
    softmax,
    warp,
)


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingOptions())(np.array([0.0, 3.0, 3.0], np.float32)) == 1


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    draws = {
        seed: [Sampler(SamplingOptions(temperature=1.0, seed=seed))(logits) for _ in range(3)]
        for seed in (1, 2)
    }
    assert draws[1][0] == draws[1][1]
    assert draws[1] != draws[2]


def test_draws_follow_the_softmax_at_the_given_temperature() -> None:
    logits, temperature = np.array([1.0, 0.0, -1.0, 2.0], np.float32), 0.7
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=0))
    counts = np.bincount([sampler(logits) for _ in range(6000)], minlength=4) / 6000
    expected = np.exp(logits / temperature)
    assert np.abs(counts - expected / expected.sum()).max() < 0.015


def test_top_p_draws_from_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        sampler = Sampler(SamplingOptions(temperature=1.0, top_p=top_p, seed=0))
        assert {sampler(logits) for _ in range(400)} == allowed


def test_a_top_p_of_one_keeps_the_least_likely_too() -> None:
    scores = np.array([0.0, -100.0])  # whose probabilities add up to 1 with the first one already
    kept = warp(scores, SamplingOptions(temperature=1.0, top_p=1.0))
    assert kept.tolist() == scores.tolist()


def test_top_k_keeps_the_greatest_of_many() -> None:
    scores = np.random.default_rng(0).permutation(1000).astype(np.float64)
    kept = warp(scores, SamplingOptions(temperature=1.0, top_k=7))
    assert set(np.flatnonzero(np.isfinite(kept))) == set(np.argsort(scores)[-7:])


def test_logits_that_are_not_numbers_are_an_error_not_a_token() -> None:
    with pytest.raises(TrioError, match="not finite"):
        Sampler(SamplingOptions())(np.array([0.0, np.nan], np.float32))


VOCABULARY, ENDS = 60, [2, 3]

# Each option alone, as generation_config.json spells it, and then drawn together.
OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 4},
    {"suppress_tokens": [0, 7, 59, 60, 1000]},
    {"begin_suppress_tokens": [5, 9]},
    {"bad_words_ids": [[4], [5, 6], [7, 8, 9], [2], [3, 2], [6, 6]]},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "temperature": 2.5},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 9},
    {"do_sample": True, "top_k": 100},
    {"do_sample": True, "top_k": 0, "top_p": 0.7},
    {"do_sample": True, "top_k": 0, "top_p": 0.01},
    {"do_sample": True, "top_k": 0, "min_p": 0.2},
    {"do_sample": True, "top_k": 0, "min_p": 1.0},
]


@pytest.fixture(scope="module")
def causal_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config)


def scores_of_transformers(
    model: Any, settings_: dict[str, Any], logits: np.ndarray, tokens: np.ndarray, prompt: int
) -> np.ndarray:
    """What transformers' own list of processors, in its order, makes of logits."""
    defaults = GenerationConfig._get_default_generation_params()
    config = GenerationConfig(**defaults | settings_)
    config._eos_token_tensor = torch.tensor(ENDS)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=prompt, device="cpu", model_kwargs={}
    )
    return processors(torch.from_numpy(tokens)[None], torch.from_numpy(logits)[None])[0].numpy()


def assert_equal_scores(model: Any, settings_: dict[str, Any], rng: np.random.Generator) -> None:
    options, unsupported = read_sampling(settings_)
    assert not unsupported
    prompt, answer = int(rng.integers(1, 30)), int(rng.integers(0, 8))
    # Few kinds of tokens, so that n-grams and bad words occur.
    tokens = rng.integers(0, 12, prompt + answer)
    logits = rng.normal(0, 3, VOCABULARY).astype(np.float32)
    ours = process(logits, tokens, prompt, ENDS, options)
    if not options.greedy:
        ours = warp(ours, options)
    theirs = scores_of_transformers(model, settings_, logits, tokens, prompt)
    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs)), settings_
    kept = np.isfinite(ours)
    if not options.greedy:  # ours are relative to the greatest
        theirs = theirs - theirs.max()
    assert np.allclose(ours[kept], theirs[kept], rtol=1e-5, atol=1e-5), settings_


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_each_option_does_to_logits_what_it_does_in_transformers(
    causal_model: Any, option: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert_equal_scores(causal_model, option, rng)


def test_options_together_come_in_transformers_order(causal_model: Any) -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        merged: dict[str, Any] = {}
        for number in rng.choice(len(OPTIONS), int(rng.integers(2, 7)), replace=False):
            merged |= OPTIONS[number]
        assert_equal_scores(causal_model, merged, rng)


def test_an_n_gram_of_all_tokens_may_repeat_and_a_longer_one_cannot() -> None:
    assert repeated_ngram_ends(np.array([6, 6]), 2) == [6]
    assert repeated_ngram_ends(np.array([6, 6]), 3) == []


def test_counted_penalties_are_those_of_openais_formula() -> None:
    # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    logits, prompt = np.array([1.0, -1.0, 0.5, 2.0], np.float32), [3, 3, 3]
    tokens = np.array([*prompt, 0, 1, 0])
    options = SamplingOptions(presence_penalty=0.5, frequency_penalty=-0.25)
    scores = process(logits, tokens, len(prompt), (), options)
    assert np.allclose(scores, [1.0 + 2 * 0.25 - 0.5, -1.0 + 0.25 - 0.5, 0.5, 2.0])
    one = process(logits, tokens, len(prompt), (), SamplingOptions(presence_penalty=0.5))
    assert np.allclose(one, [0.5, -1.5, 0.5, 2.0])
    other = process(logits, tokens, len(prompt), (), SamplingOptions(frequency_penalty=1.0))
    assert np.allclose(other, [-1.0, -2.0, 0.5, 2.0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_that_make_logits_infinite_are_refused(temperature: float) -> None:
    """A form adds -inf to what it forbids, and with +inf that is no number."""
    options = SamplingOptions(temperature=temperature, seed=0, repetition_penalty=1e-310)
    sampler = Sampler(options, prompt=np.array([0]))
    with pytest.raises(NoChoice, match="repetition_penalty, .* make logits infinite"):
        sampler(np.array([2.0, 1.0], np.float32))


def test_repetition_comes_before_counted_penalties() -> None:
    options = SamplingOptions(repetition_penalty=2.0, presence_penalty=1.5)
    scores = process(np.array([1.0, 3.0]), np.array([0]), 0, (), options)
    assert scores.tolist() == [1.0 / 2.0 - 1.5, 3.0]


def test_a_bias_is_added_after_the_penalties_and_before_the_bans() -> None:
    options = SamplingOptions(
        repetition_penalty=2.0, logit_bias={0: 3.0, 1: -1.0, 9: 5.0, 2: 100.0}, suppress_tokens=[2]
    )
    logits = np.array([4.0, 1.0, 0.0])
    assert process(logits, np.array([0]), 1, (), options).tolist() == [2.0 + 3.0, 0.0, -np.inf]
    assert logits.tolist() == [4.0, 1.0, 0.0]


def test_log_probabilities_name_the_most_likely_tokens_in_order() -> None:
    chances = np.array([0.1, 0.4, 0.2, 0.3])
    found = TokenLogprobs.of(np.log(chances).astype(np.float32), 0, 2)
    assert found.token_id == 0 and np.isclose(found.logprob, np.log(0.1))
    assert [token for token, _ in found.top] == [1, 3]
    assert np.allclose([value for _, value in found.top], np.log([0.4, 0.3]))
    assert TokenLogprobs.of(np.log(chances), 1, 0).top == ()
    everything = TokenLogprobs.of(np.log(chances), 1, 20).top
    assert [token for token, _ in everything] == [1, 3, 2, 0]


def test_the_logits_themselves_are_left_as_they_are() -> None:
    logits = np.array([3.0, -2.0, 1.0])
    options = SamplingOptions(repetition_penalty=2.0, suppress_tokens=[0], temperature=1.0, top_k=1)
    warp(process(logits, np.array([0, 1]), 1, (), options), options)
    Sampler(options)(logits)
    assert logits.tolist() == [3.0, -2.0, 1.0]


def test_a_sampler_remembers_the_prompt_and_what_it_chose() -> None:
    logits = np.array([4.0, 3.9, 3.8, 0.0], np.float32)
    sampler = Sampler(SamplingOptions(no_repeat_ngram_size=1), prompt=[0])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(TrioError, match="no_repeat_ngram_size.*leave no token"):
        sampler(logits)
    begun = Sampler(SamplingOptions(begin_suppress_tokens=[0], min_new_tokens=2), [9], ends=[1])
    assert [begun(logits) for _ in range(3)] == [2, 0, 0]
    counted = Sampler(SamplingOptions(frequency_penalty=0.15), prompt=[0, 0, 0])
    assert [counted(logits) for _ in range(4)] == [0, 1, 0, 2]


def test_an_end_token_may_come_once_the_least_number_has() -> None:
    logits = np.array([1.0, 9.0], np.float32)
    sampler = Sampler(SamplingOptions(min_new_tokens=2), [5, 5, 5], ends=[1])
    assert [sampler(logits) for _ in range(3)] == [0, 0, 1]


def test_draws_are_of_the_nucleus_alone_in_proportion() -> None:
    # A draw that is not scaled to what is left would give its last token the rest of the mass.
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    for options, expected in (
        (SamplingOptions(temperature=1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (SamplingOptions(temperature=1.0, top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
        (SamplingOptions(temperature=1.0, min_p=0.5), [4 / 9, 3 / 9, 2 / 9, 0]),
    ):
        generator = Given((np.arange(630) + 0.5) / 630)
        counts = np.bincount([draw(warp(logits, options), generator) for _ in range(630)]) / 630
        assert np.abs(counts - expected[: len(counts)]).max() < 2 / 630
        assert not any(expected[len(counts) :])


class Given(np.random.Generator):
    """A generator of given numbers in [0, 1)."""

    def __init__(self, numbers: Iterable[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self._numbers = iter(numbers)

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return next(self._numbers)


def test_the_highest_number_draws_the_last_token_that_is_possible() -> None:
    for count in range(1, 40):
        scores = np.append(np.log(np.arange(1.0, count + 1)), [-np.inf] * 3)
        assert draw(scores, Given([np.nextafter(1.0, 0.0)])) == count - 1


def test_large_scores_have_probabilities() -> None:
    assert np.allclose(softmax(np.array([1000.0, 1000.0, -np.inf])), [0.5, 0.5, 0.0])
    assert draw(np.array([-np.inf, 900.0]), Given([0.3])) == 1


def test_no_seed_draws_other_tokens_each_time() -> None:
    logits = np.zeros(1000, np.float32)
    drawn = {
        tuple(sampler(logits) for _ in range(4))
        for sampler in (Sampler(SamplingOptions(temperature=1.0)) for _ in range(3))
    }
    assert len(drawn) == 3
    seeded = Sampler(SamplingOptions(temperature=1.0, seed=0))
    assert tuple(seeded(logits) for _ in range(4)) not in drawn


def test_forced_tokens_are_taken_and_their_probabilities_recorded() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2], [0.1, 0.3, 0.6]])
    offsets = np.array([[3.0], [-40.0], [900.0]])
    logits = (np.log(probabilities) + offsets).astype(np.float32)
    for tokens in ([1, 1, 0], [0, 0, 2], [2, 2, 1]):
        forced = Forced(tokens)
        assert [forced(row) for row in logits] == tokens
        expected = np.log(probabilities[range(3), tokens])
        assert np.allclose(forced.logprobs, expected, atol=1e-4)
        assert forced.greedy == [
            best == token for best, token in zip([1, 0, 2], tokens, strict=True)
        ]
    assert np.allclose(log_softmax(logits), np.log(probabilities), atol=1e-4)


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, as byte fallback has it in the worst case."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {char: i for i, char in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spaced_tokenizer() -> Tokenizer:
    """Words with sentencepiece's leading ▁, whose first space decoding drops."""
    vocabulary = {"<unk>": 0, "▁a": 1, "▁cat": 2, "s": 3, "▁": 4, "</s>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    texts = Detokenizer(lambda part: tokenizer.decode(part, skip_special_tokens=True))
    return [*[texts.push(token) for token in ids], texts.flush()]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_streamed_pieces_join_to_the_whole_text_and_never_break_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces = stream(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_shown_once_nothing_can_follow() -> None:
    tokenizer = byte_tokenizer()
    pieces = stream(tokenizer, tokenizer.encode("aé").ids[:-1])
    assert pieces == ["a", "", "\ufffd"]


def test_spaces_between_words_survive_streaming() -> None:
    tokenizer = spaced_tokenizer()
    for ids in ([1, 2, 3, 1], [5, 1, 5, 2, 3], [4, 1, 4, 2]):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab.", max_size=4), max_size=8),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_the_shown_text_ends_before_the_first_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join([*[scanner.push(piece) for piece in pieces], scanner.flush()])
    seen, expected = "", None
    for piece in pieces:
        seen += piece
        found = [at for stop in stops if (at := seen.find(stop)) >= 0]
        if found:
            expected = seen[: min(found)]
            break
    assert shown == (seen if expected is None else expected)
    assert scanner.stopped == (expected is not None)


def test_nothing_is_shown_that_may_turn_out_to_be_a_stop_string() -> None:
    scanner = StopScanner(["</end>"])
    assert scanner.push("yes</") == "yes"
    assert scanner.push("en") == ""
    assert scanner.push("ough") == "</enough"
    assert scanner.push("</end>x") == "" and scanner.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(TrioError, match="stop string"):
        StopScanner([""])


def test_the_smallest_temperature_is_greedy_without_a_warning(recwarn: pytest.WarningsRecorder):
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert Sampler(SamplingOptions(temperature=1e-320, seed=0))(logits) == 1
    assert not recwarn.list
