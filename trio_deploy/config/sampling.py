"""How the tokens of an answer are chosen: the options, their ranges, and whose value counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import nearest_name, require_unicode


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the tokens of an answer are chosen; None: not said.

    What a request does not say is taken from the bundle, which has it from the checkpoint's
    generation_config.json; what that does not say has no effect. Names and formulas are those of
    transformers, `presence_penalty` and `frequency_penalty` OpenAI's.

    Attributes:
        temperature: 0 chooses the most likely token; above 0 the logits are divided by it, and a
            token is drawn.
        top_k: draw from this many most likely tokens; 0: from all.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        min_p: draw from tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the
            prompt (the image token included, if there are visual tokens) or the answer; 1: none.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted as many times as the token is in the answer.
        logit_bias: by token id, what is added to its logit, -100 to 100.
        no_repeat_ngram_size: so many tokens in a row, in prompt and answer together, do not occur
            twice; 0: any may.
        min_new_tokens: no end token before this many tokens; stop strings end the answer anyway.
        suppress_tokens: ids of tokens that are never chosen; `begin_suppress_tokens`: not as the
            first.
        bad_words: texts that the answer must not contain, as the tokenizer splits them after a
            space and without; `bad_words_ids`: the same as token ids.
        seed: of this request's own generator, so that a request gives the same tokens alone and
            in a batch; None draws a fresh one.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    seed: int | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SamplingOptions:
        """Read what `to_json` wrote.

        Raises:
            TrioError: an unknown name, or a value of the wrong kind or out of range.
        """
        for name in raw:
            if name not in SAMPLING_OPTIONS:
                known = nearest_name(name, SAMPLING_OPTIONS)
                raise TrioError(f"there is no sampling option {name!r}{known}")
        options = cls(**raw)
        options.check()
        return options

    def to_json(self) -> dict[str, Any]:
        """The options that are said, by name, as plain JSON."""
        return {name: _plain(value) for name, value in self._said().items()}

    def over(self, defaults: SamplingOptions) -> SamplingOptions:
        """These options; where one is None, that of `defaults`."""
        return replace(defaults, **self._said())

    def _said(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in SAMPLING_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen, after penalties."""
        return not self.temperature

    @property
    def alters_logits(self) -> bool:
        """Whether a penalty or a ban has an effect on logits."""
        return any(
            value and value != _NEUTRAL.get(name)
            for name, value in self._said().items()
            if name not in _OF_DRAWING
        )

    def check(self, vocabulary: int | None = None) -> None:
        """Check kinds and ranges of all options.

        Args:
            vocabulary: number of tokens of the model, if known.

        Raises:
            TrioError: which option is wrong, and what it must be.
        """
        for name, (needed, holds) in _RANGES.items():
            value = getattr(self, name)
            kind, word = (Integral, "a whole number, ") if name in _WHOLE else (Real, "")
            if value is not None and not (_is(value, kind) and holds(value)):
                raise TrioError(f"{name} must be {word}{needed}, got {value!r:.80}")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if (tokens := getattr(self, name)) is not None:
                _check_tokens(name, tokens, vocabulary)
        if self.logit_bias is not None:
            _check_bias(self.logit_bias, vocabulary)
        _check_list("bad_words_ids", self.bad_words_ids)
        for word_ids in self.bad_words_ids or ():
            _check_tokens("bad_words_ids", word_ids, vocabulary)
        _check_list("bad_words", self.bad_words)
        for text in self.bad_words or ():
            if not isinstance(text, str):
                raise TrioError(f"bad_words must be texts, got {text!r:.80}")
            require_unicode(text, "a bad word")
        if not all([*(self.bad_words or ()), *(self.bad_words_ids or ())]):
            raise TrioError("a bad word must not be empty")

    def describe(self) -> str:
        """`greedy, repetition_penalty 1.1`: what has an effect."""
        parts = ["greedy"] if self.greedy else []
        for name, value in self.to_json().items():
            if isinstance(value, list | dict):
                parts += [f"{len(value)} {name}"] if value else []
            elif value != _NEUTRAL.get(name) and not (self.greedy and name in _OF_DRAWING):
                whole = isinstance(value, Integral)
                parts.append(f"{name} {value}" if whole else f"{name} {value:g}")
        return ", ".join(parts)


SAMPLING_OPTIONS = tuple(field.name for field in fields(SamplingOptions))
"""Names of the options, in their order."""

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 or more", lambda value: 0.0 <= value < math.inf),
    "top_k": ("0 (all tokens) or more", lambda value: value >= 0),
    "top_p": ("above 0 and at most 1", lambda value: 0.0 < value <= 1.0),
    "min_p": ("0 to 1", lambda value: 0.0 <= value <= 1.0),
    "repetition_penalty": ("above 0", lambda value: 0.0 < value < math.inf),
    "presence_penalty": ("-2 to 2", lambda value: -2.0 <= value <= 2.0),
    "frequency_penalty": ("-2 to 2", lambda value: -2.0 <= value <= 2.0),
    "no_repeat_ngram_size": ("0 (none) or more", lambda value: value >= 0),
    "min_new_tokens": ("0 or more", lambda value: value >= 0),
    "seed": ("0 or more", lambda value: value >= 0),
}
_WHOLE = ("top_k", "no_repeat_ngram_size", "min_new_tokens", "seed")
_NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value


def _check_list(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Sequence) or isinstance(value, str | bytes)):
        raise TrioError(f"{name} must be a list, got {value!r:.80}")


def _check_bias(bias: Any, vocabulary: int | None) -> None:
    if not isinstance(bias, Mapping):
        raise TrioError(f"logit_bias must be a number by token id, got {bias!r:.80}")
    _check_tokens("logit_bias", list(bias), vocabulary)
    for value in bias.values():
        if not (_is(value, Real) and -100.0 <= value <= 100.0):
            raise TrioError(f"logit_bias must be -100 to 100 for each token, got {value!r:.80}")


def _check_tokens(name: str, tokens: Any, vocabulary: int | None) -> None:
    _check_list(name, tokens)
    for token in tokens:
        if not (_is(token, Integral) and token >= 0):
            raise TrioError(f"{name} must be token ids, 0 or more, got {token!r:.80}")
        if vocabulary is not None and token >= vocabulary:
            raise TrioError(f"{name} has the token {token}, but the model has {vocabulary} tokens")
