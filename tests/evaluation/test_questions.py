"""Questions: scenes by seed, LLaVA's question files, and annotations joined the way LLaVA does."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.readme_figures import EXAMPLES
from trio_deploy import TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.evaluation.questions import annotate, read_questions, scene_questions


def write(file: Path, lines: list) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20)).save(folder / name)
    return folder


def test_scenes_are_questions_with_their_answers_and_share_their_picture():
    found = scene_questions(2, each=4)
    assert len(found) == 8 and len({q.id for q in found}) == 8
    assert len({q.picture for q in found}) == len({id(q.images[0]) for q in found}) == 2
    assert found[0].picture == f"busy-{scenes.TEST_SEEDS[10_000]}"
    again = scene_questions(1, first=10_001, each=4)
    assert [(q.id, q.prompt, q.reference) for q in found[4:]] == [
        (q.id, q.prompt, q.reference) for q in again
    ]
    assert {q.picture for q in scene_questions(1, split="tuning", family="smooth")} == {
        f"smooth-{scenes.TUNING_SEEDS[10_000]}"
    }


@pytest.mark.parametrize(
    "wrong", [{"family": "odd"}, {"split": "train"}, {"count": 0}, {"first": 99_999, "count": 2}]
)
def test_scenes_that_are_not_there_are_an_error(wrong):
    with pytest.raises(TrioError):
        scene_questions(**{"count": 1, **wrong})


def test_a_question_file_in_llavas_format(tmp_path, pictures):
    file = write(
        tmp_path / "q.jsonl",
        [
            {"question_id": 7, "image": "a.png", "text": "<image>\nwhat?", "category": "x"},
            {"question_id": 8, "image": ["a.png", "b.png"], "text": "both?", "answer": "yes"},
            {"question_id": 9, "text": "no picture?"},
            {"question_id": 7, "image": "a.png", "text": "again?"},
        ],
    )
    found = read_questions(file, pictures, append="One word.")
    assert [q.id for q in found] == ["7", "8", "9", "7 #2"]
    assert [q.kind for q in found] == ["x", "image", "text", "image"]
    assert found[0].prompt == "what?\nOne word."
    assert found[0].images[0] is found[3].images[0] and found[0].picture == found[3].picture
    assert found[1].reference == "yes" and found[0].reference is None and found[2].images == ()
    assert len(read_questions(file, pictures, limit=2)) == 2


def test_scienceqa_is_a_list_of_conversations(tmp_path, pictures):
    file = tmp_path / "q.json"
    entry = {
        "id": "4",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "Which?\n<image>"}, {"value": "B"}],
    }
    file.write_text(json.dumps([entry]), encoding="utf-8")
    (question,) = read_questions(file, pictures)
    problems = tmp_path / "problems.json"
    problems.write_text(json.dumps({"4": {"answer": 1, "choices": ["x", "y"]}}))
    assert question.prompt == "Which?"
    assert annotate([question], "scienceqa", problems)[0].reference == "B"


def test_pope_labels_follow_the_questions_of_their_category(tmp_path, pictures):
    file = write(
        tmp_path / "q.jsonl",
        [
            {"question_id": n, "image": "a.png", "text": "?", "category": category}
            for n, category in enumerate(["random", "popular", "random"])
        ],
    )
    folder = tmp_path / "coco"
    folder.mkdir()
    write(folder / "coco_pope_random.json", [{"label": "yes"}, {"label": "no"}])
    write(folder / "coco_pope_popular.json", [{"label": "no"}])
    found = annotate(read_questions(file, pictures), "pope", folder)
    assert [q.reference for q in found] == ["yes", "no", "no"]


def test_textvqa_is_joined_by_image_and_question(tmp_path, pictures):
    instruction = "Answer with one word."
    file = write(
        tmp_path / "q.jsonl",
        [
            {"question_id": "i1", "image": "a.png", "text": f"What Brand?\n{instruction}"},
            {
                "question_id": "i1",
                "image": "a.png",
                "text": f"who?\nReference OCR token: X\n{instruction}",
            },
            {
                "question_id": "i2",
                "image": "b.png",
                "text": f"Reference OCR token: X\nwhat?\n{instruction}",
            },
        ],
    )
    source = tmp_path / "val.json"
    data = [
        {"image_id": "i1", "question": "what brand?", "answers": ["a"] * 10},
        {"image_id": "i1", "question": "Who?", "answers": ["b"] * 10},
        {"image_id": "i2", "question": "what?", "answers": ["c"] * 10},
    ]
    source.write_text(json.dumps({"data": data}))
    found = annotate(read_questions(file, pictures), "textvqa", source)
    assert [q.reference[0] for q in found] == ["a", "b", "c"]


def test_vqav2_is_joined_by_question(tmp_path, pictures):
    file = write(tmp_path / "q.jsonl", [{"question_id": 5, "image": "a.png", "text": "?"}])
    source = tmp_path / "annotations.json"
    answers = [{"answer": "red", "answer_id": n} for n in range(10)]
    source.write_text(json.dumps({"annotations": [{"question_id": 5, "answers": answers}]}))
    assert annotate(read_questions(file, pictures), "vqav2", source)[0].reference == ["red"] * 10
    source.write_text(json.dumps({"annotations": []}))
    with pytest.raises(TrioError, match="does not hold vqav2's annotations"):
        annotate(read_questions(file, pictures), "vqav2", source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no questions"),
        ("{", r"q\.jsonl, line 1 is not valid JSON .*: write a question, {"),
        (
            '{"question_id": 1, "text": "?"}\n\nWhat is this?\n',
            r"q\.jsonl, line 3 is not valid JSON",
        ),
        ("[1]", r"q\.jsonl, question 1: it must be an object"),
        ("[1,\n", r"q\.jsonl is not valid JSON .*line 2 .*: pass a JSON Lines file"),
        ('{"text": "?"}', r"q\.jsonl, line 1: it needs question_id"),
        ('{"question_id": 1}', "needs question_id and text"),
        ('{"question_id": {}, "text": "?"}', "needs question_id and text"),
        ('{"question_id": 1, "conversations": {"value": "?"}}', "needs question_id and text"),
        ('{"question_id": 1, "conversations": ["?"]}', "needs question_id and text"),
        ('{"question_id": 1, "text": "?", "image": {"a": 1}}', "image must be a name or a list"),
        ('{"question_id": 1, "text": "?", "image": "%s"}' % ("x" * 300), "there is no picture"),
        (r'{"question_id": 1, "text": "?", "image": "\u0000"}', "there is no picture"),
        ('{"question_id": 1, "text": "?", "image": {}}', "image must be a name"),
        ('{"question_id": 1, "text": "?", "image": 0}', "image must be a name"),
        ('{"question_id": 1, "text": "?", "image": false}', "image must be a name"),
        ('{"question_id": 1, "text": "?", "image": [{}]}', "image must be a name"),
        ('{"question_id": 1, "text": "?", "image": [null]}', "image must be a name"),
        (r'{"question_id": 1, "text": "\ud800"}', r"line 1 is not valid JSON .* is no Unicode"),
        ('{"question_id": 1, "text": ' + "[" * 100_000, "line 1 is not valid JSON .*nest"),
        ('{"question_id": 1%s, "text": "?"}' % ("0" * 5000), "line 1 is not valid JSON .*digits"),
        (
            '\n{"question_id": 1, "text": "?", "image": "gone.png"}',
            r"q\.jsonl, line 2: there is no picture .*gone\.png: put it there .* by --images",
        ),
    ],
)
def test_a_question_file_that_is_wrong_is_one_clear_error(tmp_path, content, message):
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(TrioError, match=message):
        read_questions(file)


def test_a_question_file_that_is_none_is_named(tmp_path, pictures):
    with pytest.raises(TrioError, match=r"there are no questions at .*none\.jsonl: pass a JSON"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(TrioError, match="cannot read .*: Is a directory"):
        read_questions(tmp_path)
    with pytest.raises(TrioError, match=r"is not UTF-8 text .*: pass a JSON Lines file"):
        read_questions(next(pictures.iterdir()))
    with pytest.raises(TrioError, match="--images .*gone is not a folder"):
        read_questions(tmp_path / "none.jsonl", tmp_path / "gone")
    with pytest.raises(TrioError, match="a limit of 0 leaves no question"):
        read_questions(tmp_path / "none.jsonl", limit=0)


def test_exact_has_no_annotation_file(tmp_path):
    with pytest.raises(TrioError, match="put `answer`"):
        annotate([], "exact", tmp_path)


def test_the_file_of_the_examples_asks_about_their_scenes() -> None:
    """The documents name it: whoever has the repository can run their commands as they are."""
    root = Path(__file__).parents[2]
    asked = read_questions(root / "examples" / "questions.jsonl")
    found = {(q.picture, q.prompt, q.reference) for q in asked}
    assert found == {
        (f"{name}.png", question.text, question.answer)
        for name, (seed, family) in EXAMPLES.items()
        for question in scenes.generate(seed, family).questions
    }
    assert len({q.id for q in asked}) == len(asked) == len(found)
    for page in ("README.md", "docs/evaluation.md", "docs/quantisation.md"):
        assert "examples/questions.jsonl" in (root / page).read_text(encoding="utf-8")
