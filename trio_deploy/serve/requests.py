"""What a client sent, checked and turned into a request of the pipeline.

Pictures come as the bytes of a file and in no other way: no text of a client becomes a path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trio_deploy.checkpoint.chat_template import Message
from trio_deploy.checkpoint.conversation import require_text, texts_of
from trio_deploy.config.sampling import SAMPLING_OPTIONS, SamplingOptions
from trio_deploy.errors import TrioError
from trio_deploy.files import parse_json
from trio_deploy.pipeline.grammar import Structure
from trio_deploy.pipeline.request import Request
from trio_deploy.schedule.budget import check_budget
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.pictures import read_pictures


@dataclass(frozen=True)
class ClientRequest:
    """A request as a client sent it, not checked yet; None: not given.

    Attributes:
        prompt: UTF-8 text of a question.
        messages: JSON of a conversation, instead of a prompt.
        images: content of picture files; `images_base64`: the same in base64, instead of them.
        max_tokens: tokens of the answer.
        temperature, …, seed: as in `SamplingOptions`; None: the bundle's own.
        min_tokens: tokens before which no end token comes.
        bad_words: UTF-8 texts that the answer must not contain.
        logit_bias, top_logprobs, ignore_eos, cache_images, structure: as in `Request`.
        stop: UTF-8 texts that end the answer.
        budget: average share of visual tokens per layer.
        timeout_s: seconds until the deadline, as the client asks for it.
        transport_timeout_s: seconds that the server's protocol allows; the earlier deadline counts.
    """

    prompt: bytes | None = None
    messages: bytes | None = None
    images: Sequence[bytes] | None = None
    images_base64: Sequence[bytes] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: Sequence[int] | None = None
    bad_words: Sequence[bytes] | None = None
    logit_bias: Mapping[int, float] | None = None
    top_logprobs: int | None = None
    ignore_eos: bool = False
    cache_images: bool = True
    structure: Structure | None = None
    seed: int | None = None
    stop: Sequence[bytes] | None = None
    budget: float | None = None
    timeout_s: float | None = None
    transport_timeout_s: float | None = None

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return len(self.images or ()) + len(self.images_base64 or ())

    @property
    def nbytes(self) -> int:
        """Bytes of texts and pictures as they were sent."""
        lists = (self.images, self.images_base64, self.stop, self.bad_words)
        return (
            len(self.prompt or b"")
            + len(self.messages or b"")
            + sum(len(item) for items in lists for item in items or ())
            + 8 * len(self.suppress_tokens or ())
            + 16 * len(self.logit_bias or ())
            + (self.structure.nbytes if self.structure else 0)
        )


def check_request(client: ClientRequest, limits: ServiceLimits) -> tuple[Request, float]:
    """Check a request.

    Returns:
        The pipeline's request, and seconds until its deadline.

    Raises:
        TrioError: what is wrong; a limit is called by its name.
    """
    for name in ("temperature", "top_p", "budget", "timeout_s"):
        value = getattr(client, name)
        if value is not None and not math.isfinite(value):
            raise TrioError(f"{name} must be a finite number, got {value}")
    request = Request(
        _prompt(client, limits),
        _images(client, limits),
        max_new_tokens=_max_tokens(client, limits),
        stop=_stop(client, limits),
        top_logprobs=client.top_logprobs,
        ignore_eos=client.ignore_eos,
        cache_images=client.cache_images,
        structure=_structure(client, limits),
        budget=limits.budget if client.budget is None else check_budget(client.budget),
        **_sampling(client, limits),
    )
    return request, _timeout(client, limits)


def _sampling(client: ClientRequest, limits: ServiceLimits) -> dict[str, Any]:
    """The sampling options that were sent, by their names in `Request`."""
    sent: dict[str, Any] = {name: getattr(client, name, None) for name in SAMPLING_OPTIONS}
    if client.min_tokens is not None:
        longest = _max_tokens(client, limits)
        if client.min_tokens < 0:
            raise TrioError(f"min_tokens must be 0 or more, got {client.min_tokens}")
        if client.min_tokens > longest:
            raise TrioError(f"min_tokens is {client.min_tokens}, but max_tokens is {longest}")
        sent["min_new_tokens"] = client.min_tokens
    for name in ("suppress_tokens", "bad_words", "logit_bias"):
        if len(sent[name] or ()) > limits.max_banned:
            raise TrioError(f"{len(sent[name])} {name}, but max_banned is {limits.max_banned}")
    if client.bad_words is not None:
        sent["bad_words"] = _texts(client.bad_words, "bad word", limits)
    SamplingOptions(**sent).check()
    return sent


def _prompt(client: ClientRequest, limits: ServiceLimits) -> str | list[Message]:
    given = {"prompt": client.prompt, "messages": client.messages}
    sent = {name: raw for name, raw in given.items() if raw is not None}
    if len(sent) != 1:
        raise TrioError("give either prompt or messages" + (", not both" if sent else ""))
    ((name, raw),) = sent.items()
    if len(raw) > limits.max_prompt_bytes:
        raise TrioError(
            f"{name} has {len(raw)} bytes, but max_prompt_bytes is {limits.max_prompt_bytes}"
        )
    text = _decode(raw, name)
    prompt = text if name == "prompt" else _messages(text)
    require_text(texts_of(prompt))
    return prompt


def _messages(text: str) -> list[Message]:
    messages = parse_json(text, "messages", 'send a list of {"role": ..., "content": ...}')
    if not isinstance(messages, list):
        raise TrioError('messages must be a JSON list of {"role": ..., "content": ...}')
    return [_message(message) for message in messages]


def _message(message: Any) -> Message:
    """Rebuild a message from the fields that chat templates use, and no others."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise TrioError('a message must be {"role": ..., "content": ...} and nothing else')
    content = message["content"]
    if isinstance(content, list):
        return {"role": _text(message["role"], "role"), "content": [*map(_item, content)]}
    return {
        "role": _text(message["role"], "role"),
        "content": _text(content, "content (or a list of items)"),
    }


