"""Whatever a client sends is a question or one clear error."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tensors import arrays, file, one, text, texts
from trio_deploy import Request, TrioError
from trio_deploy.config.sampling import SAMPLING_OPTIONS
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import check_request
from trio_deploy.serve.triton_server.request import INPUTS, read

LIMITS = ServiceLimits(
    max_tokens=32,
    default_max_tokens=16,
    max_images=2,
    max_image_bytes=20_000,
    max_image_pixels=10_000,
    max_request_pixels=12_000,
    max_prompt_bytes=200,
    max_stop=2,
    max_stop_bytes=5,
    max_timeout_s=10.0,
)


ASKED = {"prompt": texts("what ?")}


def checked(
    tensors: Mapping[str, np.ndarray], parameters: str = "", timeout_us: int = 0
) -> tuple[Request, float, bool]:
    """The whole way of a request: the pipeline's, its deadline, and whether it is streamed."""
    client, delivery = read(tensors, parameters, timeout_us)
    return *check_request(client, LIMITS), delivery.stream


def test_a_whole_request_is_read() -> None:
    tensors = {
        "messages": texts(
            json.dumps([{"role": "user", "content": [{"type": "image"}, text("what ?")]}])
        ),
        "images": texts(file()),
        "max_tokens": one(7, "int32"),
        "min_tokens": one(2, "int32"),
        "temperature": one(0.5, "float64"),
        "top_k": one(5, "int32"),
        "top_p": one(0.9, "float64"),
        "min_p": one(0.1, "float64"),
        "repetition_penalty": one(1.1, "float64"),
        "presence_penalty": one(0.2, "float64"),
        "frequency_penalty": one(-0.3, "float64"),
        "no_repeat_ngram_size": one(3, "int32"),
        "suppress_tokens": np.array([4, 5], np.int64),
        "bad_words": texts("ä", "b c"),
        "seed": one(3, "int64"),
        "stop": texts("ä", "b"),
        "budget": one(0.111, "float64"),
        "timeout_s": one(2.5, "float64"),
    }
    assert set(tensors) | {"prompt", "images_base64"} == set(INPUTS)
    request, timeout_s, stream = checked(tensors, '{"stream": false}')
    assert request.prompt == [{"role": "user", "content": [{"type": "image"}, text("what ?")]}]
    assert (request.max_new_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.seed, request.stop, request.budget) == (3, ["ä", "b"], 0.111)
    assert request.images == [file()] and not stream and timeout_s == 2.5
    said = {name: getattr(request, name) for name in SAMPLING_OPTIONS}
    assert said == {
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
        "begin_suppress_tokens": None,  # in generation_config.json alone
        "bad_words": ["ä", "b c"],
        "bad_words_ids": None,
        "seed": 3,
        "logit_bias": None,  # of the other server's clients
    }


def test_what_is_not_said_has_the_models_defaults() -> None:
    request, timeout_s, stream = checked(ASKED)
    assert (request.max_new_tokens, request.temperature, request.budget) == (16, None, None)
    assert request.seed is None and timeout_s == 10.0 and stream


def test_the_sooner_of_two_deadlines_counts() -> None:
    tensors = ASKED | {"timeout_s": one(2.0, "float64")}
    assert checked(tensors, "", 1_000_000)[1] == 1.0
    assert checked(tensors, "", 3_000_000)[1] == 2.0
    assert checked(ASKED, "", 99_000_000)[1] == 10.0


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_pictures_in_base64_are_the_same_pictures(form: str) -> None:
    data = file(form=form)
    coded = checked(ASKED | {"images_base64": texts(base64.b64encode(data))})[0]
    assert coded.images == checked(ASKED | {"images": texts(data)})[0].images


