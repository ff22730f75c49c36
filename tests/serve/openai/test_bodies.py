"""A body that is wrong names the field; what asks for nothing is let through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.http_server import asking, data_uri
from tests.support.tensors import file
from trio_deploy.pipeline.grammar import Structure
from trio_deploy.serve.openai.bodies import ChatBody, decode
from trio_deploy.serve.openai.convert import Asked, to_asked
from trio_deploy.serve.openai.errors import ApiError


def read(**fields: Any) -> Asked:
    body = {"messages": asking("what ?")} | fields
    return to_asked(decode(json.dumps(body).encode(), ChatBody), max_n=4)


def wrong(**fields: Any) -> tuple[str | None, str | None]:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code


UNSUPPORTED = {
    "tools": [{}],
    "tool_choice": "required",
    "functions": [{}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {},
    "prediction": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "store": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_this_server_does_not_do_is_refused_by_name(name: str) -> None:
    assert wrong(**{name: UNSUPPORTED[name]}) == (name, "unsupported_parameter")
    read(**{name: None})


def test_what_asks_for_nothing_is_let_through() -> None:
    read(tools=[], tool_choice="none", modalities=["text"], store=False, user="me", metadata={})
    read(tool_choice="auto", service_tier="auto", prompt_cache_key="k", parallel_tool_calls=True)
    said = {"role": "assistant", "content": "red", "refusal": None, "tool_calls": [], "audio": None}
    read(messages=[*asking("what ?"), said, *asking("why ?")])
    read(response_format={"type": "text"}, n=1, temperature=0, stream_options=None, top_k=-1)


def test_a_fault_is_named_by_its_path() -> None:
    assert wrong(max_tokens="5") == ("max_tokens", "invalid_value")
    assert wrong(temperature=2.1) == ("temperature", "invalid_value")
    assert wrong(nothing=1) == ("nothing", "unknown_parameter")
    assert wrong(trio={"nothing": 1}) == ("trio.nothing", "unknown_parameter")
    assert wrong(logit_bias={"x": 1}) == ("logit_bias", "invalid_value")
    assert wrong(messages=[{"role": "tool", "content": ""}])[0] == "messages[0].role"
    assert wrong(messages=[{"role": "user", "content": [{"type": "x"}]}]) == (
        "messages[0].content[0].type",
        "invalid_value",
    )
    assert wrong(messages=[{"role": "user"}])[0] == "messages[0].content"
    assert wrong(messages=[{"role": "user", "content": "a", "name": "me"}])[0] == "messages[0].name"
    for kind in ("video_url", "input_audio", "file"):
        part = {"type": kind, kind: {}}
        found = wrong(messages=[{"role": "user", "content": [part]}])
        assert found == ("messages[0].content[0]", "unsupported_parameter")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"5", b"null", b"1e9999"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        decode(body, ChatBody)


def test_two_names_of_one_length_must_agree() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).clients[0].max_tokens == 5
    assert read(max_completion_tokens=6).clients[0].max_tokens == 6
    assert read(max_tokens=7).clients[0].max_tokens == 7
    assert wrong(max_tokens=5, max_completion_tokens=6)[0] == "max_tokens"


def test_every_answer_has_a_seed_of_its_own() -> None:
    clients = read(n=3, seed=-1, temperature=1).clients
    assert [client.seed for client in clients] == [2**64 - 1, 2**64, 2**64 + 1]
    assert [client.seed for client in read(n=2, temperature=1).clients] == [None, None]
    assert wrong(n=5) == ("n", None) and wrong(n=2, temperature=0) == ("n", None)


def test_several_answers_are_refused_where_all_would_be_the_same() -> None:
    """Without a temperature the checkpoint's own counts."""
    body = decode(json.dumps({"messages": asking("what ?"), "n": 2}).encode(), ChatBody)
    with pytest.raises(ApiError, match="without a temperature .* set n to 1, or a temperature"):
        to_asked(body, max_n=4)
    assert len(to_asked(body, max_n=4, draws=True).clients) == 2


def test_options_that_belong_to_others_are_refused_alone() -> None:
    assert wrong(top_logprobs=3)[0] == "top_logprobs"
    assert read(logprobs=True).clients[0].top_logprobs == 0
    assert read(logprobs=True, top_logprobs=3).clients[0].top_logprobs == 3
    assert read(logprobs=False).clients[0].top_logprobs is None
    assert wrong(stream_options={"include_usage": True})[0] == "stream_options"


def structure(**fields: Any) -> Structure | None:
    return read(**fields).clients[0].structure


def test_forms_of_answers_are_read_in_openais_way_and_vllms() -> None:
    assert structure(response_format={"type": "text"}) is None
    assert structure(response_format={"type": "json_object"}) == Structure('{"type": "object"}')
    schema = {"name": "a", "strict": True, "schema": {"type": "integer"}}
    asked = structure(response_format={"type": "json_schema", "json_schema": schema})
    assert asked == Structure('{"type": "integer"}')
    assert structure(structured_outputs={"choice": ["a", "b"]}) == Structure(choices=("a", "b"))
    assert structure(structured_outputs={"regex": "a+"}) == Structure(regex="a+")
    for json_schema in ({"type": "null"}, '{"type": "null"}'):
        asked = structure(structured_outputs={"json": json_schema})
        assert asked == Structure('{"type": "null"}')
    place = "structured_outputs"
    for given in ({}, {"choice": ["a"], "regex": "a"}, {"choice": []}, {"choice": [""]}):
        assert (wrong(structured_outputs=given)[0] or "").startswith(place)
    both = {"response_format": {"type": "json_object"}, place: {"regex": "a"}}
    assert wrong(**both)[0] == place
    lacking = wrong(response_format={"type": "json_schema"})
    assert lacking[0] == "response_format.json_schema"


def picture_part(url: str, role: str = "user", **image: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url, **image}}
    return [{"role": role, "content": [part, {"type": "text", "text": "?"}]}]


def test_pictures_come_within_the_body_alone() -> None:
    good = data_uri(file())
    (client,) = read(messages=picture_part(good, detail="high")).clients
    assert client.images_base64 == [good.partition(",")[2].encode()]
    (jpeg,) = read(messages=picture_part("DATA:image/jpeg;name=a.jpg;base64,AAAA")).clients
    assert jpeg.images_base64 == [b"AAAA"]
    place = "messages[0].content[0].image_url"
    for url in ("data:image/png,AAAA", "data:text/plain;base64,AAAA", "data:image/png;base64,é"):
        assert wrong(messages=picture_part(url)) == (f"{place}.url", "invalid_image")
    for url in ("http://example.com/a.png", "file:///etc/passwd", "/etc/passwd", ""):
        assert wrong(messages=picture_part(url))[0] == f"{place}.url"
    low = wrong(messages=picture_part(good, detail="low"))
    assert low == (f"{place}.detail", "unsupported_parameter")
    assert wrong(messages=picture_part(good, role="assistant"))[0] == "messages[0].content[0]"
