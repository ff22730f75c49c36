"""OpenAI's own package asks as it would ask OpenAI."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.support.batching import Gate
from tests.support.bundles import Bundles
from tests.support.byte_level import byte_level_bundle
from tests.support.http_server import NAME, HttpServer, asking
from tests.support.tensors import file
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline, Request

QUESTION = "what color is the circle ?"


@pytest.fixture
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": NAME, "messages": asking(QUESTION, file()), "max_tokens": 4}
    return client.chat.completions.create(**(given | fields))


@pytest.fixture
def expected(pipeline: Pipeline) -> str:
    return pipeline.generate(Request(QUESTION, [file()], max_new_tokens=4)).text


def test_an_answer_is_the_pipelines(client: openai.OpenAI, expected: str) -> None:
    answer = create(client)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (expected, "assistant")
    assert (choice.finish_reason, choice.index, answer.model) == ("length", 0, NAME)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 4 and usage.trio["visual_tokens"] == 256


def test_a_stream_has_the_same_text_in_pieces(client: openai.OpenAI, expected: str) -> None:
    chunks = list(create(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_packages_own_stream_helper_reads_it(client: openai.OpenAI, expected: str) -> None:
    last = expected.split()[-1]  # the package takes an answer that is cut for an error
    with client.chat.completions.stream(
        model=NAME, messages=asking(QUESTION, file()), max_tokens=4, stop=last
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected.partition(last)[0]
    assert "content.delta" in kinds


def test_the_usage_of_a_stream_comes_last_where_it_is_asked_for(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *chunks, last = create(client, stream=True, stream_options=options)
    assert last.choices == [] and last.usage == create(client).usage
    assert all(chunk.usage is None for chunk in chunks)


def test_asynchronous_clients_are_answered_at_once(server: HttpServer, expected: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked: Any = {"model": NAME, "messages": asking(QUESTION, file()), "max_tokens": 4}
            whole = [client.chat.completions.create(**asked) for _ in range(3)]
            answers = [
                each.choices[0].message.content or "" for each in await asyncio.gather(*whole)
            ]
            stream = await client.chat.completions.create(**asked, stream=True)
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [*answers, "".join(text)]

    assert asyncio.run(ask()) == [expected] * 4


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI, pipeline: Pipeline) -> None:
    answer = create(client, n=3, temperature=1.5, seed=5)
    asked = [
        Request(QUESTION, [file()], max_new_tokens=4, temperature=1.5, seed=seed)
        for seed in (5, 6, 7)
    ]
    expected = [generation.text for generation in pipeline.generate_batch(asked)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 12

    texts = ["", "", ""]
    for chunk in create(client, n=3, temperature=1.5, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_probabilities_come_with_each_token(client: openai.OpenAI, pipeline: Pipeline) -> None:
    request = Request(QUESTION, [file()], max_new_tokens=4, top_logprobs=2)
    expected = pipeline.generate(request).token_logprobs
    whole = create(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [each.logprob for each in whole] == [each.logprob for each in expected]
    assert all(len(each.top_logprobs) == 2 for each in whole)
    assert all(bytes(each.bytes).decode() == each.token for each in whole)
    streamed = [
        token
        for chunk in create(client, logprobs=True, top_logprobs=2, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == whole
    assert create(client).choices[0].logprobs is None


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model == client.models.retrieve(NAME) and model.id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens", None),
    ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", "unsupported_parameter"),
    ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense", "unknown_parameter"),
    ({"extra_body": {"trio": {"budget": 5}}}, openai.BadRequestError, "trio.budget", None),
    ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
    (
        {"messages": asking("word " * 4000)},
        openai.BadRequestError,
        "messages",
        "context_length_exceeded",
    ),
    ({"messages": asking("what ?", b"no picture")}, openai.BadRequestError, "messages", None),
    ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
    ({"n": 9}, openai.BadRequestError, "n", None),
    ({"n": 2, "temperature": 0}, openai.BadRequestError, "n", None),
    ({"stop": ["x"] * 9}, openai.BadRequestError, "stop", None),
    ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias", None),
]


@pytest.mark.parametrize(("fields", "kind", "param", "code"), ERRORS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_the_packages_own_error_with_the_field(
    client: openai.OpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    with pytest.raises(kind) as caught:
        create(client, stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)  # type: ignore[attr-defined]
    assert caught.value.body["message"]  # type: ignore[index,call-overload]


def test_a_full_queue_is_tried_again_when_it_says_so(
    pipeline: Pipeline,
    start: Callable[..., HttpServer],
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
) -> None:
    server = start(settings={"max_rows": "1", "max_queue": "1"})
    gate = Gate(pipeline, monkeypatch)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        threads = [threading.Thread(target=create, args=(client,)) for _ in range(2)]
        threads[0].start()
        gate.held()
        threads[1].start()
        wait_for(lambda: server.service.metrics().queued == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            create(client)
        assert caught.value.response.headers["retry-after"] == "1"
        refused = server.service.metrics().outcomes["refused"]
        found: list[str] = []
        patient = client.with_options(max_retries=5)
        again = threading.Thread(
            target=lambda: found.append(create(patient).choices[0].message.content)
        )
        again.start()
        wait_for(lambda: server.service.metrics().outcomes["refused"] > refused)
        gate.open.set()
        for thread in (*threads, again):
            thread.join(WAIT_S)
    assert found == [expected]


def test_a_client_that_waits_no_longer_frees_its_row(
    pipeline: Pipeline, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline, monkeypatch)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        create(client.with_options(timeout=0.2))
    gate.open.set()
    server.wait_until_idle()
    wait_for(lambda: server.service.metrics().outcomes == {"cancelled": 1})


def test_what_this_server_alone_can_do_is_one_object(
    client: openai.OpenAI, pipeline: Pipeline
) -> None:
    trio = {"budget": 0.5, "kept": True, "timings": True, "timeout_s": 30}
    answer = create(client, extra_body={"trio": trio})
    expected = pipeline.generate(Request(QUESTION, [file()], max_new_tokens=4, budget=0.5))
    told = answer.choices[0].trio
    assert answer.usage.trio["kept_tokens"] == expected.keep_counts
    (image,) = told["kept"]["images"]
    assert image["kept"] == [tokens.tolist() for tokens in expected.kept_of_image(0)]
    assert len(image["boxes"]) == 256 and told["kept"]["layers"] == [1, 5, 8]
    assert told["timings"]["first_token_s"] > 0


def test_a_picture_is_seen_once_for_all_who_ask_about_it(
    client: openai.OpenAI, server: HttpServer
) -> None:
    create(client, n=3, temperature=1.0)
    create(client, messages=asking("what is red ?", file()))
    metrics = server.service.metrics()
    assert (metrics.vision_cache_misses, metrics.vision_cache_hits) == (1, 3)
    create(client, extra_body={"trio": {"cache": False}})
    assert server.service.metrics().vision_cache_hits == 3


class Thing(pydantic.BaseModel):
    color: Literal["red", "white"]
    count: int = pydantic.Field(ge=0, le=99)
    note: str = pydantic.Field(max_length=4)


def test_answers_of_a_form_are_parsed_by_the_package(
    bundles: Bundles, run_folder: Path, start: Callable[..., HttpServer]
) -> None:
    server = start(Pipeline.open(byte_level_bundle(bundles, run_folder), threads=1))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": NAME, "messages": asking("what?", file()), "temperature": 1.5}
        for seed in range(3):
            answer = client.chat.completions.parse(**asked, response_format=Thing, seed=seed)
            assert isinstance(answer.choices[0].message.parsed, Thing)
        several = client.chat.completions.parse(**asked, response_format=Thing, n=3)
        assert all(isinstance(choice.message.parsed, Thing) for choice in several.choices)
        chosen = create(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
        assert chosen.choices[0].message.content in ("yes", "no")
        wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, response_format=wrong)
        assert caught.value.param == "response_format" and "not" in str(caught.value)
        shorter = {"structured_outputs": {"choice": ["yes"]}, "min_tokens": 30}
        with pytest.raises(openai.BadRequestError, match="leave no token to choose"):
            create(client, extra_body=shorter, max_tokens=40)


def test_a_model_without_a_form_in_bytes_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"no byte form|no end token") as caught:
        create(client, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    long = {"name": "a", "schema": {"enum": ["x" * 70_000]}}
    with pytest.raises(openai.BadRequestError, match="max_schema_bytes"):
        create(client, response_format={"type": "json_schema", "json_schema": long})
    for given in ({"regex": "a+"}, {"regex": "a" * 70_000}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, extra_body={"structured_outputs": given})
        assert caught.value.param == "structured_outputs"
        assert "response_format" not in str(caught.value)
