"""Answers to one request on the event loop: whole, or in chunks as they are generated."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from trio_deploy.pipeline.batcher.events import Event, Handle, OnEvent
from trio_deploy.pipeline.prompt import PromptEncoder
from trio_deploy.pipeline.request import Generation
from trio_deploy.serve.openai.bodies import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    Chunk,
    ChunkChoice,
    Delta,
    Logprobs,
    Usage,
)
from trio_deploy.serve.openai.convert import (
    Asked,
    clean,
    finish_reason,
    to_logprobs,
    to_trio,
    to_usage,
)
from trio_deploy.serve.openai.errors import ApiError
from trio_deploy.serve.requests import ClientRequest

_DONE = b"data: [DONE]\n\n"
_WAITING = b": waiting\n\n"
_COMMENT_S = 15.0  # between comments; proxies cut streams that are silent for a minute

Send = Callable[[Any], Any]
Submit = Callable[[ClientRequest, OnEvent, int], Handle]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class _Tick:
    """Time has passed without a token."""


_Item = tuple[int, Event] | _Tick | ClientGone


class Answers:
    """Events of the answers to one request, in the order of their coming.

    Made on the event loop; `submit` may be called from any thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # No bound is needed: an answer has as many events as it may have tokens.
        self._items: deque[_Item] = deque()
        self._changed = asyncio.Event()
        self._handles: list[Handle] = []
        self._cancelled = False

    def submit(
        self, submit: Submit, clients: Sequence[ClientRequest], *, each_token: bool = True
    ) -> None:
        """Have all answers begun; if one is refused, none is.

        Args:
            each_token: whether events of tokens are wanted, or the last ones alone.

        Raises:
            TrioError: as `Service.submit`.
        """
        try:
            for number, client in enumerate(clients):
                handle = submit(client, self._listener(number, each_token), len(clients))
                self._handles.append(handle)
                if self._cancelled:
                    break
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:  # it may have been set before the last handle was there
            self.cancel()

    def _listener(self, number: int, each_token: bool) -> OnEvent:
        def on_event(event: Event) -> None:
            if each_token or event.last:  # the loop is not woken for what nobody reads
                self._loop.call_soon_threadsafe(self._put, (number, event))

        return on_event

    def _put(self, item: _Item) -> None:
        self._items.append(item)
        self._changed.set()

    def cancel(self) -> None:
        """End the answers that have not ended."""
        self._cancelled = True
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    def leave(self) -> None:
        """Say that the client is gone."""
        self._put(ClientGone())

    def tick_in(self, seconds: float) -> asyncio.TimerHandle:
        """Have `next` give a tick after some time."""
        return self._loop.call_later(seconds, self._put, _Tick())

    async def next(self) -> tuple[int, Event] | None:
        """The number of an answer and its next event; None for a tick.

        Raises:
            ClientGone: nobody waits any more.
            TrioError: an answer failed.
        """
        while not self._items:
            self._changed.clear()
            await self._changed.wait()
        return _checked(self._items.popleft())

    def at_hand(self) -> list[tuple[int, Event]]:
        """Events that are there already, but for a failure, which `next` raises."""
        found: list[tuple[int, Event]] = []
        while self._items:
            item = self._items[0]
            if not isinstance(item, tuple) or item[1].error is not None:
                break
            found.append(item)
            self._items.popleft()
        return found


def _checked(item: _Item) -> tuple[int, Event] | None:
    if isinstance(item, ClientGone):
        raise item
    if isinstance(item, _Tick):
        return None
    if item[1].error is not None:
        raise item[1].error
    return item


