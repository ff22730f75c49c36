"""Choose the next token, turn tokens into text as they come, and stop at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import NoChoice, TrioError
from trio_deploy.pipeline.grammar import Grammar


class Sampler:
    """Chooses tokens for one request."""

    def __init__(
        self,
        options: SamplingOptions,
        prompt: Sequence[int] | np.ndarray = (),
        ends: Collection[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Choose as the options say; None has no effect.

        Args:
            prompt: token ids [S] of the prompt before pruning, the image token at visual places.
            ends: tokens that end an answer.
            grammar: what may come next.
        """
        self._grammar = grammar
        self._options = options
        self._alters_logits = options.alters_logits
        self._prompt_length = len(prompt)
        self._tokens = np.array(prompt, np.int64)
        self._ends = tuple(ends)
        self._generator = np.random.default_rng(options.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token for logits [V] of any float type.

        Raises:
            TrioError: the logits are not numbers (an overflow in half precision, for example).
            NoChoice: the options leave no token to choose.
        """
        token = int(np.argmax(logits))
        if not np.isfinite(logits[token]):
            raise TrioError(
                "the model produced logits that are not finite; a float16 bundle may have "
                "overflowed: export it with --dtype float32"
            )
        if self._alters_logits:
            logits = process(logits, self._tokens, self._prompt_length, self._ends, self._options)
            if not np.max(logits) < np.inf:  # NaN, too
                raise NoChoice(
                    "repetition_penalty, presence_penalty, frequency_penalty and logit_bias make "
                    "logits infinite: ask for less"
                )
        if self._grammar is not None:
            logits = self._grammar.mask(logits)
        if self._alters_logits or self._grammar is not None:
            token = int(np.argmax(logits))
            if logits[token] == -np.inf:
                raise NoChoice(
                    "suppress_tokens, bad_words, no_repeat_ngram_size, min_new_tokens and the form "
                    "of the answer together leave no token to choose: ask for less"
                )
        if not self._options.greedy:
            token = draw(warp(logits.astype(np.float64), self._options), self._generator)
        if self._grammar is not None and token not in self._ends:
            self._grammar.take(token)
        if self._alters_logits:  # which alone reads them
            self._tokens = np.append(self._tokens, token)
        return token


def process(
    logits: np.ndarray,
    tokens: np.ndarray,
    prompt_length: int,
    ends: Sequence[int],
    options: SamplingOptions,
) -> np.ndarray:
    """Apply penalties and biases, then bans, which set logits to -inf, in transformers' order.

    Args:
        logits: float [V].
        tokens: int64 [S + n], the prompt and the n tokens of the answer so far.
        ends: tokens that end an answer.

    Returns:
        float64 [V].
    """
    scores, answer = logits.astype(np.float64), tokens[prompt_length:]
    if options.repetition_penalty not in (None, 1.0):
        scores = penalize_repetition(scores, tokens, options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        scores = penalize_counts(
            scores, answer, options.presence_penalty or 0.0, options.frequency_penalty or 0.0
        )
    if options.logit_bias:
        scores = add_bias(scores, options.logit_bias)
    banned = [*(options.suppress_tokens or ())]
    banned += repeated_ngram_ends(tokens, options.no_repeat_ngram_size or 0)
    banned += bad_word_ends(tokens, options.bad_words_ids or (), ends)
    if len(answer) < (options.min_new_tokens or 0):
        banned += ends
    if not len(answer):
        banned += options.begin_suppress_tokens or ()
    scores[_within(banned, len(scores))] = -np.inf
    return scores


def warp(scores: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Divide float64 [V] by the temperature, then keep likely tokens, in transformers' order."""
    # Subtracted first: a tiny temperature may then give -inf, but never inf - inf.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / (options.temperature or 1.0)
    scores = keep_top_k(scores, options.top_k or 0)
    scores = keep_top_p(scores, 1.0 if options.top_p is None else options.top_p)
    return keep_min_p(scores, options.min_p or 0.0)


def draw(scores: np.ndarray, generator: np.random.Generator) -> int:
    """Draw a token from the softmax of float64 [V], by one number of the generator."""
    probabilities = softmax(scores)
    cumulative = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulative, generator.random(), side="right"))
    return min(place, int(np.flatnonzero(probabilities)[-1]))  # the sum may be just below 1


def penalize_repetition(scores: np.ndarray, tokens: np.ndarray, penalty: float) -> np.ndarray:
    """Divide positive, multiply negative logits of the given tokens (arXiv 1909.05858)."""
    seen = _within(tokens, len(scores))
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def penalize_counts(
    scores: np.ndarray, answer: np.ndarray, presence: float, frequency: float
) -> np.ndarray:
    """Subtract presence · [n > 0] + frequency · n for tokens that are n times in the answer.

    The formula is that of OpenAI's API reference.
    """
    counts = np.bincount(answer, minlength=len(scores))[: len(scores)]
    return scores - presence * (counts > 0) - frequency * counts


