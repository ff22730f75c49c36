"""What is printed when the server listens: where, what, and how to ask."""

from __future__ import annotations

import base64
import io
import json
import shlex

from PIL import Image, ImageDraw

from trio_deploy.files import format_bytes
from trio_deploy.serve.openai.app import Served
from trio_deploy.serve.openai.keys import API_KEY

_QUESTION = "what color is the circle?"


def greeting(served: Served, url: str) -> str:
    """Lines that say where the server listens, its limits, and two ways to ask that work so."""
    limits = served.service.limits
    batcher = limits.batcher
    budget = "the bundle's budget" if limits.budget is None else f"budget {limits.budget:g}"
    lines = [
        f"trio serves {served.name} at {url}/v1 ({served.pipeline.ran_as})",
        f"a page to try it: {url}/",
        f"limits: context {served.context} tokens, answers {limits.max_tokens} tokens "
        f"({limits.default_max_tokens} unless asked for), {limits.max_images} pictures of "
        f"{format_bytes(limits.max_image_bytes)}, {batcher.max_rows} requests at a time and "
        f"{batcher.max_queue} waiting, {budget}",
        "",
        *_curl(served, url),
        "",
        *_python(served, url),
    ]
    return "\n".join(lines)


def _curl(served: Served, url: str) -> list[str]:
    key = f' -H "Authorization: Bearer ${API_KEY}"' if served.doors.keys else ""
    body = json.dumps({"model": served.name, "messages": _messages()})
    return [
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(body)}"
    ]


def _python(served: Served, url: str) -> list[str]:
    key = f'os.environ["{API_KEY}"]' if served.doors.keys else '"none"'
    return [
        *(["import os"] if served.doors.keys else []),
        "from openai import OpenAI  # pip install openai",
        f'client = OpenAI(base_url="{url}/v1", api_key={key})',
        f"messages = {json.dumps(_messages())}",
        f"answer = client.chat.completions.create(model={json.dumps(served.name)}, "
        "messages=messages)",
        "print(answer.choices[0].message.content)",
    ]


def _messages() -> list[dict[str, object]]:
    """A question about a picture that is short enough for a line."""
    parts = [
        {"type": "image_url", "image_url": {"url": _picture()}},
        {"type": "text", "text": _QUESTION},
    ]
    return [{"role": "user", "content": parts}]


def _picture() -> str:
    """A red circle on white, as a data URI of some 300 characters."""
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(image).ellipse((12, 12, 51, 51), fill=1)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, bits=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
