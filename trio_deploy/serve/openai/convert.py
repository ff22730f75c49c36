"""From a body to a request of the service, and from a generation to an answer."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, Raw, UnsetType

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.draw import pruned_before
from trio_deploy.pipeline.grammar import Structure
from trio_deploy.pipeline.prompt import PromptEncoder
from trio_deploy.pipeline.request import Generation
from trio_deploy.pipeline.sampling import TokenLogprobs
from trio_deploy.serve.fetch import ImageHosts
from trio_deploy.serve.openai.bodies import (
    ChatBody,
    ImagePart,
    Kept,
    KeptOfImage,
    Logprobs,
    Message,
    Part,
    PromptDetails,
    TextPart,
    TokenChance,
    TokenCounts,
    TokenLogprob,
    TrioAnswer,
    TrioOptions,
    Usage,
)
from trio_deploy.serve.openai.errors import ApiError, invalid
from trio_deploy.serve.pictures import data_uri_content, is_data_uri
from trio_deploy.serve.requests import ClientRequest

_UNSUPPORTED = (
    "functions",
    "function_call",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
)
_LEAST_LOGPROB = -9999.0  # what OpenAI gives for tokens that cannot come: JSON has no infinity
_PLACE = "messages[{}].content[{}]"

Files = Mapping[str, bytes]
"""Contents of pictures by their addresses."""
_NO_FILES: Files = {}


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        clients: requests of the service, one per answer; they differ in their seeds.
        stream, usage: whether the answer comes in chunks, and one of them has the usage.
        logprobs: whether tokens come with their probabilities.
        kept, timings: parts of `TrioAnswer`.
    """

    clients: list[ClientRequest]
    stream: bool
    usage: bool
    logprobs: bool
    kept: bool
    timings: bool


def to_asked(body: ChatBody, max_n: int, files: Files = _NO_FILES, *, draws: bool = False) -> Asked:
    """Read what a body asks for.

    Args:
        max_n: most answers.
        files: contents of the pictures that it names by address.
        draws: whether tokens are drawn where the body names no temperature.

    Raises:
        ApiError: it asks for what this server does not do.
    """
    _refuse_unsupported(body)
    trio = body.trio or TrioOptions()
    top = body.top_logprobs
    if top is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    messages, pictures = to_messages(body.messages, files)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    client = ClientRequest(
        messages=messages,
        images_base64=pictures,
        max_tokens=_max_tokens(body),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(0, body.top_k),  # -1 is vLLM's "all"
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        ignore_eos=bool(body.ignore_eos),
        cache_images=trio.cache is not False,
        structure=_structure(body),
        top_logprobs=(top or 0) if body.logprobs else None,
        seed=None if body.seed is None else body.seed % 2**64,
        stop=None if stop is None else [text.encode(errors="surrogatepass") for text in stop],
        budget=trio.budget,
        timeout_s=trio.timeout_s,
    )
    return Asked(
        _answers(client, body.n or 1, max_n, draws),
        stream=bool(body.stream),
        usage=_include_usage(body),
        logprobs=bool(body.logprobs),
        kept=bool(trio.kept),
        timings=bool(trio.timings),
    )


def _answers(client: ClientRequest, count: int, most: int, draws: bool) -> list[ClientRequest]:
    if count > most:
        raise invalid(f"n is {count}, but at most {most} answers are given (max_n, max_queue)", "n")
    if count > 1 and client.temperature == 0:
        raise invalid("at temperature 0 all answers are the same: set n to 1", "n")
    if count > 1 and client.temperature is None and not draws:
        raise invalid(
            "without a temperature this model takes the most likely tokens, so all answers are "
            "the same: set n to 1, or a temperature",
            "n",
        )
    if client.seed is None:
        return [client] * count
    return [replace(client, seed=client.seed + number) for number in range(count)]


