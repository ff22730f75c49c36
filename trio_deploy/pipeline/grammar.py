"""Answers of a given form: a grammar says at each token which may come next.

The grammar is llguidance's, which reads JSON schemas and regular expressions and needs a tokenizer
whose tokens have a form in bytes.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trio_deploy.errors import NoChoice, TrioError

_MAX_KEPT = 64  # compiled grammars
_LIMITS: Any = {  # so that no schema takes much longer than a second, or 100 MB, to compile
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}

#: What is added to the logits of eight tokens, by the byte whose bits say which of them may come.
_ADDED = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 0.0, -np.inf).astype(np.float32)


@dataclass(frozen=True)
class Structure:
    """The form of an answer; one of the three is given.

    Attributes:
        schema: text of a JSON schema that the answer keeps, as compact JSON.
        regex: regular expression that the answer matches as a whole.
        choices: texts of which the answer is one.
        name: what errors call it: the field by which whoever asks has given it.
    """

    schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    name: str = field(default="structure", compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of what was given."""
        texts = (self.schema or "", self.regex or "", *self.choices)
        return sum(len(text.encode(errors="replace")) for text in texts)


class Grammar:
    """What may come next in one answer."""

    def __init__(self, matcher: Any, name: str) -> None:
        """Use `GrammarCompiler.grammar`."""
        self._matcher = matcher
        self._name = name
        self._added = np.empty((0, 8), np.float32)  # kept, since new memory costs more than the sum

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Logits [V] with -inf for what may not come next; an end token only where it may end.

        Args:
            logits: finite or -inf, of any float type.

        Returns:
            float32 at least, valid until the next call.

        Raises:
            NoChoice: the grammar is too complex to go on.
        """
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        if len(self._added) != len(allowed):
            self._added = np.empty((len(allowed), 8), np.float32)
        added = _ADDED.take(allowed, axis=0, out=self._added, mode="clip").reshape(-1)
        added = added[: len(logits)]
        return np.add(logits, added, out=added) if logits.dtype == added.dtype else logits + added

    def take(self, token: int) -> None:
        """Go on after a token.

        Raises:
            NoChoice: it may not come here.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise NoChoice(f"{self._name}: {_one_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Grammars for the tokens of one bundle, the last ones kept; for any thread."""

    def __init__(
        self, tokenizer: Callable[[], str], vocabulary: int, end_tokens: Sequence[int]
    ) -> None:
        """Args:
        tokenizer: reads tokenizer.json, once a grammar is asked for.
        vocabulary: logits V, which may be more than the tokenizer's tokens.
        """
        self._read_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._kept: OrderedDict[Structure, Any] = OrderedDict()

    def grammar(self, structure: Structure) -> Grammar:
        """A grammar at its beginning.

        Raises:
            TrioError: the structure is none, is too complex, or asks for what is not supported; or
                the bundle's tokens have no form in bytes.
        """
        with self._lock:
            matcher = self._kept.pop(structure, None)
            if matcher is None:
                matcher = self._compile(structure)
            self._kept[structure] = matcher
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return Grammar(matcher.deep_copy(), structure.name)

    def _compile(self, structure: Structure) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokens is None:
            self._tokens = self._open(structure.name)
        try:
            source = _source(structure)
        except ValueError as error:
            raise TrioError(f"{structure.name}: {_one_line(str(error))}") from None
        matcher = LLMatcher(self._tokens, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise TrioError(f"{structure.name}: {_one_line(matcher.get_error())}")
        return matcher

    def _open(self, name: str) -> Any:
        from llguidance import LLTokenizer

        if not self._end_tokens:
            raise TrioError(
                f"{name}: this bundle has no end token, so no answer of a form could end"
            )
        try:
            return LLTokenizer(
                self._read_tokenizer(), n_vocab=self._vocabulary, eos_token=self._end_tokens
            )
        except ValueError as error:
            raise TrioError(
                f"{name}: this bundle's tokenizer has no byte form, which structured "
                f"output needs ({_one_line(str(error))})"
            ) from None


def _source(structure: Structure) -> str:
    """The grammar as llguidance reads it.

    Raises:
        ValueError: the schema is no JSON.
    """
    from llguidance import LLMatcher

    if structure.schema is not None:
        # White space between tokens would let a small model fill its answer with it.
        compact: Any = {"whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(structure.schema, overrides=compact)
    if structure.regex is not None:
        return LLMatcher.grammar_from_regex(structure.regex)

    choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in structure.choices)
    return LLMatcher.grammar_from_lark(f"start: {choices}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
