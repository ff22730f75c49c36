"""Questions are asked once: answers are stored, and taken only for what they answer."""

import shutil

import pytest

from tests.support.evaluation import requests_asked, run
from trio_deploy import (
    TrioError,
)
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.evaluation.ask import AnswerLine, AnswerLog, checksums
from trio_deploy.evaluation.configurations import (
    Source,
    named,
)
from trio_deploy.evaluation.questions import Question, scene_questions
from trio_deploy.pipeline.ran_as import RanAs


def test_a_rerun_asks_nothing_and_finds_the_same(results, source, questions, out, monkeypatch):
    seen = requests_asked(monkeypatch)
    configurations = [named(source, "mixed=0:44:divprune,6:19")]
    again = run(source, questions, configurations, out)
    assert seen == [] and again.results[1] == results.results[1]


def test_more_questions_are_added_to_what_was_asked(results, source, questions, out, monkeypatch):
    seen = requests_asked(monkeypatch)
    more = [*questions, *scene_questions(1, split="tuning", each=6, first=10_002)]
    run(source, more, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert len(seen) == 2 * 6  # the new scene's, by the unpruned model and by the mixed one


def test_an_answer_to_another_question_is_not_taken(results, source, questions, out, monkeypatch):
    seen = requests_asked(monkeypatch)
    changed = scene_questions(1, split="tuning", each=6)
    changed[0] = type(changed[0])(**{**changed[0].__dict__, "prompt": "how many stars are there?"})
    run(source, changed, [], out)
    assert [request.prompt for request in seen] == ["how many stars are there?"]


def test_an_answer_to_another_picture_is_not_taken(tmp_path, source, monkeypatch):
    seen = requests_asked(monkeypatch)
    picture = tmp_path / "x.png"
    scenes = [scene_questions(1, split="tuning", each=4, first=n) for n in (10_003, 10_004)]
    found = [Question("1", "how many stars are there?", (picture,), "x.png", "image")]

    def ask(number: int) -> int:
        scenes[number][0].images[0].save(picture)
        before = len(seen)
        run(source, found, [named(source, "0:44:divprune,6:19")], tmp_path / "out")
        return len(seen) - before

    assert [ask(0), ask(0), ask(1), ask(1)] == [2, 0, 2, 0]


def test_a_picture_that_is_gone_is_named(tmp_path):
    asked_of = Question("1", "?", (tmp_path / "gone.png",), "gone.png", "image")
    with pytest.raises(TrioError, match=r"the picture .*gone\.png cannot be read \(No such file"):
        checksums([asked_of])


def test_an_answer_of_other_weights_is_not_taken_nor_a_bundle_of_them(tmp_path, monkeypatch):
    folder = shutil.copytree(load_recipe("tiny").checkpoint, tmp_path / "model")
    questions = scene_questions(1, split="tuning", each=4)
    seen = requests_asked(monkeypatch)

    def ask() -> list[str]:
        del seen[:]
        opened = Source.open(folder)
        run(opened, questions, [named(opened, "0:44:divprune,6:19")], tmp_path / "out")
        return [request.prompt for request in seen]

    assert len(ask()) == 8 and ask() == []
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()  # bundles may be linked to it
    weights.write_bytes(before[: len(before) // 2] + bytes(len(before) - len(before) // 2))
    assert len(ask()) == 8
    assert len(list((tmp_path / "out" / "bundles").iterdir())) == 4
    weights.unlink()
    weights.write_bytes(before)
    assert ask() == []


def test_a_line_that_was_cut_short_is_asked_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    ran = RanAs("onnxruntime", "cpu", "ort", "float32", "float32", "CPUExecutionProvider")
    first, second, third = (
        AnswerLine(id=name, asked="x", limit=8, ran=ran, text="red") for name in "abc"
    )
    with AnswerLog(file, AnswerLine) as log:
        log.add(first)
        log.add(second)
    with file.open("a") as stream:
        stream.write('{"id": ')
    log = AnswerLog(file, AnswerLine)
    assert log.entries == [first, second]
    with log:
        log.add(third)
    assert AnswerLog(file, AnswerLine).entries == [first, second, third]


def test_a_line_of_an_earlier_version_has_no_engines(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id":"a","asked":"x","limit":8,"text":"red","kl":0.5}\n')
    older = AnswerLine(id="a", asked="x", limit=8, ran=None, text="red", kl=0.5)
    assert AnswerLog(file, AnswerLine).entries == [older]


@pytest.mark.parametrize(
    "line", [b"{}", b"no json", b"[" * 100_000, b'{"id": "\xff"}', b'{"id": 7, "asked": "x"}']
)
def test_a_line_that_is_damaged_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    with AnswerLog(file, AnswerLine) as log:
        log.add(AnswerLine(id="a", asked="x", limit=8, text="red"))
    with file.open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(TrioError, match=r"line 2 of .*answers\.jsonl is damaged .*: delete"):
        AnswerLog(file, AnswerLine)


def test_a_full_disk_is_said_with_the_file(tmp_path):
    """/dev/full takes no byte, as a full disk."""
    file = tmp_path / "answers.jsonl"
    file.symlink_to("/dev/full")
    log = AnswerLog(tmp_path / "other.jsonl", AnswerLine)
    log._file = file
    with pytest.raises(TrioError, match=r"cannot write .*answers\.jsonl \(No space left"), log:
        log.add(AnswerLine(id="a", asked="x", limit=8, text="red"))


def test_answers_of_engines_that_ran_otherwise_are_not_taken(
    source, questions, tmp_path, monkeypatch
):
    one = [named(source, "mixed=0:44:divprune,6:19")]
    asked = questions[:2]
    run(source, asked, one, tmp_path)
    seen = requests_asked(monkeypatch)
    assert {r.ran_as.precision for r in run(source, asked, one, tmp_path).results} == {"float32"}
    assert seen == []
    for file in (tmp_path / "answers").iterdir():  # as if they had been answered in bfloat16
        text = file.read_text(encoding="utf-8")
        narrowed = text.replace('"precision":"float32"', '"precision":"bfloat16"')
        file.write_text(narrowed + text.splitlines(keepends=True)[0], encoding="utf-8")
    again = run(source, asked, one, tmp_path)
    assert {r.ran_as.precision for r in again.results} == {"float32"}
    assert len(seen) == 2  # of two configurations the one whose answer had not been in float32
