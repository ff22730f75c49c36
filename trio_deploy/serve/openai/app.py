"""The application: what each route does with a request."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.serve.fetch import ImageHosts
from trio_deploy.serve.metrics import PREFIX, prometheus_text
from trio_deploy.serve.openai.bodies import (
    ChatBody,
    DetokenizeBody,
    Detokenized,
    Model,
    Models,
    TokenizeBody,
    Tokens,
    decode,
)
from trio_deploy.serve.openai.convert import (
    Asked,
    Files,
    addresses_of,
    clean,
    to_asked,
    to_messages,
)
from trio_deploy.serve.openai.errors import ApiError, invalid, of_exception, unavailable
from trio_deploy.serve.openai.gate import COPIES, Bodies, Doors, Gate, Life
from trio_deploy.serve.openai.page import page
from trio_deploy.serve.openai.schema import openapi
from trio_deploy.serve.openai.settings import HttpLimits
from trio_deploy.serve.openai.stream import (
    Answers,
    ClientGone,
    Writer,
    chunks,
    generations_of,
    send_stream,
)
from trio_deploy.serve.requests import ClientRequest
from trio_deploy.serve.service import Service

_LOG = logging.getLogger(__name__)
_FETCHERS = 8  # pictures that are fetched at once
_SSE = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each chunk on
)


@dataclass(frozen=True)
class Served:
    """What all routes share.

    Attributes:
        name: of the model, as clients call it.
        images: hosts whose pictures are fetched.
        metrics_prefix: of metrics that vLLM has, too.
    """

    pipeline: Pipeline
    service: Service
    name: str
    limits: HttpLimits = field(default_factory=HttpLimits)
    doors: Doors = field(default_factory=Doors)
    life: Life = field(default_factory=Life)
    images: ImageHosts = field(default_factory=ImageHosts)
    metrics_prefix: str = PREFIX
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of the model's context."""
        return self.pipeline.bundle.config.text.max_positions

    @property
    def max_n(self) -> int:
        """Most answers per request; more than the queue holds would never be taken."""
        return min(self.limits.max_n, self.service.limits.batcher.max_queue)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn for requests that name no temperature."""
        sampling = self.pipeline.bundle.manifest.generation.sampling
        return not SamplingOptions.from_json(sampling).greedy

    def check_model(self, model: str | None) -> None:
        """Check the model that a request names.

        Raises:
            ApiError: it is another one.
        """
        if model is not None and model != self.name:
            raise ApiError(
                404,
                f"the model {model[:100]!r} is not served here: there is {self.name!r}",
                param="model",
                code="model_not_found",
            )


def build_app(served: Served) -> ASGIApp:
    """The application as ASGI, for uvicorn or anything else that runs such."""
    bodies = Bodies(served.limits, served.service.limits.max_queue_bytes)
    routes = _Routes(served, bodies)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/", routes.page),
        ],
        exception_handlers={
            HTTPException: _not_served,
            ClientDisconnect: _left,
            ApiError: routes.failed,
            TrioError: routes.failed,
            Exception: routes.failed,
        },
    )
    app.router.redirect_slashes = False
    return Gate(app, served.doors, served.limits, served.life)


class _Routes:
    def __init__(self, served: Served, bodies: Bodies) -> None:
        self._served = served
        self._bodies = bodies
        self._openapi = _json(openapi())
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="trio-fetch")

    async def chat(self, request: Request) -> Response:
        answers = Answers()

        def begin(chat: ChatBody, files: Files) -> Asked:
            asked = to_asked(chat, self._served.max_n, files, draws=self._served.draws)
            submit = self._served.service.submit
            answers.submit(submit, asked.clients, each_token=asked.stream)
            return asked

        def read(body: bytes) -> tuple[ChatBody, list[str], Asked | None]:
            """Done by another thread: a large picture takes a while to decode."""
            chat = decode(body, ChatBody)
            self._served.check_model(chat.model)
            addresses = addresses_of(chat.messages, self._served.images)
            return chat, addresses, None if addresses else begin(chat, {})

        try:
            async with self._bodies.read(request) as body:
                with self._telling(request):
                    chat, addresses, asked = await asyncio.to_thread(read, body)
                    if asked is None:
                        async with self._fetched(addresses, COPIES * len(body)) as files:
                            asked = await asyncio.to_thread(begin, chat, files)
        except BaseException as error:
            answers.cancel()
            # What the service refused, it has counted itself.
            if isinstance(error, ApiError | Refused) and not isinstance(error.__cause__, TrioError):
                self._served.service.count_rejected(error)
            raise
        return _ChatResponse(self._served, request, answers, asked)

    @asynccontextmanager
    async def _fetched(self, addresses: Sequence[str], held: int) -> AsyncIterator[Files]:
        """Files at addresses, which are counted until the block is left.

        Args:
            held: bytes that are counted of the request already.
        """
        limits, loop = self._served.service.limits, asyncio.get_running_loop()
        if len(addresses) > limits.max_images:
            raise invalid(f"{len(addresses)} images, but max_images is {limits.max_images}")
        size = limits.max_image_bytes * len(addresses)
        # What the largest files would take, of which little may come: it needs to fit, no more.
        what = f"the {len(addresses)} pictures at addresses"
        self._bodies.held.take(size, what, held, leaves_room=False)
        try:
            fetch = self._served.images.fetch
            # Threads of its own: hosts that are slow keep nobody waiting who names none. All are
            # waited for, also if one fails, since what they fetch is counted until then.
            fetched = await asyncio.gather(
                *(
                    loop.run_in_executor(self._fetchers, fetch, address, limits.max_image_bytes)
                    for address in addresses
                ),
                return_exceptions=True,
            )
            files: dict[str, bytes] = {}
            for address, found in zip(addresses, fetched, strict=True):
                if isinstance(found, BaseException):
                    raise found
                files[address] = found
            yield files
        finally:
            self._bodies.held.release(size)

    async def completions(self, request: Request) -> Response:
        raise invalid(
            "/v1/completions is not served, since prompts go through the model's chat template: "
            "use /v1/chat/completions",
            code="unsupported_route",
        )

    async def tokenize(self, request: Request) -> Response:
        async with self._bodies.read(request) as body:
            with self._telling(request):
                return _json(await asyncio.to_thread(self._tokenize, body))

    def _tokenize(self, content: bytes) -> Tokens:
        body = decode(content, TokenizeBody)
        self._served.check_model(body.model)
        pipeline, limits = self._served.pipeline, self._served.service.limits
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.prompt is not None:
            if len(body.prompt.encode(errors="replace")) > limits.max_prompt_bytes:
                raise invalid(
                    f"prompt has more bytes than max_prompt_bytes = {limits.max_prompt_bytes}",
                    "prompt",
                )
            tokens = pipeline.encoder.tokens(clean(body.prompt), special=body.add_special_tokens)
        else:
            messages, pictures = to_messages(body.messages or [])  # no picture is fetched
            client = ClientRequest(messages=messages, images_base64=pictures, max_tokens=1)
            tokens = self._served.service.prepare(client).prompt.ids.tolist()
        names = pipeline.encoder.names(tokens) if body.return_token_strs else None
        return Tokens(len(tokens), self._served.context, tokens, names)

    async def detokenize(self, request: Request) -> Response:
        async with self._bodies.read(request) as body:
            return _json(await asyncio.to_thread(self._detokenize, body))

    def _detokenize(self, content: bytes) -> Detokenized:
        asked = decode(content, DetokenizeBody)
        self._served.check_model(asked.model)
        if len(asked.tokens) > self._served.context:
            raise invalid(
                f"{len(asked.tokens)} tokens are more than the context of {self._served.context}",
                "tokens",
            )
        vocabulary = self._served.pipeline.bundle.config.text.vocab_size
        if any(token >= vocabulary for token in asked.tokens):
            raise invalid(f"tokens must be below {vocabulary}", "tokens")
        encoder = self._served.pipeline.encoder
        return Detokenized(clean(encoder.decode(asked.tokens, special=True)))

    async def models(self, request: Request) -> Response:
        return _json(Models([self._model()]))

    async def model(self, request: Request) -> Response:
        self._served.check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> Model:
        return Model(self._served.name, self._served.created, self._served.context)

    async def health(self, request: Request) -> Response:
        if not self._served.service.alive:
            raise unavailable("the threads that answer have ended: start the server again", 1)
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._served.life.draining:
            raise unavailable("the server is shutting down", 1)
        return await self.health(request)

    async def metrics(self, request: Request) -> Response:
        text = prometheus_text(self._served.service.metrics(), self._served.metrics_prefix)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return self._openapi

    async def page(self, request: Request) -> Response:
        content, headers = page()
        return Response(content, media_type="text/html", headers=headers)

    async def failed(self, request: Request, error: Exception) -> Response:
        return _of_error(self._told(request, error))

    @contextmanager
    def _telling(self, request: Request) -> Iterator[None]:
        """Turn what the service raises into what a client is told."""
        try:
            yield
        except TrioError as error:
            raise self._told(request, error) from error

    def _told(self, request: Request, error: Exception) -> ApiError:
        return told(self._served, request.scope["state"]["request_id"], error)


def told(served: Served, request_id: str, error: Exception) -> ApiError:
    """What a client is told of an exception; a fault of ours is logged."""
    found = of_exception(error, request_id, served.service.retry_after_s)
    if found.status == 500:
        _LOG.error("request %s failed", request_id, exc_info=error)
    return found


class _ChatResponse(Response):
    """Sends the answers to a request, and ends them when its client leaves."""

    def __init__(self, served: Served, request: Request, answers: Answers, asked: Asked) -> None:
        super().__init__()
        self._served = served
        self._answers = answers
        self._asked = asked
        self._request_id: str = request.scope["state"]["request_id"]
        manifest = served.pipeline.bundle.manifest
        self._writer = Writer(
            f"chatcmpl-{secrets.token_hex(12)}",
            served.name,
            asked,
            served.pipeline.encoder,
            frozenset(manifest.generation.eos_token_ids),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(_watch(receive, self._answers))
        try:
            if self._asked.stream:
                await self._stream(send)
            else:
                await self._whole(scope, receive, send)
        except ClientGone:
            pass
        finally:
            watching.cancel()
            self._answers.cancel()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            generations = await generations_of(self._answers, len(self._asked.clients))
        except TrioError as error:
            response = _of_error(self._told(error))
        else:
            if self._asked.kept or self._asked.logprobs:
                # In a thread: what belongs to each of many tokens takes a while to write.
                content = await asyncio.to_thread(self._writer.whole, generations)
            else:
                content = self._writer.whole(generations)
            response = Response(content, media_type="application/json")
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        timer = self._answers.tick_in(self._served.limits.first_s)
        try:
            first = await self._answers.next()
        except TrioError as error:  # nothing is sent yet, so it can still be a status
            await _of_error(self._told(error))({"type": "http"}, _nothing, send)
            return
        finally:
            timer.cancel()
        parts = chunks(self._answers, self._writer, first)
        await send_stream(send, _SSE, parts, self._told)

    def _told(self, error: Exception) -> ApiError:
        return told(self._served, self._request_id, error)


async def _watch(receive: Receive, answers: Answers) -> None:
    """Wait until the client leaves: a response that waits for the model sees nothing of it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answers.leave()


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _of_error(error: ApiError) -> Response:
    content = msgspec.json.encode(error.body)
    return Response(content, error.status, error.headers, "application/json")


async def _left(request: Request, error: Exception) -> Response:
    """Nobody is there to read it."""
    return Response(status_code=400)


async def _not_served(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    known = error.status_code == 405
    what = f"{path} takes no {request.method}" if known else f"there is no {path}"
    code = "method_not_allowed" if known else "not_found"
    message = f"{what}: GET /openapi.json lists what there is"
    response = _of_error(ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response