def _item(item: Any) -> dict[str, str]:
    if isinstance(item, dict) and item.get("type") == "image" and len(item) == 1:
        return {"type": "image"}
    if isinstance(item, dict) and item.get("type") == "text" and set(item) == {"type", "text"}:
        return {"type": "text", "text": _text(item["text"], "text")}
    raise TrioError(
        'a content item must be {"type": "text", "text": "..."} or {"type": "image"}; pictures '
        "themselves go into the input images or images_base64"
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TrioError(f"a message's {what} must be a string")
    return value


def _images(client: ClientRequest, limits: ServiceLimits) -> list[bytes]:
    if client.images is not None and client.images_base64 is not None:
        raise TrioError("give either images or images_base64, not both")
    coded = client.images_base64 is not None
    return read_pictures((client.images_base64 if coded else client.images) or (), limits, coded)


def _max_tokens(client: ClientRequest, limits: ServiceLimits) -> int:
    tokens = limits.default_max_tokens if client.max_tokens is None else client.max_tokens
    if not 1 <= tokens <= limits.max_tokens:
        raise TrioError(f"max_tokens must be 1 to {limits.max_tokens}, got {tokens}")
    return tokens


def _stop(client: ClientRequest, limits: ServiceLimits) -> list[str]:
    stops = client.stop or ()
    if len(stops) > limits.max_stop:
        raise TrioError(f"{len(stops)} stop strings, but max_stop is {limits.max_stop}")
    return _texts(stops, "stop string", limits)


def _texts(texts: Sequence[bytes], what: str, limits: ServiceLimits) -> list[str]:
    for text in texts:
        if not 0 < len(text) <= limits.max_stop_bytes:
            raise TrioError(
                f"a {what} has {len(text)} bytes, but it must have 1 to max_stop_bytes = "
                f"{limits.max_stop_bytes}"
            )
    return [_decode(text, f"a {what}") for text in texts]


def _structure(client: ClientRequest, limits: ServiceLimits) -> Structure | None:
    found = client.structure
    if found is not None and found.nbytes > limits.max_schema_bytes:
        raise TrioError(
            f"{found.name} has {found.nbytes} bytes, but max_schema_bytes is "
            f"{limits.max_schema_bytes}"
        )
    return found


def _timeout(client: ClientRequest, limits: ServiceLimits) -> float:
    longest = limits.max_timeout_s
    timeout = longest if client.timeout_s is None else client.timeout_s
    if not 0.0 < timeout <= longest:
        raise TrioError(f"timeout_s must be above 0 and at most max_timeout_s = {longest}")
    if client.transport_timeout_s is not None:
        return min(timeout, client.transport_timeout_s)
    return timeout


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TrioError(f"{name} is not UTF-8") from None