@dataclass
class Writer:
    """Writes answers to one request in OpenAI's form.

    Attributes:
        id: of the answer.
        model: the served name.
        end_tokens: tokens that end answers, which have no text.
    """

    id: str
    model: str
    asked: Asked
    encoder: PromptEncoder
    end_tokens: frozenset[int]
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> bytes:
        """All answers as one JSON object."""
        choices = [
            Choice(
                number,
                AnswerMessage(clean(generation.text)),
                finish_reason(generation),
                self._logprobs(generation),
                to_trio(generation, self.asked),
            )
            for number, generation in enumerate(generations)
        ]
        usage = to_usage(generations)
        return msgspec.json.encode(
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=choices,
                usage=usage,
            )
        )

    def _logprobs(self, generation: Generation) -> Logprobs | None:
        if not self.asked.logprobs:
            return None
        tokens = [each for each in generation.token_logprobs if each.token_id not in self._ends]
        return to_logprobs(tokens, self.encoder)

    @property
    def _ends(self) -> frozenset[int]:
        return frozenset() if self.asked.clients[0].ignore_eos else self.end_tokens

    def begin(self) -> bytes:
        """The first chunk of every answer, which says whose it is."""
        numbers = range(len(self.asked.clients))
        return b"".join(
            self._chunk([ChunkChoice(number, Delta("assistant", ""))]) for number in numbers
        )

    def token(self, number: int, event: Event) -> bytes:
        """A token's chunk; nothing for one that completes no text."""
        content = clean(event.text)
        logprobs = None
        if event.logprobs is not None and event.logprobs.token_id not in self._ends:
            logprobs = to_logprobs([event.logprobs], self.encoder)
        written = b""
        if content or logprobs is not None:
            written = self._chunk([ChunkChoice(number, Delta(content=content), logprobs)])
        if event.generation is not None:
            written += self._end(number, event.generation)
        return written

    def _end(self, number: int, generation: Generation) -> bytes:
        reason = finish_reason(generation)
        trio = to_trio(generation, self.asked)
        return self._chunk([ChunkChoice(number, Delta(), finish_reason=reason, trio=trio)])

    def finish(self, generations: Sequence[Generation]) -> bytes:
        """What follows the last answer's end."""
        usage = b""
        if self.asked.usage:
            usage = self._chunk([], to_usage(generations))
        return usage + _DONE

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = Chunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.asked.usage else UNSET,
        )
        return sse(chunk)


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def generations_of(answers: Answers, count: int) -> list[Generation]:
    """Wait for all answers.

    Raises:
        ClientGone: nobody waits any more.
        TrioError: one failed.
    """
    found: dict[int, Generation] = {}
    while len(found) < count:
        item = await answers.next()
        if item is not None and item[1].generation is not None:
            found[item[0]] = item[1].generation
    return [found[number] for number in range(count)]


async def chunks(
    answers: Answers, writer: Writer, first: tuple[int, Event] | None
) -> AsyncIterator[bytes]:
    """All chunks of all answers, as many at a time as are there.

    Args:
        first: the first event; None if there was none within the time for it.

    Raises:
        ClientGone: nobody waits any more.
        TrioError: an answer failed.
    """
    count = len(writer.asked.clients)
    ended: dict[int, Generation] = {}
    item, written = first, writer.begin()
    while True:
        for number, event in [] if item is None else [item, *answers.at_hand()]:
            written += writer.token(number, event)
            if event.generation is not None:
                ended[number] = event.generation
        if len(ended) == count:
            yield written + writer.finish([ended[number] for number in range(count)])
            return
        if item is None:
            written += _WAITING
        if written:
            yield written
        written = b""
        timer = answers.tick_in(_COMMENT_S)
        try:
            item = await answers.next()
        finally:
            timer.cancel()


async def send_stream(
    send: Send, headers: Sequence[tuple[bytes, bytes]], parts: AsyncIterator[bytes],
    told: Callable[[Exception], ApiError],
) -> None:  # fmt: skip
    """Send server-sent events; what fails on the way is the last of them.

    Args:
        told: what a client is told of an exception.
    """
    start = {"type": "http.response.start", "status": 200, "headers": list(headers)}
    await send(start)
    try:
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        last = b""
    except ClientGone:
        raise
    except Exception as error:
        last = sse(told(error).body)
    await send({"type": "http.response.body", "body": last, "more_body": False})
