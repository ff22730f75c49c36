"""The page asks the server, shows its answers, and lights what each pruning point kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_server import HttpServer
from tests.support.questions import IMAGE_ITEM
from tests.support.tensors import file
from tests.support.waiting import WAIT_S
from trio_deploy import Pipeline, Request
from trio_deploy.serve.openai.gate import Doors, digest_of
from trio_deploy.serve.openai.page import page

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[2] / "trio_deploy" / "serve" / "openai" / "page.html"
QUESTIONS = ("what color is the circle ?", "what shape is red ?")

needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="node runs the page's program, and there is none"
)


def run_program(server: HttpServer, folder: Path, *questions: str) -> Any:
    """What the page shows after questions about the picture in a folder."""
    words = ["node", FOLDER / "page_program.mjs", PAGE, server.url, folder / "picture.png"]
    done = subprocess.run([*words, *questions], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_is_served_and_may_run_its_own_program_alone(
    start: Callable[..., HttpServer],
) -> None:
    server = start(doors=Doors([digest_of("secret")]))
    reply = server.ask("GET", "/")  # it asks for the key itself
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    content, headers = page()
    assert reply.content == content == PAGE.read_bytes()
    policy = headers["Content-Security-Policy"]
    assert reply.headers["content-security-policy"] == policy
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert "unsafe" not in policy and "*" not in policy


def test_the_page_takes_nothing_from_elsewhere_and_puts_no_text_in_as_markup() -> None:
    text = PAGE.read_text()
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.findall(r"""\s(?:style|on\w+)=["']""", text)  # which the policy would not let in


@needs_node
@pytest.mark.parametrize("keys", [[], ["secret"]], ids=["open", "with a key"])
def test_its_program_asks_and_lights_what_was_kept(
    start: Callable[..., HttpServer], pipeline: Pipeline, tmp_path: Path, keys: list[str]
) -> None:
    server = start(
        settings={"default_max_tokens": "4"}, doors=Doors([digest_of(key) for key in keys])
    )
    (tmp_path / "picture.png").write_bytes(file())
    done = subprocess.run(
        [
            "node",
            FOLDER / "page_program.mjs",
            PAGE,
            server.url,
            tmp_path / "picture.png",
            *QUESTIONS,
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["model"] == "· tiny"
    newest_first = list(reversed(shown["turns"]))
    messages: list[dict[str, Any]] = []
    for question, turn in zip(QUESTIONS, newest_first, strict=True):
        parts = [*([] if messages else [IMAGE_ITEM]), {"type": "text", "text": question}]
        messages = [*messages, {"role": "user", "content": parts}]
        expected = pipeline.generate(Request(messages, [file()], max_new_tokens=4))
        assert (turn["question"], turn["answer"]) == (question, expected.text)
        assert not turn["failed"] and "tokens/s · kept" in turn["figures"]
        assert [panel["rects"] for panel in turn["panels"]] == expected.keep_counts
        assert turn["panels"][0]["caption"].startswith("from layer 1: ")
        messages = [*messages, {"role": "assistant", "content": expected.text}]


@needs_node
def test_an_error_is_shown_in_the_place_of_the_answer(
    start: Callable[..., HttpServer], tmp_path: Path
) -> None:
    server = start()
    (tmp_path / "picture.png").write_bytes(b"no picture")
    (turn,) = run_program(server, tmp_path, "what ?")["turns"]
    assert turn["failed"] and "cannot be read as a picture" in turn["answer"]
