"""Ask every configuration every question and store the answers, so that a run can be resumed.

The output folder holds answers/*.jsonl, one file per configuration and one line per answer, and
bundles/, the exported bundles. A file's name is a checksum of what answers (content of the model,
options it runs with, schedule), and each line has a checksum of what was asked (prompt and
pictures) and how the engines ran (`RanAs`): if one of these changes, the question is asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import UNPRUNED, Bundles, Configuration
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.statistics import divergence, top_tokens
from trio_deploy.files import sha256_of, write_remedy
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sampling import log_softmax

ANSWERS = "answers"


@dataclass(frozen=True)
class AskOptions:
    """How questions are asked.

    Attributes:
        runtime: how bundles are run; bundles of a model are exported for its target, or
            for the runtime's own.
        dtype: float type of exported bundles; None: the target's.
        batch: requests per batch.
        max_new_tokens: maximum length of an answer.
        progress: show progress bars.
        quantize: scheme of exported bundles; None: the recipe's, else the target's.
        selections: what their selections compute with; None: the same.
    """

    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    dtype: str | None = None
    batch: int = 16
    max_new_tokens: int = 128
    progress: bool = True
    quantize: str | None = None
    selections: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise TrioError(f"a batch has 1 request or more, not {self.batch}")


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What all stored lines have.

    Attributes:
        id: of the question; `asked`: its checksum; `limit`: maximum length of the answer.
        ran: how the engines ran that answered; None in files of earlier versions.
    """

    id: str
    asked: str
    limit: int
    ran: RanAs | None = None


class FirstToken(msgspec.Struct, frozen=True):
    """The likeliest first tokens and their log-probabilities, as of `top_tokens`."""

    tokens: list[int]
    logprobs: list[float]


