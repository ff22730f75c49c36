"""A field of a request of the wrong kind is one error that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from trio_deploy import Request, TrioError

PICTURE = Image.new("RGB", (4, 4))
GOOD: list[dict[str, Any]] = [
    {},
    {"prompt": ({"role": "user", "content": "a"},)},
    {"images": PICTURE},
    {"images": [PICTURE, "a.png", b"", bytearray(), memoryview(b"")]},
    {"max_new_tokens": np.int64(3), "budget": np.float32(0.5)},
    {"stop": "a", "keep": [0.5, 3, np.float64(0.1)], "forced": np.array([1, 2])},
    {"top_logprobs": 0, "ignore_eos": True},
    {"top_logprobs": 20},
    {"forced": range(3), "keep": (1.0,), "stop": ("a", "b")},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt must be a text or a list of messages, got None"),
    ({"prompt": b"what ?"}, "prompt must be a text or a list of messages, got bytes"),
    ({"prompt": {"role": "user", "content": "a"}}, "prompt must be .* got dict"),
    ({"prompt": "half \ud83d"}, "the prompt is not valid Unicode, at character 5"),
    ({"images": 5}, "images must be pictures or a list of them, got 5"),
    ({"images": {"a.png"}}, "images must be pictures or a list of them, got set"),
    ({"images": [None]}, r"images\[0\] must be .*, got None"),
    ({"images": ["a.png", 5]}, r"images\[1\] must be .*, got 5"),
    ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, got '5'"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, got 1.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
    ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
    ({"max_new_tokens": 10**5000}, "max_new_tokens must be a whole number, got int"),
    ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
    ({"stop": 5}, "stop must be a list, got 5"),
    ({"stop": [5]}, "stop must be texts, got 5"),
    ({"stop": "\udc80"}, "a stop string is not valid Unicode"),
    ({"budget": "0.5"}, "budget must be a finite number, got '0.5'"),
    ({"budget": float("nan")}, "budget must be a finite number, got nan"),
    ({"budget": [0.5]}, "budget must be a finite number, got list"),
    ({"keep": 0.5}, "keep must be a list, got 0.5"),
    ({"keep": ["a"]}, "keep must be a finite number, got 'a'"),
    ({"forced": "abc"}, "forced must be a list, got 'abc'"),
    ({"forced": [1.5]}, "forced must be a whole number, got 1.5"),
    ({"forced": [-1]}, "forced has the token -1"),
    ({"forced": [10]}, "forced has the token 10"),
    ({"raw": "yes"}, "raw must be true or false, got 'yes'"),
    ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
    ({"top_logprobs": -1}, "top_logprobs must be 0 to 20, got -1"),
    ({"top_logprobs": 21}, "top_logprobs must be 0 to 20, got 21"),
    ({"top_logprobs": True}, "top_logprobs must be a whole number, got True"),
    ({"bundle_sampling": 1}, "bundle_sampling must be true or false, got 1"),
    ({"temperature": "hot"}, "temperature"),
    ({"seed": "a"}, "seed"),
]


@pytest.mark.parametrize("fields", GOOD)
def test_what_a_field_may_hold(fields: dict[str, Any]) -> None:
    Request(**({"prompt": "what ?"} | fields)).check(10)


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_wrong_kind_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        Request(**({"prompt": "what ?"} | fields)).check(10)
