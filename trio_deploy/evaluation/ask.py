"""Ask every configuration every question and store the answers, so that a run can be resumed.

The output folder holds answers/*.jsonl, one file per configuration and one line per answer, and
bundles/, the exported bundles. A file's name is a checksum of what answers (content of the model,
options it runs with, schedule), and each line has a checksum of what was asked (prompt and
pictures): if one of these changes, the question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import Bundles, Configuration
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.statistics import divergence, top_tokens
from trio_deploy.files import sha256_of
from trio_deploy.pipeline.pipeline import Pipeline
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
    """

    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    dtype: str | None = None
    batch: int = 16
    max_new_tokens: int = 128
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise TrioError(f"a batch has 1 request or more, not {self.batch}")


@dataclass(frozen=True)
class Answer:
    """One answer of one configuration.

    Attributes:
        score: 0 to 1; None if the question has no reference.
        divergence: KL of the first token's distribution from the unpruned model's, in nats.
        agrees: whether the answer equals the unpruned model's.
    """

    text: str
    score: float | None
    divergence: float
    agrees: bool


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
    ) -> None:
        """Arguments as in `evaluate`."""
        options = options or AskOptions()
        self.questions = list(questions)
        self._asked = checksums(self.questions)
        self._scorer = scorer
        self._out = out / ANSWERS
        self._batch = options.batch
        self._limit = options.max_new_tokens
        self._progress = options.progress

    def reference(self, configuration: Configuration, bundles: Bundles) -> list[First]:
        """The unpruned model's answers."""
        lines, _ = self._lines(configuration, 0, bundles, _first_line)
        return [
            First(
                line["text"],
                np.array(line["first"]["tokens"], np.int64),
                np.array(line["first"]["logprobs"], np.float64),
            )
            for line in lines
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

        runs, seconds = [], 0.0
        for seed in configuration.seeds:
            lines, spent = self._lines(configuration, seed, bundles, line)
            seconds += spent
            runs.append(
                [
                    Answer(
                        entry["text"],
                        None
                        if question.reference is None
                        else self._scorer(entry["text"], question.reference),
                        entry.get("kl", 0.0),  # the unpruned model has none from itself
                        entry["text"].strip() == expected[question.id].text.strip(),
                    )
                    for question, entry in zip(self.questions, lines, strict=True)
                ]
            )
        return Measured(configuration, runs, seconds)

    def _lines(
        self,
        configuration: Configuration,
        seed: int,
        bundles: Bundles,
        more: Callable[[Question, Generation], dict[str, Any]],
    ) -> tuple[list[dict[str, Any]], float]:
        """One line per question, in order, and the seconds spent on those asked now."""
        log = AnswerLog(self._out / f"{bundles.identity(configuration)}-{seed}.jsonl")
        asked = {q.id: q for q in self.questions}
        known = {e["id"]: e for e in log.entries if same(e, self._asked, self._limit)}
        missing = [q for q in self.questions if q.id not in known]
        seconds = 0.0
        if missing:
            pipeline = bundles.pipeline(configuration)
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
                        entry = {
                            "id": question.id,
                            "asked": self._asked[question.id],
                            "limit": self._limit,
                            "text": generation.text,
                            **more(question, generation),
                        }
                        log.add(entry)
                        known[question.id] = entry
                    bar.update(len(group))
        return [known[q.id] for q in self.questions], seconds

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


class AnswerLog:
    """A JSON Lines file to append to; a line cut short by a crash is dropped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.entries: list[dict[str, Any]] = []
        if not file.is_file():
            return
        whole = 0
        content = file.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.entries.append(entry)
            whole += len(line)
        if whole < len(content):
            with file.open("r+b") as stream:
                stream.truncate(whole)

    def __enter__(self) -> AnswerLog:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._file.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, entry: dict[str, Any]) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._stream.flush()


def _first_line(_: Question, generation: Generation) -> dict[str, Any]:
    tokens, logprobs = top_tokens(_logprobs(generation))
    return {"first": {"tokens": tokens.tolist(), "logprobs": np.round(logprobs, 6).tolist()}}


def _logprobs(generation: Generation) -> np.ndarray:
    assert generation.first_logits is not None
    return log_softmax(generation.first_logits)


def same(entry: dict[str, Any], asked: Mapping[str, str], limit: int) -> bool:
    """Whether a stored line belongs to a question as it is asked now; `asked`: see `checksums`."""
    return (
        entry["id"] in asked
        and entry.get("asked") == asked[entry["id"]]
        and entry.get("limit") == limit
    )


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
