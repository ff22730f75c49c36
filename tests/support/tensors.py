"""Tensors as Triton hands them to a model."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.support.pictures import make_picture


def file(width: int = 60, height: int = 40, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    make_picture(width, height).save(out, form)
    return out.getvalue()


def texts(*values: str | bytes) -> np.ndarray:
    array = np.empty(len(values), np.object_)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return array


def one(value: float, dtype: str) -> np.ndarray:
    return np.array([value], dtype)


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)

arrays = st.one_of(
    st.lists(st.binary(max_size=60), max_size=3).map(lambda values: texts(*values)),
    st.text(max_size=40).map(texts),
    json_values.map(lambda value: texts(json.dumps(value).encode(errors="replace"))),
    st.lists(st.floats(), max_size=3).map(lambda v: np.array(v, np.float64)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda v: np.array(v, np.int64)),
    st.integers(-(2**31), 2**31 - 1).map(lambda v: one(v, "int32")),
    st.just(np.zeros((2, 2), np.float64)),
    st.just(np.zeros((), np.int32)),
    st.just(texts(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)),
    st.just(texts(file())),
)
