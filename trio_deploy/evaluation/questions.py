"""Questions: about generated scenes, or from a file in LLaVA's format with its annotations."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.files import brief, is_file, is_folder, parse_json, read_json, read_text

FAMILIES = ("busy", "smooth")
SPLITS = {"test": scenes.TEST_SEEDS, "tuning": scenes.TUNING_SEEDS}

SCENE_TOKENS = 8  # maximum length of an answer: the longest about a scene has 5
FILE_TOKENS = 128

_LETTERS = "ABCDE"
_PLACEHOLDER = "<image>"
_EXAMPLE = '{"question_id": 7, "image": "cat.jpg", "text": "What is this?"}'
_AGAIN_DOWNLOAD = "download it again"
# VQAv2's annotations of its 214,354 questions are 372 MB with 9.4 million values.
MAX_QUESTIONS = 1 << 29
_MAX_VALUES = 30_000_000
_AGAIN = " #"  # before the number of a question whose id others had before


@dataclass(frozen=True)
class Question:
    """One question about pictures.

    Attributes:
        id: unique in its set; answers are resumed and compared by it.
        images: pictures for the pipeline; requests with the same object share its preparation.
        picture: name of the pictures, for statistics: questions about one are not independent.
        kind: kind of question; results are also reported per kind.
        reference: what the scorer compares with; None if the answer is not known.
    """

    id: str
    prompt: str
    images: tuple[Image.Image | Path, ...]
    picture: str
    kind: str
    reference: Any = None


@dataclass(frozen=True)
class QuestionSet:
    """Questions with how they are answered and scored.

    Attributes:
        scorer: see `scorers`; questions without a reference count for agreement and KL alone.
        data: description of the questions, for the report.
        max_new_tokens: maximum length of an answer.
    """

    questions: Sequence[Question]
    scorer: str = "exact"
    data: str = ""
    max_new_tokens: int = FILE_TOKENS


def question_set(questions: int | str | os.PathLike[str] | QuestionSet) -> QuestionSet:
    """Questions about that many scenes of the test split, of a file, or as they are.

    Raises:
        TrioError: as `scene_questions` and `read_questions`.
    """
    if isinstance(questions, QuestionSet):
        return questions
    if isinstance(questions, int):
        return scene_set(questions)
    file = Path(questions)
    return QuestionSet(read_questions(file), data=file.name)


def scene_set(
    count: int, *, family: str = "busy", split: str = "test", first: int = scenes.FIRST_SCENE
) -> QuestionSet:
    """Questions about generated scenes, as `scene_questions` has them.

    Raises:
        TrioError: as `scene_questions`.
    """
    found = scene_questions(count, family=family, split=split, first=first)
    data = f"{family} scenes {first} to {first + count - 1} of the {split} seeds"
    return QuestionSet(found, data=data, max_new_tokens=SCENE_TOKENS)


def scene_questions(
    count: int,
    *,
    family: str = "busy",
    split: str = "test",
    first: int = scenes.FIRST_SCENE,
    each: int = 16,
) -> list[Question]:
    """Questions about generated scenes, `each` per scene; the same for the same arguments.

    Args:
        count: number of scenes.
        family: `busy`, or `smooth`: few objects on plain ground, where diversity alone finds them.
        split: `test` or `tuning`, whose seeds are disjoint and disjoint from training's.
        first: the first scene's place in the split.

    Raises:
        TrioError: an unknown family or split, or more scenes than the split has.
    """
    if family not in FAMILIES:
        raise TrioError(f"unknown family of scenes {family!r}: choose {' or '.join(FAMILIES)}")
    if split not in SPLITS:
        raise TrioError(f"unknown split {split!r}: choose {' or '.join(SPLITS)}")
    seeds = SPLITS[split]
    if count < 1:
        raise TrioError(f"{count} scenes hold no question: ask for 1 or more")
    if first < 0 or first + count > len(seeds):
        raise TrioError(
            f"there are no scenes {first} to {first + count - 1} of the {split} split, whose "
            f"{len(seeds)} are counted from 0"
        )
    return [
        Question(
            f"{family}-{scene.seed}-{number}",
            question.text,
            (scene.image,),
            f"{family}-{scene.seed}",
            question.kind,
            question.answer,
        )
        for seed in seeds[first : first + count]
        for scene in [scenes.generate(seed, family, each)]  # type: ignore[arg-type]
        for number, question in enumerate(scene.questions)
    ]


def read_questions(
    file: Path, images: Path | None = None, *, append: str = "", limit: int | None = None
) -> list[Question]:
    """Read a question file of LLaVA's evaluation.

    Either JSON Lines with `question_id`, `text`, `image` (a name, or a list of them) and, where
    known, `category` and `answer`, `answers` or `label`; or a JSON list with `id`, `image` and
    `conversations`, whose first `value` is asked (ScienceQA).

    Args:
        images: the folder that picture names are relative to.
        append: line to add to every question.
        limit: maximum number of questions.

    Raises:
        TrioError: the file cannot be read, lacks something, or names a picture that is not there;
            the error says where in the file.
    """
    if limit is not None and limit < 1:
        raise TrioError(f"a limit of {limit} leaves no question: it must be 1 or more")
    if images is not None and not is_folder(images):
        raise TrioError(f"--images {images} is not a folder: pass the one with the pictures")
    questions = []
    for where, entry in _entries(file)[:limit]:
        if not isinstance(entry, dict):
            raise TrioError(f"{where}: it must be an object, not {brief(entry)}; write {_EXAMPLE}")
        name = entry.get("question_id", entry.get("id"))
        text = _asked(entry)
        if not isinstance(name, (str, int, float)) or text is None:
            raise TrioError(
                f"{where}: it needs question_id and text (or id and conversations), as in "
                f"{_EXAMPLE}"
            )
        named = entry.get("image")
        pictures = named if isinstance(named, list) else [] if named in (None, "") else [named]
        paths = tuple(_picture(where, images or file.parent, picture) for picture in pictures)
        reference = next((entry[k] for k in ("answers", "answer", "label") if k in entry), None)
        default = "image" if paths else "text"
        questions.append(
            Question(
                str(name),
                f"{text}\n{append}" if append else text,
                paths,
                "|".join(map(str, pictures)) or str(name),
                str(entry.get("category") or default),
                reference,
            )
        )
    if not questions:
        raise TrioError(f"{file} holds no questions: write one per line, {_EXAMPLE}")
    # A batch prepares a picture once if its questions pass the same object.
    shared: dict[tuple[Image.Image | Path, ...], tuple[Image.Image | Path, ...]] = {}
    seen: Counter[str] = Counter()
    out = []
    for question in questions:
        seen[question.id] += 1  # LLaVA's TextVQA file gives all questions of a picture one id
        again = f"{_AGAIN}{seen[question.id]}" if seen[question.id] > 1 else ""
        same = shared.setdefault(question.images, question.images)
        out.append(replace(question, id=question.id + again, images=same))
    return out


def _entries(file: Path) -> list[tuple[str, Any]]:
    """Entries of the file, each with its place in words."""
    lines = f"pass a JSON Lines file of lines like {_EXAMPLE}"
    try:
        text = read_text(file, lines, limit=MAX_QUESTIONS)
    except FileNotFoundError:
        raise TrioError(f"there are no questions at {file}: {lines}") from None
    if text.lstrip().startswith("["):
        entries = parse_json(text, str(file), lines, values=_MAX_VALUES)
        return [(f"{file}, question {number}", one) for number, one in enumerate(entries, 1)]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            found.append((where, parse_json(line, where, f"write a question, {_EXAMPLE}")))
    return found


def _asked(entry: dict[str, Any]) -> str | None:
    text = entry.get("text")
    if text is None and entry.get("conversations"):
        turns = entry["conversations"]
        first = turns[0] if isinstance(turns, list) else None
        text = first.get("value") if isinstance(first, dict) else None
    return text.replace(_PLACEHOLDER, "").strip() if isinstance(text, str) else None


def _picture(where: str, folder: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise TrioError(f"{where}: image must be a name or a list of names, not {brief(name)}")
    path = folder / name
    if not is_file(path):
        raise TrioError(
            f"{where}: there is no picture {path}: put it there (trio eval and trio tune take "
            "another folder by --images)"
        )
    return path


def annotate(questions: Sequence[Question], scorer: str, source: Path) -> list[Question]:
    """Add references from a benchmark's own annotation file.

    - `pope`: a folder with coco_pope_{category}.json, whose lines follow the questions of the
      category in order, or one such file.
    - `textvqa`: TextVQA_0.5.1_val.json; joined by image and question, as LLaVA does.
    - `scienceqa`: problems.json, joined by id.
    - `vqav2`: v2_mscoco_val2014_annotations.json, joined by question_id.

    Raises:
        TrioError: the annotations are not of that form, or lack a question.
    """
    readers = {"pope": _pope, "textvqa": _textvqa, "scienceqa": _scienceqa, "vqav2": _vqav2}
    if scorer not in readers:
        raise TrioError(
            f"the scorer {scorer} has no annotation file: put `answer` into the question file, or "
            f"choose {', '.join(readers)}"
        )
    try:
        found = readers[scorer](questions, source)
    except OSError as error:
        raise TrioError(
            f"the annotations {error.filename or source} cannot be read ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TrioError(
            f"{source} does not hold {scorer}'s annotations of these questions: "
            f"{type(error).__name__} {error}"
        ) from None
    return [replace(q, reference=r) for q, r in zip(questions, found, strict=True)]


def _pope(questions: Sequence[Question], source: Path) -> list[Any]:
    labels: dict[str, list[str]] = {}
    for category in {q.kind for q in questions}:
        file = source / f"coco_pope_{category}.json" if is_folder(source) else source
        lines = read_text(file, _AGAIN_DOWNLOAD, limit=MAX_QUESTIONS).splitlines()
        labels[category] = [
            parse_json(line, str(file), _AGAIN_DOWNLOAD)["label"] for line in lines if line.strip()
        ]
    taken = dict.fromkeys(labels, 0)
    found = []
    for question in questions:
        key = question.kind if is_folder(source) else next(iter(labels))
        found.append(labels[key][taken[key]])
        taken[key] += 1
    return found


def _textvqa(questions: Sequence[Question], source: Path) -> list[Any]:
    data = _annotations(source)["data"]
    known = {(str(a["image_id"]), a["question"].lower()): a["answers"] for a in data}
    return [known[(q.id.split(_AGAIN)[0], _plain(q.prompt).lower())] for q in questions]


def _annotations(source: Path) -> Any:
    return read_json(source, _AGAIN_DOWNLOAD, limit=MAX_QUESTIONS, values=_MAX_VALUES)


def _plain(prompt: str) -> str:
    """The question in a TextVQA prompt, which may carry OCR tokens and an instruction."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1) if found else prompt
    lines = prompt.split("\n")
    return lines[1] if len(lines) > 1 and lines[0].startswith("Reference OCR token:") else lines[0]


def _scienceqa(questions: Sequence[Question], source: Path) -> list[Any]:
    problems = _annotations(source)
    return [_LETTERS[int(problems[q.id]["answer"])] for q in questions]


def _vqav2(questions: Sequence[Question], source: Path) -> list[Any]:
    annotations = _annotations(source)["annotations"]
    known = {str(a["question_id"]): [x["answer"] for x in a["answers"]] for a in annotations}
    return [known[q.id] for q in questions]


def require_references(questions: Sequence[Question], score: Callable[[str, Any], float]) -> None:
    """Check every reference before anything is asked.

    Raises:
        TrioError: one does not fit the scorer; the error names the question.
    """
    for question in questions:
        if question.reference is not None:
            try:
                score("", question.reference)
            except TrioError as error:
                raise TrioError(f"question {question.id}: {error}") from None