class AnswerLine(Line, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One answer; the unpruned model's have `first`, and no `kl` from themselves.

    Attributes:
        kept: as of `Answer`; None: not recorded.
    """

    text: str
    kl: float = 0.0
    first: FirstToken | None = None
    kept: list[list[int]] | None = None


_Line = TypeVar("_Line", bound=Line)


@dataclass(frozen=True)
class Answer:
    """One answer of one configuration.

    Attributes:
        score: 0 to 1; None if the question has no reference.
        divergence: KL of the first token's distribution from the unpruned model's, in nats.
        agrees: whether the answer equals the unpruned model's.
        kept: for each pruning point, the kept visual tokens, numbered from 0; empty if they were
            not recorded, or nothing is pruned.
    """

    text: str
    score: float | None
    divergence: float
    agrees: bool
    kept: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class First:
    """The unpruned model's answer, and its first token's distribution (see `top_tokens`)."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass
class Measured:
    """All answers of a configuration: per seed, in the order of the questions."""

    configuration: Configuration
    answers: list[list[Answer]]
    seconds: float
    ran_as: RanAs | None = None

    def scores(self) -> np.ndarray:
        """Scores, float64 [n], averaged over the seeds; 0 if a question has no reference."""
        return np.mean([[a.score or 0.0 for a in run] for run in self.answers], axis=0)

    def agreement(self) -> np.ndarray:
        """1 for answers equal to the unpruned model's, float64 [n], averaged over the seeds."""
        return np.mean([[float(a.agrees) for a in run] for run in self.answers], axis=0)

    def divergence(self) -> np.ndarray:
        """KL of the first token in nats, float64 [n], averaged over the seeds."""
        return np.mean([[a.divergence for a in run] for run in self.answers], axis=0)


class Examiner:
    """Ask a fixed set of questions.

    >>> examiner = Examiner(questions, get_scorer("exact"), Path("out"))
    >>> reference = examiner.reference(unpruned(source), bundles)
    >>> measured = examiner.measure(configuration, bundles, reference)
    """

    def __init__(
        self,
        questions: Sequence[Question],
        scorer: Callable[[str, Any], float],
        out: Path,
        options: AskOptions | None = None,
        *,
        kept: bool = False,
    ) -> None:
        """Arguments as in `evaluate`; `kept`: record which visual tokens are kept."""
        options = options or AskOptions()
        self.questions = list(questions)
        self._asked = checksums(self.questions)
        self._scorer = scorer
        self._out = out / ANSWERS
        self._batch = options.batch
        self._limit = options.max_new_tokens
        self._progress = options.progress
        self._kept = kept

    def reference(self, configuration: Configuration, bundles: Bundles) -> list[First]:
        """The unpruned model's answers."""
        lines, _ = self._lines(configuration, 0, bundles, _first_line)
        firsts = [line.first or FirstToken([], []) for line in lines]
        return [
            First(line.text, np.array(each.tokens, np.int64), np.array(each.logprobs, np.float64))
            for line, each in zip(lines, firsts, strict=True)
        ]

    def measure(
        self, configuration: Configuration, bundles: Bundles, reference: Sequence[First]
    ) -> Measured:
        """Answers of a configuration; asks only what has not been asked yet."""
        expected = {q.id: first for q, first in zip(self.questions, reference, strict=True)}

        def line(question: Question, generation: Generation) -> dict[str, Any]:
            first = expected[question.id]
            logprobs = _logprobs(generation)
            return {"kl": divergence(first.tokens, first.logprobs, logprobs)}

        runs, seconds, ran_as = [], 0.0, None
        for seed in configuration.seeds:
            lines, spent = self._lines(configuration, seed, bundles, line)
            seconds += spent
            ran_as = lines[0].ran if lines else None
            runs.append(
                [
                    Answer(
                        entry.text,
                        None
                        if question.reference is None
                        else self._scorer(entry.text, question.reference),
                        entry.kl,
                        entry.text.strip() == expected[question.id].text.strip(),
                        entry.kept or (),
                    )
                    for question, entry in zip(self.questions, lines, strict=True)
                ]
            )
        return Measured(configuration, runs, seconds, ran_as)

    def _lines(
        self,
        configuration: Configuration,
        seed: int,
        bundles: Bundles,
        more: Callable[[Question, Generation], dict[str, Any]],
    ) -> tuple[list[AnswerLine], float]:
        """One line per question, in order, and the seconds spent on those asked now.

        All of them ran alike: where the engines run otherwise than those that answered before,
        everything is asked again.
        """
        log = AnswerLog(self._out / f"{bundles.identity(configuration)}-{seed}.jsonl", AnswerLine)
        asked = {q.id: q for q in self.questions}
        ran = log.entries[-1].ran if log.entries else None
        known = self._answered(log, ran)
        seconds = 0.0
        if len(known) < len(asked):
            pipeline = bundles.pipeline(configuration)
            ran = pipeline.ran_as
            known = self._answered(log, ran)
            missing = [q for q in self.questions if q.id not in known]
            label = configuration.name + (f" #{seed}" if len(configuration.seeds) > 1 else "")
            bar = tqdm(
                total=len(asked),
                initial=len(known),
                desc=f"{label} {configuration.budget:.1%}",
                unit="q",
                disable=None if self._progress else True,
            )
            with log, bar:
                for group in batches(missing, self._batch):
                    start = time.perf_counter()
                    generations = self._ask(pipeline, configuration, seed, group)
                    seconds += time.perf_counter() - start
                    for question, generation in zip(group, generations, strict=True):
                        entry = AnswerLine(
                            id=question.id,
                            asked=self._asked[question.id],
                            limit=self._limit,
                            ran=ran,
                            text=generation.text,
                            kept=_kept(configuration, generation) if self._kept else None,
                            **more(question, generation),
                        )
                        log.add(entry)
                        known[question.id] = entry
                    bar.update(len(group))
        return [known[q.id] for q in self.questions], seconds

    def _answered(self, log: AnswerLog[AnswerLine], ran: RanAs | None) -> dict[str, AnswerLine]:
        """Stored lines of the questions as they are asked now, by id, of engines that ran so."""
        return {
            entry.id: entry
            for entry in log.entries
            if entry.ran == ran
            and same(entry, self._asked, self._limit)
            and not (self._kept and entry.kept is None)
        }

    def _ask(
        self,
        pipeline: Pipeline,
        configuration: Configuration,
        seed: int,
        questions: Sequence[Question],
    ) -> list[Generation]:
        budget = configuration.budget if configuration.schedule is None else None
        return pipeline.generate_batch(
            [
                Request(
                    question.prompt,
                    [] if configuration.blind else list(question.images),
                    max_new_tokens=self._limit,
                    budget=budget,
                    seed=zlib.crc32(f"{seed}:{question.id}".encode()),
                    bundle_sampling=False,
                )
                for question in questions
            ]
        )


class AnswerLog(Generic[_Line]):
    """A JSON Lines file to append to; a line cut short by a crash is dropped.

    Attributes:
        entries: lines that the file had when it was opened.
    """

    def __init__(self, file: Path, kind: type[_Line]) -> None:
        """Read a file, if there is one.

        Args:
            kind: what a line holds.

        Raises:
            TrioError: a line is damaged.
        """
        self._file = file
        self.entries: list[_Line] = []
        if not file.is_file():
            return
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        decoder = msgspec.json.Decoder(kind)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                self.entries.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
                raise TrioError(
                    f"line {number} of {file} is damaged ({error}): delete the file, and what it "
                    "held is asked again"
                ) from None
        if whole < len(content):
            with file.open("r+b") as stream:
                stream.truncate(whole)

    def __enter__(self) -> AnswerLog[_Line]:
        with self._named():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._file.open("ab")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a write that failed, closing tries to write the rest and fails again.
        with contextlib.suppress(OSError) if kind else self._named():
            self._stream.close()

    def add(self, entry: _Line) -> None:
        """Append a line.

        Raises:
            TrioError: it cannot be written; names the file.
        """
        with self._named():
            self._stream.write(msgspec.json.encode(entry) + b"\n")
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrioError(
                f"cannot write {self._file} ({error.strerror}): {write_remedy(error)}; the same "
                "command then goes on where it stopped"
            ) from error


def _first_line(_: Question, generation: Generation) -> dict[str, Any]:
    tokens, logprobs = top_tokens(_logprobs(generation))
    return {"first": FirstToken(tokens.tolist(), np.round(logprobs, 6).tolist())}


def _kept(configuration: Configuration, generation: Generation) -> list[list[int]]:
    if configuration.name == UNPRUNED:
        return []
    return [tokens.tolist() for tokens in generation.kept_visual]


def _logprobs(generation: Generation) -> np.ndarray:
    assert generation.first_logits is not None
    return log_softmax(generation.first_logits)


def same(entry: Line, asked: Mapping[str, str], limit: int) -> bool:
    """Whether a stored line belongs to a question as it is asked now; `asked`: see `checksums`."""
    return entry.id in asked and entry.asked == asked[entry.id] and entry.limit == limit


def checksums(questions: Sequence[Question]) -> dict[str, str]:
    """Checksum of prompt and picture contents by the question's id.

    Raises:
        TrioError: a picture cannot be read.
    """
    known: dict[int, str] = {}

    def of(picture: Image.Image | Path) -> str:
        if id(picture) not in known:
            if isinstance(picture, Path):
                try:
                    known[id(picture)] = sha256_of(picture)
                except OSError as error:
                    raise TrioError(
                        f"the picture {picture} cannot be read ({error.strerror})"
                    ) from None
            else:
                digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
                digest.update(picture.tobytes())
                known[id(picture)] = digest.hexdigest()
        return known[id(picture)]

    return {
        q.id: hashlib.sha256(json.dumps([q.prompt, *map(of, q.images)]).encode()).hexdigest()[:16]
        for q in questions
    }


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Groups of `size` with questions about one picture together: it is then encoded once."""
    order: dict[str, list[Question]] = {}
    for question in questions:
        order.setdefault(question.picture, []).append(question)
    flat = [question for group in order.values() for question in group]
    for start in range(0, len(flat), size):
        yield flat[start : start + size]
