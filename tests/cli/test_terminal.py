"""Text from outside does not steer the terminal."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import trio_deploy.cli
from tests.support.bundles import Bundles
from tests.support.tensors import file
from trio_deploy import Pipeline
from trio_deploy.cli.chat import Chat
from trio_deploy.cli.main import main
from trio_deploy.cli.terminal import printable, say
from trio_deploy.pipeline.stream import TextStream

EVIL = "\x1b[2Jred\x9b31m\x07\r\x00"
HARMLESS = "\ufffd[2Jred\ufffd31m\ufffd\ufffd\ufffd"


@pytest.fixture
def evil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    following = TextStream.__next__
    monkeypatch.setattr(TextStream, "__next__", lambda stream: EVIL + following(stream))


def test_control_characters_are_replaced_and_text_stays() -> None:
    assert printable(EVIL) == HARMLESS
    text = "a\tb\nç 漢 \U0001f600 \u2028 \xa0 ¶"
    assert printable(text) == text


def test_a_dimmed_text_is_cleaned_within(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL, dim=True)
    assert capsys.readouterr().out == f"\x1b[2m{HARMLESS}\x1b[0m\n"


def test_an_answer_of_trio_run_and_trio_chat_cannot_steer(
    bundles: Bundles, evil_answers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(file())
    tiny = str(bundles.path("tiny"))
    assert main(["run", tiny, str(picture), "what color ?", "--threads", "1"]) == 0
    assert capsys.readouterr().out.startswith(HARMLESS)
    chat = Chat(Pipeline.open(tiny, threads=1), max_new_tokens=2)
    chat.waiting.append(file())
    assert chat.take("what color ?")
    assert capsys.readouterr().out.startswith(HARMLESS)


def test_a_name_in_an_error_cannot_steer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"/nowhere/{EVIL[:-1]}"]) == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", capsys.readouterr().err)


def test_commands_print_by_say_alone() -> None:
    for path in Path(next(iter(trio_deploy.cli.__path__))).glob("*.py"):
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls or path.name == "terminal.py", path.name
