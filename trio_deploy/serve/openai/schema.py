"""The description of the API in OpenAPI's form, from the structs of its bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from trio_deploy import __version__
from trio_deploy.serve.openai.bodies import (
    ChatBody,
    ChatCompletion,
    Chunk,
    DetokenizeBody,
    Detokenized,
    Error,
    Model,
    Models,
    TokenizeBody,
    Tokens,
)

_BODIES = {
    "/v1/chat/completions": (ChatBody, ChatCompletion, "Answer a conversation with pictures"),
    "/tokenize": (TokenizeBody, Tokens, "Tokens of a text or of a conversation"),
    "/detokenize": (DetokenizeBody, Detokenized, "Text of tokens"),
}
_PLAIN = {
    "/v1/models": (Models, "The model that is served"),
    "/v1/models/{name}": (Model, "The model, by its name"),
    "/health": (None, "Whether the threads that answer run"),
    "/ready": (None, "Whether requests are taken"),
    "/metrics": (None, "Metrics in Prometheus' text format"),
}


def openapi() -> dict[str, Any]:
    """The document behind /openapi.json."""
    kinds: list[Any] = [ChatBody, ChatCompletion, Chunk, TokenizeBody, Tokens, Error]
    kinds += [DetokenizeBody, Detokenized, Model, Models]
    _, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for path, (body, answer, summary) in _BODIES.items():
        operation = _operation(summary, answer)
        operation["requestBody"] = {"required": True, "content": _json(body)}
        paths[path] = {"post": operation}
    stream = {"schema": {"type": "string", "description": "server-sent events, each a Chunk"}}
    answers = paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    answers["text/event-stream"] = stream
    for path, (kind, summary) in _PLAIN.items():
        paths[path] = {"get": _operation(summary, kind)}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    return {
        "openapi": "3.1.0",
        "info": {"title": "trio serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(summary: str, answer: Any) -> dict[str, Any]:
    good: dict[str, Any] = {"description": summary}
    if answer is not None:
        good["content"] = _json(answer)
    error = {"description": "What is wrong", "content": _json(Error)}
    return {"summary": summary, "responses": {"200": good, "default": error}}


def _json(kind: Any) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"application/json": {"schema": reference}}
