"""Tokens are drawn as asked, text streams without broken characters, stop strings never show."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trio_deploy import TrioError
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.pipeline.sampling import Detokenizer, Sampler, StopScanner


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
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=4) / 20_000
    expected = np.exp(logits / temperature)
    assert np.abs(counts - expected / expected.sum()).max() < 0.015


def test_top_p_draws_from_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        sampler = Sampler(SamplingOptions(temperature=1.0, top_p=top_p, seed=0))
        assert {sampler(logits) for _ in range(400)} == allowed


def test_logits_that_are_not_numbers_are_an_error_not_a_token() -> None:
    with pytest.raises(TrioError, match="not finite"):
        Sampler(SamplingOptions())(np.array([0.0, np.nan], np.float32))


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
