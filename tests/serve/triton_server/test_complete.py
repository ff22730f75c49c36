"""`trio_vlm_complete`, and the `trio_vlm` that it forwards to, with a stand-in for Triton."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.batching import unfinished
from tests.support.fakes.triton import TritonError, arguments
from tests.support.tensors import file
from tests.support.triton_models import QUESTION, ask, hold, served_pipeline
from tests.support.waiting import wait_for
from trio_deploy import Pipeline, Request


@pytest.fixture
def both(
    load: Callable[..., Any], modules: tuple[ModuleType, ModuleType]
) -> Iterator[tuple[Any, Any]]:
    """`trio_vlm_complete`, and the `trio_vlm` that it asks."""
    name = f"trio_vlm_{uuid.uuid4().hex}"  # tests beside this one serve models, too
    model = load(name=name, max_tokens="2000")
    complete = modules[1].TritonPythonModel()
    limits = {"max_requests": "3", "max_bytes": "60000"}
    complete.initialize(arguments(Path(), model=name, watch="false", **limits))
    yield complete, model
    complete.finalize()


def test_a_plain_request_gets_one_whole_answer(both: tuple[Any, Any], pipeline: Pipeline) -> None:
    requests = [ask(both[0], prompt=QUESTION, images=file(), max_tokens=n) for n in (3, 4, 5)]
    for number, request in enumerate(requests, start=3):
        (response,) = request.outputs()
        expected = pipeline.generate(Request(QUESTION, [file()], max_new_tokens=number))
        assert response["token_ids"] == expected.token_ids
        assert response["text"] == [expected.text.encode()] and response["timings"]
    (response,) = ask(both[0], {"id": 12}, prompt=QUESTION, max_tokens=2).outputs()
    assert response["id"] == [b"12"]


def test_a_plain_requests_error_keeps_its_code(both: tuple[Any, Any]) -> None:
    code, said = ask(both[0], prompt=QUESTION, max_tokens=0).error()
    assert code is TritonError.INVALID_ARG and "max_tokens must be 1 to 2000" in said
    code, said = ask(both[0], {"tempo": 1}, prompt=QUESTION).error()
    assert code is TritonError.INVALID_ARG and "unknown parameter 'tempo'" in said
    assert ask(both[0], prompt=QUESTION, images=b"?").error()[0] is TritonError.INVALID_ARG


@pytest.mark.parametrize(
    "parameters", ["[1]", "{", "[" * 100_000, '{"id": 1' + "0" * 5000 + "}", '{"a": 1, "a": 2}']
)
def test_parameters_that_are_no_object_are_the_clients_fault(
    both: tuple[Any, Any], parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.fakes.triton.Asked.parameters", lambda _: parameters)
        for model in both:
            code, said = ask(model, prompt=QUESTION).error()
            assert code is TritonError.INVALID_ARG and "the request's parameters" in said
    assert ask(both[0], prompt=QUESTION, max_tokens=1).outputs()


def test_a_plain_request_that_is_cancelled_ends_in_the_model(both: tuple[Any, Any]) -> None:
    complete, model = both
    request = ask(complete, prompt=QUESTION, max_tokens=2000)
    wait_for(lambda: model._service.metrics().active == 1)
    request.sender.cancel()
    assert request.error()[0] is TritonError.CANCELLED
    wait_for(lambda: model._service.metrics().outcomes.get("cancelled") == 1)


def test_plain_requests_beyond_the_limit_are_refused(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, model = both
    go = hold(model, monkeypatch)
    requests = [ask(complete, prompt=QUESTION, max_tokens=1) for _ in range(4)]
    code, said = requests[3].error()
    assert code is TritonError.UNAVAILABLE and "max_requests = 3" in said
    go.set()
    assert all(request.outputs() for request in requests[:3])


def test_plain_requests_hold_no_more_bytes_than_they_may(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, model = both
    go = hold(model, monkeypatch)
    first = ask(complete, prompt=QUESTION, images=file() + bytes(50_000), max_tokens=1)
    code, said = ask(complete, prompt=QUESTION, images=file() + bytes(10_000)).error()
    assert code is TritonError.UNAVAILABLE and "max_bytes is 60000" in said
    small = ask(complete, prompt=QUESTION, max_tokens=1)
    go.set()
    assert first.outputs() and small.outputs()
    assert ask(complete, prompt=QUESTION, images=bytes(70_000)).error()[0] is (
        TritonError.INVALID_ARG
    ), "one that is too large by itself is judged by its limits"


def test_a_plain_request_for_which_there_is_no_thread_is_answered(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, _ = both

    def none(*given: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(complete._pool, "submit", none)
        code, said = ask(complete, prompt=QUESTION).error()
        assert code is TritonError.INTERNAL and "new thread" in said
    assert not complete._open
    assert ask(complete, prompt=QUESTION, max_tokens=1).outputs()


def test_a_plain_request_without_a_model_to_ask_is_refused(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, model = both
    batcher = model._service._batcher
    prefill = served_pipeline(model).prefill

    def until_cancelled(*given: Any) -> Any:
        wait_for(lambda: len(batcher._queue.snapshot().cancelled) == len(unfinished(batcher)))
        return prefill(*given)

    monkeypatch.setattr(served_pipeline(model), "prefill", until_cancelled)
    monkeypatch.setattr("trio_deploy.serve.triton_server.model._DRAIN_S", 0.2)
    waiting = ask(complete, prompt=QUESTION, max_tokens=2000)
    wait_for(lambda: bool(unfinished(batcher)))
    model.finalize()
    assert waiting.error()[0] is TritonError.CANCELLED
    code, said = ask(complete, prompt=QUESTION).error()
    assert code is TritonError.UNAVAILABLE and "could not be reached" in said