BAD: list[tuple[dict[str, np.ndarray], str]] = [
    ({}, "either prompt or messages"),
    ({**ASKED, "messages": texts("[]")}, "not both"),
    ({"prompt": texts("a", "b")}, "prompt must be one string"),
    ({"prompt": texts(b"\xff")}, "prompt is not UTF-8"),
    ({"prompt": np.array([3], np.int64)}, "prompt must be bytes"),
    ({"prompt": texts("a" * 201)}, "201 bytes, but max_prompt_bytes is 200"),
    ({"messages": texts("{")}, "messages is not valid JSON"),
    ({"messages": texts("[" * 190)}, "messages is not valid JSON"),
    ({"messages": texts("[]")}, "the prompt has no text"),
    ({"messages": texts('{"role": "user"}')}, "JSON list"),
    ({"messages": texts('["hello"]')}, "a message must be"),
    ({"messages": texts('[{"role": "user", "content": "a", "x": 1}]')}, "nothing else"),
    ({"messages": texts('[{"role": 1, "content": "a"}]')}, "role must be a string"),
    ({"messages": texts('[{"role": "user", "content": 5}]')}, "content .* must be a string"),
    (
        {"messages": texts('[{"role": "user", "content": "\\ud800"}]')},
        "not valid JSON .*is no Unicode",
    ),
    ({"messages": texts('[{"role": "user", "content": [{"type": "text"}]}]')}, "content item"),
    (
        {"messages": texts('[{"role":"user","content":[{"type":"image","path":"/etc/passwd"}]}]')},
        "content item",
    ),
    (
        {"messages": texts('[{"role":"user","content":[{"type":"image_url","image_url":"a"}]}]')},
        "pictures themselves",
    ),
    ({**ASKED, "images": texts(*[file()] * 3)}, "3 images, but max_images is 2"),
    ({**ASKED, "images": texts(b"x" * 20_001)}, "20001 bytes, but max_image_bytes is 20000"),
    (
        {**ASKED, "images": texts(file(200, 60, "JPEG"))},
        "200 x 60 pixels, but max_image_pixels is 10000",
    ),
    (
        {**ASKED, "images": texts(*[file(100, 70)] * 2)},
        "images 0 to 1 have 14000 pixels, but max_request_pixels is 12000",
    ),
    ({**ASKED, "images": texts("/etc/passwd")}, "image 0: .* cannot be read as a picture"),
    ({**ASKED, "images": texts(b"")}, "cannot be read as a picture"),
    ({**ASKED, "images": texts(file(form="ICO"))}, "cannot be read as a picture"),
    ({**ASKED, "images": np.zeros((1, 5), np.uint8)}, "images must be a list of strings"),
    ({**ASKED, "images": texts(file()), "images_base64": texts("")}, "not both"),
    ({**ASKED, "images_base64": texts("data:image/png;base64,AAAA")}, "not base64"),
    ({**ASKED, "images_base64": texts("AAA")}, "not base64"),
    (
        {**ASKED, "images_base64": texts(base64.b64encode(b"x" * 20_001))},
        "20001 bytes, but max_image_bytes",
    ),
    ({**ASKED, "max_tokens": one(0, "int32")}, "max_tokens must be 1 to 32, got 0"),
    ({**ASKED, "max_tokens": one(33, "int32")}, "max_tokens must be 1 to 32, got 33"),
    ({**ASKED, "max_tokens": one(5, "int64")}, "max_tokens must be one int32"),
    ({**ASKED, "max_tokens": np.zeros(0, np.int32)}, "max_tokens must be one int32"),
    ({**ASKED, "temperature": one(np.nan, "float64")}, "temperature must be a finite"),
    ({**ASKED, "temperature": one(-1, "float64")}, "temperature must be 0 or more"),
    ({**ASKED, "top_p": one(0, "float64")}, "top_p"),
    ({**ASKED, "suppress_tokens": one(1, "int32")}, "suppress_tokens must be a list of int64"),
    ({**ASKED, "suppress_tokens": np.array([[1]])}, "suppress_tokens must be a list of int64"),
    ({**ASKED, "suppress_tokens": np.array([-1])}, "suppress_tokens must be token ids"),
    ({**ASKED, "bad_words": texts("abcdef")}, "a bad word has 6 bytes"),
    ({**ASKED, "seed": one(-1, "int64")}, "seed"),
    ({**ASKED, "stop": texts("a", "b", "c")}, "3 stop strings, but max_stop is 2"),
    ({**ASKED, "stop": texts("abcdef")}, "max_stop_bytes = 5"),
    ({**ASKED, "stop": texts("")}, "a stop string has 0 bytes"),
    ({**ASKED, "budget": one(1.5, "float64")}, "a budget of 1.5 is not possible"),
    ({**ASKED, "timeout_s": one(11, "float64")}, "max_timeout_s = 10"),
    ({**ASKED, "timeout_s": one(np.inf, "float64")}, "finite"),
    ({**ASKED, "image": texts(file())}, "unknown input 'image'"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_named(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        checked(tensors)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ('{"temprature": 1}', "unknown parameter 'temprature'"),
        ('{"stream": "no"}', "stream must"),
        ('{"id": 1.5}', "id must be a whole number or a text"),
        ('{"id": true}', "id must be a whole number or a text"),
        ('{"id": null}', "id must be a whole number or a text"),
        ('{"id": "\\ud800"}', "id.* is no Unicode"),
        (json.dumps({"id": "x" * 257}), "id has 257 characters, but it may have 256"),
        ("[1]", "parameters must be an object"),
        ("[" * 100_000, "parameters is not valid JSON"),
        ('{"stream": nan}', "parameters is not valid JSON"),
    ],
)
def test_unknown_parameters_are_named(parameters: str, message: str) -> None:
    with pytest.raises(TrioError, match=message):
        checked(ASKED, parameters)


@given(st.dictionaries(st.sampled_from([*INPUTS, "other"]), arrays, max_size=6), st.integers(0, 9))
@settings(max_examples=400, deadline=None)
def test_anything_at_all_is_a_question_or_an_error(
    tensors: dict[str, np.ndarray], timeout_us: int
) -> None:
    try:
        request = checked(tensors, "", timeout_us)[0]
    except TrioError:
        return
    assert all(isinstance(image, bytes) for image in request.images)
