"""Events on the event loop: which of them wake it, and in which order they come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.batching import SHORT
from trio_deploy import Pipeline
from trio_deploy.pipeline.batcher.events import Event, Handle, OnEvent
from trio_deploy.pipeline.request import Generation
from trio_deploy.serve.openai.stream import Answers, generations_of
from trio_deploy.serve.requests import ClientRequest


@pytest.mark.parametrize(("each_token", "woken"), [(False, 1), (True, 4)])
def test_tokens_wake_the_loop_only_where_they_are_read(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, each_token: bool, woken: int
) -> None:
    generation = pipeline.generate_batch([SHORT])[0]
    calls: list[Any] = []

    def submit(client: ClientRequest, on_event: OnEvent, together: int) -> Handle:
        for token in (5, 6, 7):
            on_event(Event(token, "red "))
        on_event(Event(8, "", generation=generation))
        return Handle(on_event, lambda: None)

    async def ask() -> list[Generation]:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def noted(*given: Any) -> Any:
            calls.append(given)
            return call(*given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", noted)
        answers = Answers()
        answers.submit(submit, [ClientRequest(prompt=b"what is red ?")], each_token=each_token)
        return await generations_of(answers, 1)

    assert asyncio.run(ask()) == [generation]
    assert len(calls) == woken
