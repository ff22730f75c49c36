"""Whatever a client sends is a request of the pipeline or one clear error."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.pictures import make_picture
from tests.support.tensors import file, json_values, text
from trio_deploy import TrioError
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest, check_request

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
    max_banned=3,
    max_timeout_s=10.0,
)
ASKED = ClientRequest(prompt=b"what ?")


def images(client: ClientRequest, limits: ServiceLimits = LIMITS) -> Any:
    return check_request(client, limits)[0].images


def test_a_whole_request_becomes_one_of_the_pipeline() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, text("what ?")]}]
    client = ClientRequest(
        messages=json.dumps(messages).encode(),
        images=[file()],
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["ä".encode(), b"b"],
        budget=0.111,
        timeout_s=2.5,
    )
    request, timeout_s = check_request(client, LIMITS)
    assert request.prompt == messages and request.images == [file()] and timeout_s == 2.5
    assert (request.max_new_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.seed, request.stop, request.budget) == (3, ["ä", "b"], 0.111)


def test_what_is_not_given_has_the_services_defaults() -> None:
    limits = ServiceLimits(budget=0.3, default_max_tokens=9)
    request, timeout_s = check_request(ASKED, limits)
    assert (request.max_new_tokens, request.temperature, request.top_p) == (9, None, None)
    assert (request.budget, request.seed, timeout_s) == (0.3, None, 300.0)


def test_the_earlier_of_two_deadlines_counts() -> None:
    def timeout(own: float | None, transport: float) -> float:
        client = replace(ASKED, timeout_s=own, transport_timeout_s=transport)
        return check_request(client, LIMITS)[1]

    assert (timeout(2.0, 1.0), timeout(2.0, 3.0), timeout(None, 99.0)) == (1.0, 2.0, 10.0)


def test_bytes_and_pictures_are_counted_as_they_were_sent() -> None:
    assert (ASKED.nbytes, ASKED.pictures) == (6, 0)
    client = ClientRequest(messages=b"[]", images_base64=[b"abcd", b"ef"], stop=[b"x"])
    assert (client.nbytes, client.pictures) == (2 + 6 + 1, 2)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_pictures_in_base64_are_the_same_pictures(form: str) -> None:
    data = file(form=form)
    coded = replace(ASKED, images_base64=[base64.b64encode(data)])
    assert images(coded) == images(replace(ASKED, images=[data])) == [data]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "either prompt or messages"),
    ({"messages": b"[]"}, "not both"),
    ({"prompt": b"\xff"}, "prompt is not UTF-8"),
    ({"prompt": b"a" * 201}, "201 bytes, but max_prompt_bytes is 200"),
    ({"images": [file()] * 3}, "3 images, but max_images is 2"),
    ({"images": [b"x" * 20_001]}, "20001 bytes, but max_image_bytes is 20000"),
    ({"images": [file(200, 60, "JPEG")]}, "200 x 60 pixels, but max_image_pixels is 10000"),
    (
        {"images": [file(100, 70)] * 2},
        "images 0 to 1 have 14000 pixels, but max_request_pixels is 12000",
    ),
    ({"images": [b"/etc/passwd"]}, "image 0: .* cannot be read as a picture"),
    ({"images": [b""]}, "cannot be read as a picture"),
    ({"images": [file(form="ICO")]}, "cannot be read as a picture"),
    ({"images": [file()], "images_base64": [b""]}, "not both"),
    ({"images_base64": [b"data:image/png;base64,AAAA"]}, "not base64"),
    ({"images_base64": [b"AAA"]}, "not base64"),
    (
        {"images_base64": [base64.b64encode(b"x" * 20_001)]},
        "20001 bytes, but max_image_bytes",
    ),
    ({"max_tokens": 0}, "max_tokens must be 1 to 32, got 0"),
    ({"max_tokens": 33}, "max_tokens must be 1 to 32, got 33"),
    ({"temperature": float("nan")}, "temperature must be a finite"),
    ({"temperature": -1.0}, "temperature must be 0 or more"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": float("nan")}, "presence_penalty"),
    ({"frequency_penalty": 3.0}, "frequency_penalty"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ({"min_tokens": -1}, "min_tokens must be 0 or more"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens is 4, but max_tokens is 3"),
    ({"suppress_tokens": [1] * 4}, "4 suppress_tokens, but max_banned is 3"),
    ({"suppress_tokens": [-1]}, "suppress_tokens"),
    ({"bad_words": [b"a"] * 4}, "4 bad_words, but max_banned is 3"),
    ({"bad_words": [b""]}, "a bad word has 0 bytes"),
    ({"bad_words": [b"abcdef"]}, "max_stop_bytes = 5"),
    ({"bad_words": [b"\xff"]}, "a bad word is not UTF-8"),
    ({"seed": -1}, "seed"),
    ({"stop": [b"a", b"b", b"c"]}, "3 stop strings, but max_stop is 2"),
    ({"stop": [b"abcdef"]}, "max_stop_bytes = 5"),
    ({"stop": [b""]}, "a stop string has 0 bytes"),
    ({"stop": [b"\xff"]}, "a stop string is not UTF-8"),
    ({"budget": 11.0}, "a budget of 11 is not possible: .* did you mean 0.11"),
    ({"timeout_s": 11.0}, "max_timeout_s = 10"),
    ({"timeout_s": float("inf")}, "finite"),
]
BAD_MESSAGES = [
    ("{", "messages is not valid JSON"),
    ("[" * 190, "messages is not valid JSON"),
    ("[]", "the prompt has no text: write something to ask"),
    ('[{"role": "user", "content": " "}]', "the prompt has no text: write something to ask"),
    (
        '[{"role": "user", "content": [{"type": "image"}]}]',
        "the prompt has no text: write something to ask",
    ),
    ('{"role": "user"}', "JSON list"),
    ('["hello"]', "a message must be"),
    ('[{"role": "user", "content": "a", "x": 1}]', "nothing else"),
    ('[{"role": 1, "content": "a"}]', "role must be a string"),
    ('[{"role": "user", "content": 5}]', "content .* must be a string"),
    ('[{"role": "user", "content": "\\ud800"}]', "not valid JSON .*is no Unicode"),
    ('[{"role": "user", "content": [{"type": "text"}]}]', "content item"),
    ('[{"role":"user","content":[{"type":"image","path":"/etc/passwd"}]}]', "content item"),
    (
        '[{"role":"user","content":[{"type":"image_url","image_url":"a"}]}]',
        "pictures themselves",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        check_request(replace(ASKED, **fields), LIMITS)


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_messages_that_are_none_are_named(messages: str, message: str) -> None:
    with pytest.raises(TrioError, match=message):
        check_request(ClientRequest(messages=messages.encode()), LIMITS)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "PNG")
    with pytest.raises(TrioError, match="too large|max_image_pixels"):
        images(replace(ASKED, images=[out.getvalue()]), ServiceLimits(max_image_bytes=10**7))


def test_a_jpeg_that_goes_over_its_picture_without_end_is_refused() -> None:
    out = io.BytesIO()
    make_picture().save(out, "JPEG", progressive=True)
    sound, end = out.getvalue()[:-2], b"\xff\xd9"
    assert out.getvalue().endswith(end)
    scan = sound[sound.rindex(b"\xff\xda") :]
    with pytest.raises(TrioError, match="scans, but at most 100"):
        images(replace(ASKED, images=[sound + scan * 200 + end]), ServiceLimits())
    film = sound + end + scan * 200  # nothing behind the picture's end is decoded
    for data in (sound + scan + end, film, file(form="JPEG")):
        assert images(replace(ASKED, images=[data]), ServiceLimits()) == [data]


texts = st.none() | st.binary(max_size=60)
lists = st.none() | st.lists(st.binary(max_size=60) | st.just(file()), max_size=3)
numbers = st.none() | st.floats()
whole = st.none() | st.integers(-(2**31), 2**31 - 1)


@given(
    st.builds(
        ClientRequest,
        prompt=texts,
        messages=texts | json_values.map(lambda v: json.dumps(v).encode(errors="replace")),
        images=lists,
        images_base64=lists,
        max_tokens=st.none() | st.integers(-(2**31), 2**31 - 1),
        temperature=numbers,
        top_k=whole,
        top_p=numbers,
        min_p=numbers,
        repetition_penalty=numbers,
        presence_penalty=numbers,
        frequency_penalty=numbers,
        no_repeat_ngram_size=whole,
        min_tokens=whole,
        suppress_tokens=st.none() | st.lists(st.integers(-2, 2**63 - 1), max_size=4),
        bad_words=lists,
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        stop=lists,
        budget=numbers,
        timeout_s=numbers,
        transport_timeout_s=st.none() | st.floats(0, 10),
    )
)
@settings(max_examples=400)
def test_anything_at_all_is_a_request_or_an_error(client: ClientRequest) -> None:
    try:
        request, timeout_s = check_request(client, LIMITS)
    except TrioError:
        return
    assert all(isinstance(image, bytes) for image in request.images) and timeout_s <= 10.0


@pytest.mark.filterwarnings("ignore")  # Pillow's about what it reads in spite of faults
@given(st.binary(max_size=400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_behind_a_pictures_beginning_are_a_picture_or_an_error(
    tail: bytes, form: str
) -> None:
    data = file(form=form)[:40] + tail
    try:
        images(replace(ASKED, images=[data]))
    except TrioError:
        return
