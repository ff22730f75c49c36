"""Whatever is sent, the answer is right or an error of the client's, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.http_server import HttpServer, asking, chat
from tests.support.tensors import file, json_values
from trio_deploy.serve.openai.bodies import ChatBody, DetokenizeBody, TokenizeBody

BODIES = {
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


@pytest.fixture(scope="module")
def server(bundles: Bundles) -> Iterator[HttpServer]:
    server = HttpServer(opened(bundles), settings={"max_tokens": "3", "max_prompt_bytes": "2000"})
    yield server
    server.close()


numbers = st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 20, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e300])
texts = st.sampled_from(["", "a", "\ud800", "\x00", "é" * 300, "data:image/png;base64,AAAA"])
values = st.one_of(numbers, texts, json_values, st.booleans(), st.just([]), st.just({}))
parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts | st.text(max_size=9)),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, values),
    st.just(asking("?", file())[0]["content"][0]),
    st.builds(lambda kind: {"type": kind}, texts | st.sampled_from(["video_url", "file"])),
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
            "content": st.one_of(st.text(max_size=9), st.lists(parts, max_size=3), values),
        }
    ),
    max_size=3,
)


def bodies(kind: type) -> st.SearchStrategy[bytes]:
    """Bodies with fields of this kind and any values, mostly after a good beginning."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    fields = st.dictionaries(st.sampled_from([*names, "x"]), values, max_size=3)
    whole = [{"messages": asking("what ?")}, {"tokens": [1]}, {"prompt": "what ?"}, {}]
    asked = st.one_of(st.just({}), messages.map(lambda each: {"messages": each}))
    mixed = st.builds(lambda a, b, c: a | b | c, st.sampled_from(whole), asked, fields)
    return st.one_of(mixed.map(lambda body: json.dumps(body).encode()), st.binary(max_size=40))


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_fault_of_the_server(server: HttpServer, path: str) -> None:
    seen: set[int] = set()

    @given(bodies(BODIES[path]))
    @settings(max_examples=300 if path == "/v1/chat/completions" else 150)
    def any_body(body: bytes) -> None:
        reply = server.post(path, body)
        seen.add(reply.status)
        assert reply.status < 500, reply.content
        if reply.status != 200:
            assert reply.error["message"] and reply.error["type"] == "invalid_request_error"

    any_body()
    assert {200, 400} <= seen
    server.wait_until_idle()
    assert server.post("/v1/chat/completions", chat()).status == 200


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"]),
    st.sampled_from(["/", "/v1/models", "/v1/models/%0a", "/v1//models", "/metrics/", "/%ff"])
    | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map("/{}".format),
    st.dictionaries(
        st.sampled_from(["host", "content_type", "authorization", "x_request_id", "accept"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
        max_size=2,
    ),
)
@settings(max_examples=150)
def test_no_path_or_header_is_a_fault_of_the_server(
    server: HttpServer, method: str, path: str, headers: dict[str, Any]
) -> None:
    reply = server.ask(method, path, **{name: value.strip() for name, value in headers.items()})
    assert reply.status < 500
    if reply.status >= 400 and method != "HEAD":
        assert reply.error["message"]


def test_the_description_has_every_route_and_every_field(server: HttpServer) -> None:
    document = server.ask("GET", "/openapi.json").json()
    assert {*BODIES} < {*document["paths"]}
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {*fields} == {field.encode_name for field in msgspec.structs.fields(ChatBody)}
    parts = json.dumps(document).split("#/components/schemas/")[1:]
    references = {part.split('"')[0] for part in parts}
    assert references <= {*document["components"]["schemas"]}
