"""Scorers give what the benchmarks' own evaluators give, worked out from their protocols."""

import pytest

from trio_deploy import TrioError
from trio_deploy.evaluation.questions import Question, require_references
from trio_deploy.evaluation.scorers import (
    SCORERS,
    get_scorer,
    option,
    pope_summary,
    yes_or_no,
)

TEN = ["blue"] * 2 + ["navy"] * 1 + ["black"] * 7


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("black", 1.0),  # seven agree, also without any one of them
        ("blue", (8 * 2 / 3 + 2 * 1 / 3) / 10),  # without a voter for it only one is left
        ("navy", (9 * 1 / 3) / 10),
        ("red", 0.0),
    ],
)
@pytest.mark.parametrize("scorer", ["vqav2", "textvqa"])
def test_soft_accuracy_leaves_each_annotator_out_once(scorer, answer, expected):
    assert SCORERS[scorer](answer, TEN) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The two dogs.", "2 dogs"),
        ("it is, a cat!", "it is cat"),
        ("1,000", "1000"),  # a comma between digits vanishes
        ("half-open", "half open"),  # a mark inside a word becomes a blank
        ("3.5", "3.5"),  # a point before a digit stays
        ("dont know", "don't know"),
        ("he wouldnt've", "he wouldn't've"),
        ("\tyes\n", "yes"),
        ("none", "0"),
        ("somebody'd", "somebodyd"),  # as the evaluators have it
    ],
)
def test_answers_are_normalised_as_the_evaluators_do(answer, reference):
    assert SCORERS["vqav2"](answer, [reference] * 10) == 1.0
    assert SCORERS["textvqa"](answer, [reference] * 10) == 1.0


def test_vqav2_normalises_annotators_by_punctuation_alone_and_only_if_they_differ():
    assert SCORERS["vqav2"]("two", ["two"] * 10) == 0.0  # "2" against "two", untouched
    assert SCORERS["textvqa"]("two", ["two"] * 10) == 1.0
    assert SCORERS["vqav2"]("t-shirt", ["t-shirt"] * 10) == 0.0
    assert SCORERS["vqav2"]("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1.0


def test_textvqa_splits_possessives_and_wants_ten_annotators():
    assert SCORERS["textvqa"]("joe's", ["joe 's"] * 10) == 1.0
    with pytest.raises(TrioError, match="10 annotators"):
        SCORERS["textvqa"]("a", ["a"] * 9)
    with pytest.raises(TrioError, match="list of annotators"):
        SCORERS["vqav2"]("a", "a")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),  # LLaVA strips answers before it writes them down
        ("B. because", "B"),
        ("The answer is C.", "C"),
        ("I think The answer is D, since", "D"),
        ("The answer is B. Lunch is at noon.", "B"),
        ("B) because", ""),
        ("B.", ""),
        ("Because", ""),
        ("F", ""),
        ("", ""),
    ],
)
def test_scienceqa_reads_the_option_as_llava_does(text, letter):
    assert option(text) == letter
    assert SCORERS["scienceqa"](text, "B") == float(letter == "B")


def test_scienceqa_fails_an_answer_named_without_a_sign_after_it():
    assert option("The answer is B") == "" and SCORERS["scienceqa"]("The answer is B", "B") == 0


def test_scienceqa_fails_a_letter_with_a_line_break_behind():
    assert option("B\nbecause") == "" and SCORERS["scienceqa"]("B\nbecause", "B") == 0


def test_scienceqa_fails_two_answers():
    assert option("The answer is B. The answer is C.") == ""
    assert option("The answer is B. The answer is B.") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No", "no"),
        ("No, there is none", "no"),
        ("There is not a dog. Yes.", "no"),
        ("Yes. No.", "yes"),  # the first sentence alone
        ("nobody", "yes"),
        ("NO", "yes"),
        ("no\n", "no"),  # LLaVA strips answers before it writes them down
        (" No", "no"),
        ("no\nmore", "yes"),  # words are parted by blanks alone
    ],
)
def test_pope_hears_no_as_llava_does(text, said):
    assert yes_or_no(text) == said
    assert SCORERS["pope"](text, "No") == float(said == "no")


def test_pope_reports_precision_recall_f1_and_the_share_of_yes():
    said, labels = ["yes", "yes", "yes", "no"], ["yes", "no", "yes", "yes"]
    summary = pope_summary(said, labels)
    assert summary == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 4}
    )
    assert pope_summary(["no"], ["no"])["f1"] == 0.0


def test_exact_allows_blanks_at_the_ends_and_several_references():
    assert SCORERS["exact"](" 4 7 \n", "4 7") == 1.0
    assert SCORERS["exact"]("47", ["4 7", "47"]) == 1.0
    assert SCORERS["exact"]("Red", "red") == 0.0


def test_an_unknown_scorer_is_one_clear_error():
    with pytest.raises(TrioError, match="choose one of exact"):
        get_scorer("bleu")


@pytest.mark.parametrize(
    ("scorer", "reference", "words"),
    [
        ("pope", "maybe", "question 7: pope needs yes or no"),
        ("scienceqa", "red", "question 7: scienceqa needs the right option's letter"),
        ("scienceqa", "", "question 7: scienceqa needs the right option's letter"),
        ("textvqa", ["a"], "question 7: textvqa takes 10 annotators"),
        ("vqav2", "a", "question 7: vqav2 needs the list"),
        ("exact", {"a": 1}, "question 7: exact needs an answer"),
        ("exact", [], "question 7: exact needs an answer"),
    ],
)
def test_a_reference_that_does_not_fit_the_scorer_is_named(scorer, reference, words):
    asked = [Question("6", "?", (), "a", "x"), Question("7", "?", (), "a", "x", reference)]
    with pytest.raises(TrioError, match=words):
        require_references(asked, get_scorer(scorer))
    require_references(asked[:1], get_scorer(scorer))
