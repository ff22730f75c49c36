"""Whoever asks, however many at once: every answer is the pipeline's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.http_server import HttpServer, asking, chat, data_uri
from tests.support.questions import SCHEDULE, ask
from trio_deploy import Generation, Pipeline, Request
from trio_deploy.evaluation import scenes

CASES = [
    (scene, question.text)
    for scene in range(12)
    for question in scenes.generate(scene).questions[:4]
]
COLOR = "what color is the circle ?"


@pytest.fixture(scope="module")
def whole(bundles: Bundles) -> Pipeline:
    """The shipped model with its end token."""
    return Pipeline.open(bundles.path("tiny", schedule=SCHEDULE), threads=1)


@pytest.fixture(scope="module")
def server(whole: Pipeline) -> Iterator[HttpServer]:
    server = HttpServer(whole)
    yield server
    server.close()


def picture(scene: int) -> bytes:
    content = io.BytesIO()
    scenes.generate(scene).image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def expected(whole: Pipeline) -> list[Generation]:
    return [
        whole.generate(Request(question, [picture(scene)], max_new_tokens=8))
        for scene, question in CASES
    ]


def same(body: dict[str, Any], generation: Generation) -> bool:
    (choice,) = body["choices"]
    usage = body["usage"]
    return (
        choice["message"]["content"] == generation.text
        and choice["finish_reason"] == generation.finish_reason
        and usage["completion_tokens"] == len(generation.token_ids)
        and usage["prompt_tokens"] == generation.prompt_tokens
        and usage["trio"]["visual_tokens"] == generation.visual_tokens
        and usage["trio"]["kept_tokens"] == generation.keep_counts
        and choice["trio"]["kept"]["images"][0]["kept"]
        == [tokens.tolist() for tokens in generation.kept_of_image(0)]
    )


def joined(events: list[Any]) -> dict[str, Any]:
    """The body that a stream stands for."""
    *chunks, usage, done = events
    assert done == "[DONE]" and usage["choices"] == []
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    last = chunks[-1]["choices"][0]
    return {"choices": [last | {"message": {"content": text}}], "usage": usage["usage"]}


@pytest.mark.parametrize("at_once", [1, 16])
def test_answers_alone_and_together_streamed_and_not_are_the_pipelines(
    server: HttpServer, expected: list[Generation], at_once: int
) -> None:
    def answer(number: int) -> dict[str, Any]:
        scene, question = CASES[number]
        fields: dict[str, Any] = {"max_tokens": 8, "trio": {"kept": True}}
        if number % 2:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        body = chat(question, picture(scene), **fields)
        reply = server.post("/v1/chat/completions", body)
        assert reply.status == 200
        return joined(reply.events) if number % 2 else reply.json()

    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(answer, range(len(CASES))))
    wrong = [n for n, body in enumerate(answers) if not same(body, expected[n])]
    assert not wrong
    server.wait_until_idle()


def test_each_turn_of_a_conversation_is_a_prompt_of_its_own(
    server: HttpServer, whole: Pipeline
) -> None:
    messages, ours = (
        asking("what color is the circle ?", picture(0)),
        ask("what color is the circle ?"),
    )
    for question in ("what shape is red ?", "how many circles ?", ""):
        body = {"messages": messages, "max_tokens": 6, "trio": {"kept": True}}
        answer = server.post("/v1/chat/completions", body).json()
        generation = whole.generate(Request(ours, [picture(0)], max_new_tokens=6))
        assert same(answer, generation)
        said = {"role": "assistant", "content": generation.text}
        messages = [*messages, said, {"role": "user", "content": question}]
        ours = [*ours, said, {"role": "user", "content": question}]


def test_pictures_may_stand_anywhere_and_in_any_number(server: HttpServer, whole: Pipeline) -> None:
    def content(part: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        return [part(0), {"type": "text", "text": "what is this ?"}, part(1)]

    def link(scene: int) -> dict[str, Any]:
        image = {"url": data_uri(picture(scene)), "detail": "auto"}
        return {"type": "image_url", "image_url": image}

    theirs = [
        {"role": "developer", "content": "say it"},
        {"role": "user", "content": content(link)},
    ]
    ours = [
        {"role": "system", "content": "say it"},
        {"role": "user", "content": content(lambda _: {"type": "image"})},
    ]
    answer = server.post("/v1/chat/completions", {"messages": theirs, "max_tokens": 5}).json()
    generation = whole.generate(Request(ours, [picture(0), picture(1)], max_new_tokens=5))
    assert answer["choices"][0]["message"]["content"] == generation.text
    assert answer["usage"]["prompt_tokens"] == generation.prompt_tokens > 512


def test_tokens_of_a_conversation_are_those_that_the_model_reads(
    server: HttpServer, whole: Pipeline
) -> None:
    body = {"messages": asking("what is this ?", picture(0))}
    told = server.post("/tokenize", body).json()
    prepared = whole.prepare(Request("what is this ?", [picture(0)]))
    assert told["tokens"] == prepared.prompt.ids.tolist() and told["count"] == len(told["tokens"])
    assert told["max_model_len"] == whole.bundle.config.text.max_positions

    plain = server.post("/tokenize", {"prompt": "white circle", "return_token_strs": True}).json()
    assert plain["token_strs"][-2:] == ["white", "circle"]
    back = server.post("/detokenize", {"tokens": plain["tokens"]}).json()
    assert back["prompt"].endswith("white circle")
    bare = server.post("/tokenize", {"prompt": "white", "add_special_tokens": False}).json()
    assert bare["tokens"] == whole.tokenize("white")
    for wrong in ([10**6], [1] * 5000):
        assert server.post("/detokenize", {"tokens": wrong}).error["param"] == "tokens"
    assert server.post("/tokenize", {}).status == 400
