"""Bodies of requests and answers: OpenAI's, and one object of our own in each.

A field that is not here is refused: one that is ignored in silence would be a wrong answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from trio_deploy.pipeline.request import MAX_TOP_LOGPROBS
from trio_deploy.serve.openai.errors import ApiError, invalid

_T = TypeVar("_T")
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")

_Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Size = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Share = Annotated[float, Meta(gt=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class TextPart(Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    text: str


class ImageUrl(Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "high", "low"] | None = None


class ImagePart(Struct, tag="image_url", tag_field="type", forbid_unknown_fields=True):
    image_url: ImageUrl


class VideoPart(Struct, tag="video_url", tag_field="type"):
    """Refused by name."""


class AudioPart(Struct, tag="input_audio", tag_field="type"):
    """Refused by name."""


class FilePart(Struct, tag="file", tag_field="type"):
    """Refused by name."""


Part = TextPart | ImagePart | VideoPart | AudioPart | FilePart


class Message(Struct, forbid_unknown_fields=True):
    """A message; the last six fields are what clients send back of an answer, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Struct, forbid_unknown_fields=True):
    schema: Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's; one of the three."""

    choice: list[str] | None = None
    regex: str | None = None
    json: Raw = msgspec.field(default_factory=Raw)


class TrioOptions(Struct, forbid_unknown_fields=True):
    """What this server alone can do.

    Attributes:
        budget: average share of visual tokens per layer.
        kept: report which visual tokens each pruning point kept.
        timings: report seconds per stage.
        timeout_s: seconds until the answer ends with what there is.
        cache: false: keep nothing of the pictures, and do not look whether they are known.
    """

    budget: float | None = None
    kept: bool | None = None
    timings: bool | None = None
    timeout_s: float | None = None
    cache: bool | None = None


class ChatBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    max_completion_tokens: _Count | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: _Whole | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: _Count | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    min_tokens: _Size | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    trio: TrioOptions | None = None

    # Accepted, and without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None  # true is refused
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    # Refused by name, unless they ask for nothing.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TokenizeBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /tokenize: a text as it is, or a conversation with its pictures."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[_Size]
    model: str | None = None


class TokenChance(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenChance]


class Logprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class KeptOfImage(Struct):
    """Which of a picture's visual tokens were kept.

    Attributes:
        size: width and height in pixels, upright.
        boxes: of each visual token x0, y0, x1, y1 in pixels; null: it has no place.
        kept: for each pruning point, numbers of the tokens that stayed.
    """

    size: list[int]
    boxes: list[list[int] | None]
    kept: list[list[int]]


class Kept(Struct):
    """What each pruning point kept.

    Attributes:
        layers: the layer that each pruning point precedes.
    """

    layers: list[int]
    images: list[KeptOfImage]


class TrioAnswer(Struct, omit_defaults=True):
    """What this server alone tells of an answer.

    Attributes:
        finish_reason: `deadline`, where `finish_reason` can only be `length`.
        timings: seconds per stage, seconds to the first token, tokens per second.
    """

    finish_reason: str | None = None
    kept: Kept | None = None
    timings: dict[str, Any] | None = None
    warnings: list[str] | None = None


class Choice(Struct):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: Logprobs | None = None
    trio: TrioAnswer | UnsetType = UNSET


class TokenCounts(Struct):
    """Visual tokens of the prompt, and of those what each pruning point kept."""

    visual_tokens: int
    kept_tokens: list[int]


class PromptDetails(Struct):
    cached_tokens: int = 0


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    trio: TokenCounts


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    trio: TrioAnswer | UnsetType = UNSET


class Chunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "trio-deploy"


class Models(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    """Answer of /detokenize."""

    prompt: str


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    error: ErrorDetail


def decode(body: bytes, kind: type[_T]) -> _T:
    """Read a body.

    Raises:
        ApiError: it is no JSON, or not of this kind; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _of_validation(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is not valid JSON: {_lower(text)}", code="invalid_json") from None


def _of_validation(text: str) -> ApiError:
    """An error of msgspec's, whose path is where the fault is."""
    at = _PATH.search(text)
    place, words = (at[1], text[: at.start()]) if at else ("", text)
    if unknown := _UNKNOWN.search(words):
        place = f"{place}.{unknown[1]}" if place else unknown[1]
        return invalid(
            f"the field {place} is not known here: leave it out", place, "unknown_parameter"
        )
    named = f"{place}: " if place else "the body: "
    return invalid(f"{named}{_lower(words)}", place or None, "invalid_value")


def _lower(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]  # JSON stays JSON
