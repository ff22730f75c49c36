"""The server on small Qwen models: pictures of any size, several of them, and none."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.http_server import HttpServer, asking, chat
from tests.support.questions import ask
from tests.support.qwen_checkpoints import shared_checkpoint
from tests.support.qwen_models import FAMILIES
from tests.support.tensors import file
from trio_deploy import Bundle, Pipeline, Request

QUESTION = "count the red ones"
#: Sizes of the pictures of each question.
SIZES = [[(28, 28)], [(400, 300)], [(1990, 10)], [(20, 1000), (90, 120)], [(90, 120), (90, 120)]]


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, run_folder: Path, bundles: Bundles) -> Pipeline:
    checkpoint = shared_checkpoint(run_folder, request.param)
    path = bundles.path(checkpoint, schedule="0:0.5:divprune,2:0.25")
    return Pipeline.open(Bundle.load(path).with_end_tokens([]), threads=1)


@pytest.fixture(scope="module")
def server(whole: Pipeline) -> Iterator[HttpServer]:
    server = HttpServer(whole)
    yield server
    server.close()


def test_answers_about_pictures_of_any_size_are_the_pipelines(
    server: HttpServer, whole: Pipeline
) -> None:
    pictures = [[file(*size) for size in sizes] for sizes in SIZES]

    def answer(number: int) -> dict[str, Any]:
        fields = {"max_tokens": 5, "trio": {"kept": True}}
        reply = server.post("/v1/chat/completions", chat(QUESTION, *pictures[number], **fields))
        assert reply.status == 200, reply.error
        return dict(reply.json())

    with ThreadPoolExecutor(len(SIZES)) as pool:
        answers = list(pool.map(answer, range(len(SIZES))))
    for each, body in zip(pictures, answers, strict=True):
        alone = whole.generate(Request(ask(QUESTION, len(each)), each, max_new_tokens=5))
        (choice,) = body["choices"]
        assert choice["message"]["content"] == alone.text
        assert body["usage"]["prompt_tokens"] == alone.prompt_tokens
        assert body["usage"]["trio"]["visual_tokens"] == alone.visual_tokens > 0
        assert body["usage"]["trio"]["kept_tokens"] == alone.keep_counts
        kept = [image["kept"] for image in choice["trio"]["kept"]["images"]]
        assert kept == [
            [tokens.tolist() for tokens in alone.kept_of_image(n)] for n in range(len(each))
        ]
    server.wait_until_idle()


def test_text_alone_and_tokens_of_a_conversation(server: HttpServer, whole: Pipeline) -> None:
    body = {"messages": asking(QUESTION), "max_tokens": 4}
    alone = whole.generate(Request(QUESTION, max_new_tokens=4))
    told = server.post("/v1/chat/completions", body).json()
    assert told["choices"][0]["message"]["content"] == alone.text
    assert told["usage"]["prompt_tokens"] == alone.prompt_tokens

    picture = file(200, 130)
    told = server.post("/tokenize", {"messages": asking(QUESTION, picture)}).json()
    prepared = whole.prepare(Request(ask(QUESTION, 1), [picture]))
    assert told["tokens"] == prepared.prompt.ids.tolist()
