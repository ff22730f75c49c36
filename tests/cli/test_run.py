"""`trio run` reports tokens a layer range, speed and memory, and draws what was kept."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trio_deploy import Generation, Pipeline, SamplingOptions, Schedule, TrioError
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.cli import main
from trio_deploy.cli import run as answers
from trio_deploy.pipeline import draw as picture


def answer(**changes):
    visual = np.arange(2, 12)
    text = np.array([0, 1, 12, 13, 14])
    values = {
        "text": "a cat",
        "token_ids": [5, 6, 2],
        "finish_reason": "stop",
        "timings": {"vision": 0.1},
        "first_token_s": 0.25,
        "tokens_per_s": 40.0,
        "prompt_tokens": 15,
        "visual": visual,
        "kept": [np.union1d(text, visual[:4]), np.union1d(text, visual[:1])],
        "layer_ranges": [(0, 1, 15), (1, 3, 9), (3, 4, 6)],
        "schedule": Schedule.parse("1:0.4,3:0.1"),
        "kv_bytes": 3 * 2**20,
        "kv_bytes_allocated": 4 * 2**20,
    }
    return Generation(**{**values, **changes})


def test_text_has_a_line_a_layer_range_and_the_average():
    lines = answers.generation_text(answer()).splitlines()
    assert lines[1].split() == ["0", "10", "15"]
    assert lines[2].split() == ["1-2", "4", "9"]
    assert lines[3].split() == ["3", "1", "6"]
    assert lines[4].split()[:3] == ["average", "4.8", "47.5%"]
    assert "0.250 s" in lines[6] and "40.0 tokens/s" in lines[6] and "stop" in lines[6]
    assert lines[7] == "KV cache 3.00 MiB"


def test_a_text_only_answer_has_no_average():
    nothing = np.array([], np.int64)
    text = answers.generation_text(
        answer(visual=nothing, kept=[], prompt_tokens=5, layer_ranges=[(0, 4, 5)], tokens_per_s=0.0)
    )
    assert "average" not in text
    assert "tokens/s" not in text


def test_json_is_plain():
    raw = json.loads(json.dumps(answers.generation_json(answer(token_ids=[np.int64(5)]))))
    assert raw["schedule"][1] == {"layer": 3, "keep": 0.1, "method": "trio"}
    assert raw["token_ids"] == [5]
    assert raw["keep_counts"] == [4, 1]
    assert raw["kept"][1] == [0, 1, 2, 12, 13, 14]


def test_a_choice_of_tokens_that_is_not_plain_greedy_is_shown():
    assert "tokens chosen" not in answers.generation_text(answer())
    sampling = SamplingOptions(temperature=0.7, repetition_penalty=1.1, suppress_tokens=(3,))
    generation = answer(sampling=sampling)
    last = answers.generation_text(generation).splitlines()[-1]
    assert last == "tokens chosen by temperature 0.7, repetition_penalty 1.1, 1 suppress_tokens"
    raw = json.loads(json.dumps(answers.generation_json(generation)))
    assert raw["sampling"] == sampling.to_json() and raw["sampling"]["suppress_tokens"] == [3]


LINE = (
    "--temperature 0.5 --top-k 5 --top-p 0.9 --min-p 0.1 --seed 3 --repetition-penalty 1.1 "
    "--presence-penalty 0.2 --frequency-penalty -0.3 --no-repeat-ngram-size 3 --min-new-tokens 2 "
    "--suppress-tokens 4 --suppress-tokens 5 --bad-words a --bad-words"
)


def test_options_of_sampling_reach_the_request(monkeypatch):
    asked = []

    def stream(_, request):
        asked.append(request)
        raise TrioError("enough")

    monkeypatch.setattr(answers, "bundle_of", lambda *_, **__: None)
    monkeypatch.setattr(Pipeline, "open", lambda *_: type("Opened", (), {"stream": stream})())
    for line in ([], [*LINE.split(), "b c"]):
        assert main.main(["run", "b", "what ?", *line]) == 1
    assert asked[0].to_json() == {} and asked[0].bundle_sampling
    assert asked[1].to_json() == {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 2,
        "suppress_tokens": [4, 5],
        "bad_words": ["a", "b c"],
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("none.png why?", "there is no image file at none.png"),
        ("how many red", 'how names no picture; .* in quotes: "how many red"'),
        ("none.png how many red?", 'how names no picture; .* in quotes: "how many red\\?"'),
        ("how many in scene.png", 'put the question in quotes: "how many in scene.png"'),
        ("ftp://host/a.png why?", "cannot fetch ftp://host/a.png: only http:// and https://"),
        ("file:///scene.png why?", "cannot fetch file:///scene.png: only http:// and https://"),
        ("broken.png why?", "broken.png cannot be read as a picture"),
        ("scene.png why? --budget 0.05", r"a budget of 0\.05 cannot be reached.* above 0\.0625"),
        ("scene.png why? --budget 2", "a budget of 2 is not possible"),
        ("scene.png why? --max-new-tokens 0", "max_new_tokens must be 1 or more"),
        ("scene.png why? --temperature -1", "temperature must be"),
        ("scene.png why? --runtime openvino --provider cpu", "provider is no option of OpenVINO"),
        ("scene.png why? --target jetson-thor", "there are no engines of .* for jetson-thor"),
        ("scene.png why? --provider cuda", "has no CUDAExecutionProvider"),
    ],
)
def test_what_cannot_be_answered_is_said_before_a_model_is_exported(
    line, words, tmp_path, monkeypatch, capsys
):
    def export(*args, **kwargs):
        raise AssertionError("it was exported")

    monkeypatch.setattr("trio_deploy.export.job.export_model", export)
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("scene.png")
    Path("broken.png").write_bytes(b"no picture")
    assert main.main(["run", str(load_recipe("tiny").checkpoint), *line.split()]) == 1
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1


@pytest.mark.parametrize("picture", ["photo.png", "photos/my.JPG", "https://host/picture"])
def test_a_picture_in_the_place_of_the_bundle_is_said(picture, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main.main(["run", picture, "what is this?"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"trio: {picture} is a picture, and in its place belongs a bundle")
    assert f"`trio run tiny {picture} …`" in said


def test_several_images_are_drawn_below_one_another(tmp_path, monkeypatch):
    seen = []

    def draw(image, processed, kept, layers):
        seen.append((len(kept), layers))
        return Image.new("RGB", image.size, "red")

    monkeypatch.setattr(picture, "draw_kept", draw)

    class Tokens:
        rows = np.arange(5)

    images = [Image.new("RGB", (30, 20)), Image.new("RGB", (50, 10))]
    generation = answer(images=images, processed=[Tokens, Tokens])
    answers.save_kept(generation, tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as sheet:
        assert sheet.width == 50 and sheet.height >= 30
    assert seen == [(2, [1, 3])] * 2


def test_nothing_to_draw_or_nowhere_to_write_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(TrioError, match="name a picture"):
        answers.save_kept(answer(), tmp_path / "kept.png")
    monkeypatch.setattr(picture, "draw_kept", lambda *_: Image.new("RGB", (3, 3)))

    class Tokens:
        rows = np.arange(10)

    generation = answer(images=[Image.new("RGB", (3, 3))], processed=[Tokens])
    with pytest.raises(TrioError, match="cannot write"):
        answers.save_kept(generation, tmp_path / "no" / "kept.png")
    before = tmp_path / "before.png"
    before.write_bytes(b"an older picture")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrioError, match=r"before\.png .*make room"):
        answers.save_kept(generation, before)
    assert before.read_bytes() == b"an older picture"
    assert [path.name for path in tmp_path.iterdir()] == ["before.png"]


@pytest.mark.parametrize(
    ("line", "images", "prompt"),
    [
        (["how?"], [], "how?"),
        (["a.png", "b.jpg", "how many red ?"], ["a.png", "b.jpg"], "how many red ?"),
        (["a.png", "--threads", "1", "is it in b.png"], ["a.png"], "is it in b.png"),
        (["--image", "a.png", "b.png", "how?"], ["a.png", "b.png"], "how?"),
        (["a.png", "--prompt", "how?", "b.png"], ["a.png", "b.png"], "how?"),
        (["--image", "a.png", "--prompt", "b.png"], ["a.png"], "b.png"),
        (["?" * 5000], [], "?" * 5000),
    ],
)
def test_pictures_and_a_question_are_arguments_or_options(line, images, prompt):
    args = main.parser().parse_args(["run", "b", *line])
    assert args.bundle == "b"
    assert answers.asked_for(args.image, args.asked, args.prompt) == (prompt, images)