def add_bias(scores: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Add to the logits of tokens; those that the model has no logit for are left out."""
    scores = scores.copy()
    for token, value in bias.items():
        if token < len(scores):
            scores[token] += value
    return scores


def repeated_ngram_ends(tokens: np.ndarray, size: int) -> list[int]:
    """Tokens that would repeat `size` tokens in a row; none for size 0."""
    if not 0 < size <= len(tokens):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    last = tokens[len(tokens) + 1 - size :]
    repeats = (windows[:, :-1] == last).all(axis=1)
    return windows[repeats, -1].tolist()


def bad_word_ends(
    tokens: np.ndarray, words: Sequence[Sequence[int]], ends: Sequence[int]
) -> list[int]:
    """Last tokens of the words, given as token ids, whose other tokens have just come.

    A word that is an end token alone does not count, as in transformers.
    """
    found = []
    for *first, last in words:
        begun = first == tokens[len(tokens) - len(first) :].tolist()
        if begun and not (last in ends and not first):
            found.append(last)
    return found


def keep_top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` greatest and those equal to the last of them, others -inf; 0: all."""
    if not 0 < count < len(scores):
        return scores
    return np.where(scores < np.partition(scores, -count)[-count], -np.inf, scores)


def keep_top_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the smallest set of tokens whose probabilities reach a sum, others -inf."""
    if share >= 1.0:
        return scores
    probabilities = softmax(scores)
    order = np.argsort(-probabilities, kind="stable")
    # Everything before the point where the sum is reached, and that token too.
    size = int(np.searchsorted(np.cumsum(probabilities[order]), share)) + 1
    kept = np.full_like(scores, -np.inf)
    kept[order[:size]] = scores[order[:size]]
    return kept


def keep_min_p(scores: np.ndarray, fraction: float) -> np.ndarray:
    """Keep tokens at least `fraction` as likely as the most likely one, others -inf."""
    if fraction == 0.0:
        return scores
    probabilities = softmax(scores)
    return np.where(probabilities < fraction * probabilities.max(), -np.inf, scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities that float64 [V] stand for."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _within(tokens: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """The distinct ids below `size`: an embedding may have more rows than the model has logits."""
    ids = np.unique(np.asarray(tokens, np.int64))
    return ids[ids < size]


class Forced:
    """Takes given tokens instead of choosing, and records their probabilities.

    Attributes:
        logprobs: natural logarithms of the probabilities of the tokens so far.
        greedy: whether each was the most likely.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)
        self.logprobs: list[float] = []
        self.greedy: list[bool] = []

    def __call__(self, logits: np.ndarray) -> int:
        """The next of the given tokens, whatever the logits [V] say."""
        token = self._tokens[len(self.logprobs)]
        self.logprobs.append(float(log_softmax(logits)[token]))
        self.greedy.append(int(np.argmax(logits)) == token)
        return token


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token of an answer was, by the logits that no option has changed.

    Attributes:
        logprob: natural logarithm of its probability.
        top: the most likely tokens and theirs, the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: np.ndarray, token: int, top: int) -> TokenLogprobs:
        """Of a token that was chosen from logits [V], with so many most likely ones."""
        values = log_softmax(logits)
        first = np.argpartition(-values, min(top, len(values) - 1))[:top]
        first = first[np.argsort(-values[first], kind="stable")]
        return cls(token, float(values[token]), tuple((int(i), float(values[i])) for i in first))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities that logits [..., V] stand for, float64."""
    behind = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return behind - np.log(np.exp(behind).sum(axis=-1, keepdims=True))


class Detokenizer:
    """Turns a growing list of tokens into text, piece by piece.

    A piece is the difference between decoding a short window with and without the new token: the
    window carries the context that sentencepiece's leading spaces depend on, and text that ends in
    an unfinished character (U+FFFD) waits for its next byte.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._done = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, now = self._window()
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The remaining text, including an unfinished character."""
        before, now = self._window()
        self._start = self._done = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        before = self._decode(self._ids[self._start : self._done])
        return before, self._decode(self._ids[self._start :])


class StopScanner:
    """Cuts text at the first stop string, withholding what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise TrioError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._withheld = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a stop string, nothing more."""
        if self.stopped:
            return ""
        self._withheld += text
        found = [at for stop in self._stops if (at := self._withheld.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._withheld) - self._possible_stop())

    def flush(self) -> str:
        """The withheld text, once no more can come."""
        return "" if self.stopped else self._release(len(self._withheld))

    def _release(self, count: int) -> str:
        text, self._withheld = self._withheld[:count], self._withheld[count:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest tail that begins a stop string."""
        for size in range(len(self._withheld), 0, -1):
            if any(stop.startswith(self._withheld[-size:]) for stop in self._stops):
                return size
        return 0
