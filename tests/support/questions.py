"""Requests that come and go give the answers they would give alone; no fault is felt by others."""

from __future__ import annotations

from typing import Any

import numpy as np

from trio_deploy import Generation

# The first layer sees every visual token, so that there are budgets that cannot be reached.
SCHEDULE = "1:0.285,5:0.167,8:0.07"
COLOR = "what color is the circle ?"
IMAGE_ITEM = {"type": "image"}


def ask(text: str, images: int = 1) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[IMAGE_ITEM] * images, {"type": "text", "text": text}]}]


def alike(one: Generation, other: Generation) -> bool:
    return (
        one.token_ids == other.token_ids
        and one.text == other.text
        and one.finish_reason == other.finish_reason
        and one.kv_bytes == other.kv_bytes
        and one.layer_ranges == other.layer_ranges
        and all(np.array_equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    )