def _refuse_unsupported(body: ChatBody) -> None:
    given: dict[str, Any] = {name: getattr(body, name) for name in _UNSUPPORTED}
    given["tools"] = body.tools or None
    given["tool_choice"] = None if body.tool_choice in ("none", "auto") else body.tool_choice
    given["modalities"] = None if body.modalities == ["text"] else body.modalities
    given["store"] = body.store or None
    for name, value in given.items():
        if value is not None:
            raise _unsupported(name)


def _unsupported(what: str) -> ApiError:
    return invalid(f"{what} is not supported: leave it out", what, "unsupported_parameter")


def _include_usage(body: ChatBody) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise invalid("stream_options need stream: true", "stream_options")
    return bool(body.stream_options.include_usage)


def _max_tokens(body: ChatBody) -> int | None:
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise invalid(
            f"max_tokens is {older}, but max_completion_tokens is {newer}: give one", "max_tokens"
        )
    return older if newer is None else newer


def _structure(body: ChatBody) -> Structure | None:
    """The form that an answer must have."""
    asked = body.response_format
    form = None if asked is None or asked.type == "text" else asked
    outputs = body.structured_outputs
    if outputs is not None:
        schema = _text_of(outputs.json)
        given = [each for each in (outputs.choice, outputs.regex, schema) if each is not None]
        if len(given) != 1 or form is not None:
            raise invalid(
                "give one of choice, regex and json, and no response_format", "structured_outputs"
            )
        if outputs.choice is not None and not all(outputs.choice or [""]):
            raise invalid("choice must be texts that are not empty", "structured_outputs.choice")
        choices = tuple(outputs.choice or ())
        return Structure(schema, outputs.regex, choices, name="structured_outputs")
    if form is None:
        return None
    if form.type == "json_object":
        return Structure('{"type": "object"}', name="response_format")
    if form.json_schema is None:
        raise invalid("json_schema is missing", "response_format.json_schema")
    return Structure(_text_of(form.json_schema.schema) or "null", name="response_format")


def _text_of(schema: Raw) -> str | None:
    """A schema's JSON, if there is one; vLLM's clients send it as a text, too."""
    text = bytes(schema).decode(errors="replace").strip()
    if text in ("", "null"):
        return None
    return str(msgspec.json.decode(text)) if text.startswith('"') else text


def addresses_of(messages: Sequence[Message], hosts: ImageHosts) -> list[str]:
    """Addresses of pictures to fetch, each once.

    Raises:
        ApiError: one is not of a host whose pictures are fetched.
    """
    found = []
    for number, message in enumerate(messages):
        parts = message.content if isinstance(message.content, list) else []
        for place, part in enumerate(parts):
            if not isinstance(part, ImagePart) or is_data_uri(part.image_url.url):
                continue
            try:
                hosts.check(part.image_url.url)
            except TrioError as error:
                where = f"{_PLACE.format(number, place)}.image_url.url"
                raise invalid(str(error), where, "unsupported_parameter") from None
            found.append(part.image_url.url)
    return list(dict.fromkeys(found))


def to_messages(messages: Sequence[Message], files: Files = _NO_FILES) -> tuple[bytes, list[bytes]]:
    """JSON of a conversation in Hugging Face's format, and its pictures in base64.

    Args:
        files: contents of pictures by their addresses.

    Raises:
        ApiError: it has parts that are not supported.
    """
    pictures = _Pictures(files)
    found = [_message(number, message, pictures) for number, message in enumerate(messages)]
    return msgspec.json.encode(found), pictures.found


@dataclass
class _Pictures:
    """Pictures of a conversation in base64, in order."""

    files: Files
    found: list[bytes] = field(default_factory=list)

    def add(self, url: str) -> None:
        """Take in a picture.

        Raises:
            TrioError: it is neither in the address nor among the files.
        """
        if is_data_uri(url):
            self.found.append(data_uri_content(url))
        elif url in self.files:
            self.found.append(base64.b64encode(self.files[url]))
        else:
            ImageHosts().check(url)


