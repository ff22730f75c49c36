"""Scores of answers, 0 to 1, by the published protocol of each benchmark.

- `exact`: the answer is the reference, blanks at the ends aside.
- `vqav2`: Goyal et al. 2017 as in GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py
  (commit c4e6a0e): the answer's punctuation, number words, articles and contractions normalised;
  the annotators' answers by punctuation alone, and only where they differ from one another; the
  mean over the annotators of min(1, matches among the *others* / 3).
- `textvqa`: Singh et al. 2019 as M4C scores it (facebookresearch/mmf, EvalAIAnswerProcessor and
  TextVQAAccuracyEvaluator, which LLaVA's eval_textvqa.py calls): ten annotators, both sides
  normalised in full, commas and question marks gone first and possessives split.
- `scienceqa`: Lu et al. 2022 as in LLaVA's llava/eval/eval_science_qa.py (the copy in
  Beckschen/LLaVolta, commit c092f0a; NVlabs/VILA's differs in "B." alone): the answer is a letter,
  or begins with one ("B. "), or says "The answer is B." once and no more. Anything else is wrong.
- `pope`: Li et al. 2023 as in LLaVA's llava/eval/eval_pope.py (haotian-liu/LLaVA, commit 4241f08):
  of the first sentence, `no` if a word is No, no or not, else `yes`.

LLaVA stores answers without blanks at the ends; they are scored so here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from trio_deploy.errors import TrioError

_ANNOTATORS = 10
_ENOUGH = 3  # matching annotators for a score of 1
_LETTERS = "ABCDE"

# Both evaluators repair these, with one apostrophe missing at a time (wont, she'dve, shed've).
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_REPAIRED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as both have it
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_INNER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # maximum number removed: both pass a flag where `re.sub` takes a count


def _punctuation(text: str) -> str:
    """Drop marks next to a blank, replace others by one; drop all if a comma separates digits."""
    out = text
    grouped = _INNER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        gone = grouped or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes back in contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _without_breaks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _soft(answer: str, references: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3)."""
    matches = [answer == reference for reference in references]
    total = sum(matches)
    return sum(min(1.0, (total - own) / _ENOUGH) for own in matches) / len(references)


def vqav2(text: str, reference: Any) -> float:
    """Soft accuracy against the annotators' answers, a list of strings."""
    answers = _annotators("vqav2", reference)
    if len(set(answers)) > 1:
        answers = [_punctuation(answer) for answer in answers]
    return _soft(_words(_punctuation(_without_breaks(text))), answers)


def textvqa(text: str, reference: Any) -> float:
    """Soft accuracy against ten annotators' answers."""
    answers = _annotators("textvqa", reference)
    if len(answers) != _ANNOTATORS:
        raise TrioError(
            f"textvqa takes {_ANNOTATORS} annotators' answers per question, got {len(answers)}: "
            "use the scorer vqav2 or exact"
        )
    return _soft(_m4c(text), [_m4c(answer) for answer in answers])


def _m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_without_breaks(text)))


def _annotators(scorer: str, reference: Any) -> list[str]:
    if not isinstance(reference, list) or not reference:
        raise TrioError(
            f"{scorer} needs the list of annotators' answers of each question, not {reference!r}"
        )
    return [str(answer) for answer in reference]


def scienceqa(text: str, reference: Any) -> float:
    """1 if the option's letter is the reference's ("A" to "E"), else 0."""
    letter = str(reference).strip().upper()
    if len(letter) != 1 or letter not in _LETTERS:
        raise TrioError(f"scienceqa needs the right option's letter, A to E, not {reference!r:.60}")
    return float(option(text) == letter)


def option(text: str) -> str:
    """The letter that an answer chooses; "" if it chooses none."""
    text = text.strip()
    if len(text) == 1 and text in _LETTERS:
        return text
    if text[1:3] == ". " and text[0] in _LETTERS:
        return text[0]
    # As the protocol has it: any sign may follow the letter, but one must; and any letter counts.
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else ""


def pope(text: str, reference: Any) -> float:
    """1 if yes or no is the label, else 0."""
    label = str(reference).strip().lower()
    if label not in ("yes", "no"):
        raise TrioError(f"pope needs yes or no as each question's label, not {reference!r:.60}")
    return float(yes_or_no(text) == label)


def yes_or_no(text: str) -> str:
    """`yes` or `no` for an answer of any length."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def exact(text: str, reference: Any) -> float:
    """1 if the answer is the reference (or one of them), else 0."""
    known = reference if isinstance(reference, list) else [reference]
    if not known or any(isinstance(one, (dict, list)) or one is None for one in known):
        raise TrioError(f"exact needs an answer, or a list of them, not {reference!r:.60}")
    return float(text.strip() in {str(answer).strip() for answer in known})


SCORERS: dict[str, Callable[[str, Any], float]] = {
    "exact": exact,
    "pope": pope,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "vqav2": vqav2,
}


def get_scorer(name: str) -> Callable[[str, Any], float]:
    """The scorer of this name.

    Raises:
        TrioError: there is none.
    """
    if name not in SCORERS:
        raise TrioError(f"unknown scorer {name!r}: choose one of {', '.join(SCORERS)}")
    return SCORERS[name]


def pope_summary(said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of `yes`, and its frequency, as POPE reports them.

    LLaVA's eval_pope.py gives them per category; papers quote the mean F1 of the three.
    """
    both = sum(s == "yes" == label for s, label in zip(said, labels, strict=True))
    yes, true = said.count("yes"), labels.count("yes")
    precision, recall = both / yes if yes else 0.0, both / true if true else 0.0
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "yes_ratio": yes / len(said) if said else 0.0,
    }
