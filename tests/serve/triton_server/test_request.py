"""Whatever a client sends is a question or one clear error."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.pictures import make_picture
from tests.support.tensors import arrays, file, one, text, texts
from trio_deploy import TrioError
from trio_deploy.serve.limits import Settings, check_settings
from trio_deploy.serve.triton_server.request import INPUTS, read

LIMITS = Settings(
    "bundle",
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


def test_a_whole_request_is_read() -> None:
    tensors = {
        "messages": texts(
            json.dumps([{"role": "user", "content": [{"type": "image"}, text("what ?")]}])
        ),
        "images": texts(file()),
        "max_tokens": one(7, "int32"),
        "temperature": one(0.5, "float64"),
        "top_p": one(0.9, "float64"),
        "seed": one(3, "int64"),
        "stop": texts("ä", "b"),
        "budget": one(0.111, "float64"),
        "timeout_s": one(2.5, "float64"),
    }
    assert set(tensors) | {"prompt", "images_base64"} == set(INPUTS)
    question = read(tensors, '{"stream": false}', 0, LIMITS)
    request = question.request
    assert request.prompt == [{"role": "user", "content": [{"type": "image"}, text("what ?")]}]
    assert (request.max_new_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.seed, request.stop, request.budget) == (3, ["ä", "b"], 0.111)
    assert request.images == [file()] and not question.stream and question.timeout_s == 2.5


def test_what_is_not_said_has_the_models_defaults() -> None:
    question = read(ASKED, "", 0, Settings("b", budget=0.3, default_max_tokens=9))
    request = question.request
    assert (request.max_new_tokens, request.temperature, request.budget) == (9, 0.0, 0.3)
    assert request.seed is None and question.timeout_s == 300.0 and question.stream


def test_the_sooner_of_two_deadlines_counts() -> None:
    tensors = ASKED | {"timeout_s": one(2.0, "float64")}
    assert read(tensors, "", 1_000_000, LIMITS).timeout_s == 1.0
    assert read(tensors, "", 3_000_000, LIMITS).timeout_s == 2.0
    assert read(ASKED, "", 99_000_000, LIMITS).timeout_s == 10.0


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_pictures_in_base64_are_the_same_pictures(form: str) -> None:
    data = file(form=form)
    coded = read(ASKED | {"images_base64": texts(base64.b64encode(data))}, "", 0, LIMITS)
    assert (
        coded.request.images == read(ASKED | {"images": texts(data)}, "", 0, LIMITS).request.images
    )


BAD: list[tuple[dict[str, np.ndarray], str]] = [
    ({}, "either prompt or messages"),
    ({**ASKED, "messages": texts("[]")}, "not both"),
    ({"prompt": texts("a", "b")}, "prompt must be one string"),
    ({"prompt": texts(b"\xff")}, "prompt is not UTF-8"),
    ({"prompt": np.array([3], np.int64)}, "prompt must hold bytes"),
    ({"prompt": texts("a" * 201)}, "201 bytes, but max_prompt_bytes is 200"),
    ({"messages": texts("{")}, "messages is not JSON"),
    ({"messages": texts("[" * 190)}, "messages is not JSON"),
    ({"messages": texts("[]")}, "JSON list"),
    ({"messages": texts('{"role": "user"}')}, "JSON list"),
    ({"messages": texts('["hello"]')}, "a message must be"),
    ({"messages": texts('[{"role": "user", "content": "a", "x": 1}]')}, "nothing else"),
    ({"messages": texts('[{"role": 1, "content": "a"}]')}, "role must be a string"),
    ({"messages": texts('[{"role": "user", "content": 5}]')}, "content .* must be a string"),
    ({"messages": texts('[{"role": "user", "content": "\\ud800"}]')}, "not valid Unicode"),
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
    ({**ASKED, "seed": one(-1, "int64")}, "seed"),
    ({**ASKED, "stop": texts("a", "b", "c")}, "3 stop strings, but max_stop is 2"),
    ({**ASKED, "stop": texts("abcdef")}, "max_stop_bytes = 5"),
    ({**ASKED, "stop": texts("")}, "a stop string has 0 bytes"),
    ({**ASKED, "budget": one(1.5, "float64")}, "budget must be above 0"),
    ({**ASKED, "timeout_s": one(11, "float64")}, "max_timeout_s = 10"),
    ({**ASKED, "timeout_s": one(np.inf, "float64")}, "finite"),
    ({**ASKED, "image": texts(file())}, "unknown input 'image'"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_named(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        read(tensors, "", 0, LIMITS)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ('{"temprature": 1}', "unknown parameter 'temprature'"),
        ('{"stream": "no"}', "stream must"),
        ('{"stream": nan}', "not JSON"),
    ],
)
def test_unknown_parameters_are_named(parameters: str, message: str) -> None:
    with pytest.raises(TrioError, match=message):
        read(ASKED, parameters, 0, LIMITS)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "PNG")
    bomb = Settings("b", max_image_bytes=10**7)
    with pytest.raises(TrioError, match="too large|max_image_pixels"):
        read(ASKED | {"images": texts(out.getvalue())}, "", 0, bomb)


def test_a_jpeg_that_goes_over_its_picture_without_end_is_refused() -> None:
    out = io.BytesIO()
    make_picture().save(out, "JPEG", progressive=True)
    sound, end = out.getvalue()[:-2], b"\xff\xd9"
    assert out.getvalue().endswith(end)
    scan = sound[sound.rindex(b"\xff\xda") :]
    bomb = texts(sound + scan * 200 + end)
    with pytest.raises(TrioError, match="scans, but at most 100"):
        read(ASKED | {"images": bomb}, "", 0, Settings("b"))
    film = sound + end + scan * 200  # behind the picture's end nothing is decoded
    for data in (sound + scan + end, film, file(form="JPEG")):
        assert read(ASKED | {"images": texts(data)}, "", 0, Settings("b")).request.images == [data]


@given(st.dictionaries(st.sampled_from([*INPUTS, "other"]), arrays, max_size=6), st.integers(0, 9))
@settings(max_examples=400, deadline=None)
def test_anything_at_all_is_a_question_or_an_error(
    tensors: dict[str, np.ndarray], timeout_us: int
) -> None:
    try:
        request = read(tensors, "", timeout_us, LIMITS).request
    except TrioError:
        return
    assert all(isinstance(image, bytes) for image in request.images)


@pytest.mark.filterwarnings("ignore")  # Pillow's about what it reads in spite of faults
@given(st.binary(max_size=400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_behind_a_pictures_beginning_are_a_picture_or_an_error(
    tail: bytes, form: str
) -> None:
    data = file(form=form)[:40] + tail
    try:
        read(ASKED | {"images": texts(data)}, "", 0, LIMITS)
    except TrioError:
        return


def test_settings_are_read_from_strings() -> None:
    given = {"bundle": "1/bundle", "max_tokens": "64", "warm_up": "False", "budget": "0.2"}
    parsed = Settings.parse(given | {"target": ""})
    assert parsed == Settings(
        "1/bundle", max_tokens=64, default_max_tokens=64, warm_up=False, budget=0.2
    )
    assert check_settings(given) == given


@pytest.mark.parametrize("provider", ["cpu", "CUDA", "CUDAExecutionProvider"])
def test_providers_are_called_as_trio_run_calls_them(provider: str) -> None:
    given = {"bundle": "b", "runtime": "onnxruntime", "provider": provider}
    assert Settings.parse(given).provider == provider


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "'bundle' must name"),
        ({"bundle": "b", "max_image": "3"}, "unknown parameter 'max_image'"),
        ({"bundle": "b", "max_rows": "0"}, "max_rows must be 1 or more"),
        ({"bundle": "b", "max_rows": "1.5"}, "max_rows must be a whole number"),
        ({"bundle": "b", "prefillers": "-1"}, "prefillers must be 0 or more"),
        ({"bundle": "b", "budget": "nan"}, "budget must be above 0"),
        ({"bundle": "b", "budget": "2"}, "budget must be at most 1"),
        ({"bundle": "b", "warm_up": "yes"}, "warm_up must be true or false"),
        ({"bundle": "b", "max_image_pixels": "999999999"}, "max_image_pixels must be at most"),
        ({"bundle": "b", "default_max_tokens": "2000"}, "default_max_tokens must be at most"),
        ({"bundle": "b", "max_queue_bytes": "0"}, "max_queue_bytes must be 1 or more"),
        ({"bundle": "b", "max_rows": "5000"}, "max_rows must be at most 4096, got 5000"),
        ({"bundle": "b", "max_queue": "1000000"}, "max_queue must be at most 65536"),
        ({"bundle": "b", "threads": "9999"}, "threads must be at most 1024"),
        ({"bundle": "b", "max_timeout_s": "1e9"}, "max_timeout_s must be at most 86400"),
        ({"bundle": "b", "provider": "gpu"}, "unknown provider 'gpu'.*: choose cpu, cuda"),
        ({"bundle": "b", "precision": "fp8"}, "unknown precision 'fp8'"),
        ({"bundle": "b", "runtime": "tensorflow"}, "unknown runtime 'tensorflow'"),
        (
            {"bundle": "b", "runtime": "tensorrt", "threads": "2"},
            "threads is no option of TensorRT",
        ),
    ],
)
def test_wrong_settings_are_named(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        Settings.parse(parameters)