def _message(number: int, message: Message, pictures: _Pictures) -> dict[str, Any]:
    place = f"messages[{number}]"
    for name in ("name", "refusal", "annotations", "audio", "function_call", "tool_calls"):
        if getattr(message, name):
            raise _unsupported(f"{place}.{name}")
    role = "system" if message.role == "developer" else message.role
    if message.content is None:
        raise invalid(f"{place}.content has no text: write some", f"{place}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    items = [
        _item(_PLACE.format(number, place), part, role, pictures)
        for place, part in enumerate(message.content)
    ]
    return {"role": role, "content": items}


def _item(place: str, part: Part, role: str, pictures: _Pictures) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if not isinstance(part, ImagePart):
        kind = type(part).__struct_config__.tag
        raise invalid(
            f"{place} is of the type {kind}, which is not supported: send text and image_url",
            place,
            "unsupported_parameter",
        )
    if role == "assistant":
        raise invalid(f"{place} is a picture of the assistant's: put it in a user message", place)
    if part.image_url.detail == "low":
        raise invalid(
            "detail low is not supported, since it would need another tiling: use auto, and "
            "trio.budget for fewer visual tokens",
            f"{place}.image_url.detail",
            "unsupported_parameter",
        )
    try:
        pictures.add(part.image_url.url)
    except TrioError as error:
        raise invalid(str(error), f"{place}.image_url.url", "invalid_image") from None
    return {"type": "image"}


def clean(text: str) -> str:
    """A text that has an encoding: a tokenizer may end a piece in half of a character."""
    return text.encode(errors="replace").decode()


def to_usage(generations: Sequence[Generation]) -> Usage:
    """Tokens of all answers to one request."""
    first = generations[0]
    made = sum(len(generation.token_ids) for generation in generations)
    return Usage(
        first.prompt_tokens,
        made,
        first.prompt_tokens + made,
        PromptDetails(),
        TokenCounts(first.visual_tokens, first.keep_counts),
    )


def finish_reason(generation: Generation) -> str:
    """Why an answer ended, in the words that clients know."""
    return "stop" if generation.finish_reason == "stop" else "length"


def to_trio(generation: Generation, asked: Asked) -> TrioAnswer | UnsetType:
    """What only this server tells of an answer; nothing if there is nothing to tell."""
    reason = generation.finish_reason
    answer = TrioAnswer(
        finish_reason=None if reason == finish_reason(generation) else reason,
        kept=_kept(generation) if asked.kept else None,
        timings=_timings(generation) if asked.timings else None,
        warnings=[clean(text) for text in generation.warnings] or None,
    )
    return UNSET if answer == TrioAnswer() else answer


def _timings(generation: Generation) -> dict[str, Any]:
    return {
        "first_token_s": generation.first_token_s,
        "tokens_per_s": generation.tokens_per_s,
        "stages_s": generation.timings,
    }


def _kept(generation: Generation) -> Kept:
    images = []
    for number, layout in enumerate(generation.processed):
        height, width = layout.size
        boxes = [
            None if math.isnan(box[0]) else [int(side) for side in box]
            for box in np.rint(layout.boxes).tolist()
        ]
        kept = [tokens.tolist() for tokens in generation.kept_of_image(number)]
        images.append(KeptOfImage([int(width), int(height)], boxes, kept))
    return Kept([int(layer) for layer in pruned_before(generation)], images)


def to_logprobs(tokens: Sequence[TokenLogprobs], encoder: PromptEncoder) -> Logprobs:
    """Tokens with their probabilities, in OpenAI's form."""
    return Logprobs(
        [
            TokenLogprob(
                *_chance(each.token_id, each.logprob, encoder),
                [TokenChance(*_chance(token, value, encoder)) for token, value in each.top],
            )
            for each in tokens
        ]
    )


def _chance(
    token: int, logprob: float, encoder: PromptEncoder
) -> tuple[str, float, list[int] | None]:
    text = clean(encoder.piece(token))
    whole = "\ufffd" not in text
    return text, max(logprob, _LEAST_LOGPROB), list(text.encode()) if whole else None
