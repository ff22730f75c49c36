"""`trio chat`: lines come in, answers about pictures go out, and nothing ends it but its user."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.questions import IMAGE_ITEM
from tests.support.tensors import file
from trio_deploy import Pipeline, Request
from trio_deploy.cli.chat import COMMANDS, Chat, picture_path
from trio_deploy.cli.main import main

COLOR, SHAPE = "what color is the circle ?", "what shape is red ?"


@pytest.fixture
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(file())
    return path


Say = Callable[..., list[str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def said(chat: Chat, *lines: str) -> list[str]:
        assert all(chat.take(line) for line in lines)
        return capsys.readouterr().out.splitlines()

    return said


def test_every_turn_is_a_prompt_of_all_that_was_said(
    pipeline: Pipeline, picture: Path, say: Say
) -> None:
    chat = Chat(pipeline, max_new_tokens=4)
    first = say(chat, f"/image {picture}", COLOR)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [IMAGE_ITEM, {"type": "text", "text": COLOR}]}
    ]
    expected = pipeline.generate(Request(messages, [file()], max_new_tokens=4))
    assert first[0] == "a picture of 60 x 40, for the next question"
    assert first[1] == expected.text and first[2].startswith("kept ")
    kept = ", ".join(map(str, expected.keep_counts))
    assert f"kept {kept} of 256 · first token" in first[2]
    messages += [
        {"role": "assistant", "content": expected.text},
        {"role": "user", "content": [{"type": "text", "text": SHAPE}]},
    ]
    second = pipeline.generate(Request(messages, [file()], max_new_tokens=4))
    assert say(chat, SHAPE)[0] == second.text
    assert say(chat, "/reset", SHAPE)[0] == (
        pipeline.generate(Request(SHAPE, max_new_tokens=4)).text
    )


def test_a_budget_counts_from_the_next_question_on(
    pipeline: Pipeline, picture: Path, say: Say
) -> None:
    chat = Chat(pipeline, max_new_tokens=2)
    lines = say(chat, str(picture), "/budget 1.0", COLOR, "/budget default", COLOR)
    assert "kept 256, 256, 256 of 256" in lines[2] and "kept 256" not in lines[4]
    assert "did you mean 0.22" in say(chat, "/budget 22")[0]
    assert "budget" in say(chat, "/budget much")[0]


def test_what_is_wrong_is_said_and_changes_nothing(
    pipeline: Pipeline, picture: Path, say: Say, tmp_path: Path
) -> None:
    chat = Chat(pipeline, max_new_tokens=2)
    assert "there is no command /imege; did you mean '/image'?" in say(chat, "/imege a")[0]
    assert "there is no picture" in say(chat, "/image nowhere.png")[0]
    assert "not a public one" in say(chat, "/image http://127.0.0.1:1/a.png")[0]
    (tmp_path / "text.png").write_text("hello")
    assert "cannot be read as a picture" in say(chat, f"/image {tmp_path / 'text.png'}")[0]
    assert "there is no whole answer" in say(chat, "/show")[0]
    assert "or start again with /reset" in say(chat, "word " * 4000)[-1]
    assert "needs the name of a file" in say(chat, "/save")[0]
    assert "cannot write" in say(chat, "/save /nowhere/at/all")[0]
    assert (chat.messages, chat.images, chat.waiting) == ([], [], [])
    assert not chat.take("/quit") and chat.take("")


def test_what_was_kept_is_drawn_and_the_conversation_saved(
    pipeline: Pipeline, picture: Path, say: Say, tmp_path: Path
) -> None:
    pipeline.cache_features(2**24)
    try:
        chat = Chat(pipeline, max_new_tokens=2)
        lines = say(chat, "/system say it", str(picture), COLOR, SHAPE, "/show")
        drawn = Path(lines[-1])
        assert Image.open(drawn).width > 4 * 300
        drawn.unlink()
        assert pipeline.feature_counts.misses == 1  # the second question found the picture
    finally:
        pipeline.cache_features(0)
    say(chat, f"/save {tmp_path / 'saved.json'}")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert [message["role"] for message in saved] == [
        *("system", "user", "assistant", "user", "assistant")
    ]


def test_an_interrupt_ends_the_answer_and_not_the_program(
    pipeline: Pipeline, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(pipeline, max_new_tokens=50)
    written: list[str] = []

    def interrupted(text: str = "", *given: Any, **named: Any) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    assert chat.take(COLOR)
    monkeypatch.undo()
    assert chat.messages[-1]["content"] == "".join(written[:3]) and chat.last is None
    assert say(chat, SHAPE)


def test_a_line_with_nothing_but_a_path_is_a_picture(picture: Path) -> None:
    escaped = str(picture).replace(" ", r"\ ")
    uri = picture.as_uri()
    assert "%20" in uri
    for line in (str(picture), f"'{picture}'", f'"{picture}"', escaped):
        assert picture_path(line) == str(picture)
    assert picture_path(uri) == str(picture)
    for line in ("what's this?", "", "nowhere.png", f"what is {picture}", "~"):
        assert picture_path(line) is None


def test_a_pipe_drives_it(
    bundles: Bundles,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = f"{picture}\n{COLOR}\n\n/help\n/quit\n{SHAPE}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    words = ["chat", str(bundles.path("tiny")), "--threads", "1", "--max-new-tokens", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("first token") == 1 and all(name in out for name in COMMANDS)
    assert "\x1b" not in out and "> " not in out
    assert main([*words[:2], "--max-new-tokens", "0"]) == 1


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    completion = pytest.importorskip("prompt_toolkit.completion")
    document = pytest.importorskip("prompt_toolkit.document")
    from trio_deploy.cli.chat import _completer, _keys

    def completed(text: str) -> list[str]:
        event = completion.CompleteEvent()
        return [each.text for each in _completer().get_completions(document.Document(text), event)]

    (tmp_path / "cat.png").touch()
    assert completed("/im") == ["/image"]
    assert completed(f"/image {tmp_path}/ca") == ["t.png"]
    assert len(_keys().bindings) == 1
