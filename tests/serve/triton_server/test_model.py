"""`trio_vlm` with a stand-in for Triton: what a client sends, and what it gets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.batching import expire
from tests.support.fakes import triton as fake_utils
from tests.support.fakes.triton import Asked, Sender, TritonError, arguments
from tests.support.tensors import arrays, file, one, text, texts
from tests.support.triton_models import QUESTION, ask, hold, served_pipeline, wait_for_prefill
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.serve.triton_server.request import INPUTS


def test_an_answer_is_streamed_token_by_token(load: Callable[..., Any], pipeline: Pipeline) -> None:
    request = ask(load(), prompt=QUESTION, images=file(), max_tokens=6, budget=0.3)
    responses = request.outputs()
    expected = pipeline.generate(Request(QUESTION, [file()], max_new_tokens=6, budget=0.3))
    assert [response["token_ids"] for response in responses] == [[i] for i in expected.token_ids]
    assert b"".join(response["text"][0] for response in responses).decode() == expected.text
    assert all(set(response) == {"text", "token_ids"} for response in responses[:-1])
    assert responses[-1]["finish_reason"] == [b"length"]
    timings = json.loads(responses[-1]["timings"][0])
    assert timings["kept_tokens"] == expected.keep_counts and timings["first_token_s"] > 0
    assert timings["visual_tokens"] == 256 and timings["kv_bytes"] == expected.kv_bytes


@pytest.mark.parametrize("stream", [True, False])
def test_words_that_the_model_does_not_know_come_with_the_last_response(
    load: Callable[..., Any], stream: bool
) -> None:
    model = load()
    request = ask(model, {"stream": stream}, prompt="is there a Giraffe ?", max_tokens=4)
    *pieces, last = request.outputs()
    (warning,) = last["warnings"]
    assert b"lacks 'Giraffe': " in warning
    assert not any("warnings" in piece for piece in pieces)
    assert "warnings" not in ask(model, prompt=QUESTION, max_tokens=4).outputs()[-1]


@pytest.mark.parametrize(("given", "echoed"), [(7, b"7"), ("a-1 ä", "a-1 ä".encode())])
def test_a_requests_id_comes_back_with_each_response(
    load: Callable[..., Any], given: object, echoed: bytes
) -> None:
    model = load()
    for stream in (True, False):
        request = ask(model, {"stream": stream, "id": given}, prompt=QUESTION, max_tokens=3)
        responses = request.outputs()
        assert len(responses) == (3 if stream else 1)
        assert [response["id"] for response in responses] == [[echoed]] * len(responses)
    assert all("id" not in response for response in ask(model, prompt=QUESTION).outputs())


def test_without_streaming_it_is_one_response(load: Callable[..., Any], pipeline: Pipeline) -> None:
    request = ask(load(), {"stream": False}, prompt=QUESTION, images=file(), max_tokens=5)
    (response,) = request.outputs()
    expected = pipeline.generate(Request(QUESTION, [file()], max_new_tokens=5))
    assert response["token_ids"] == expected.token_ids
    assert response["text"] == [expected.text.encode()]
    assert response["finish_reason"] == [b"length"] and response["timings"]
    code, said = ask(load(), {"stream": False}, prompt=QUESTION, max_tokens=0).error()
    assert code is TritonError.INVALID_ARG and "max_tokens must be 1 to" in said


def test_messages_with_several_pictures_are_answered_as_by_the_pipeline(
    load: Callable[..., Any], pipeline: Pipeline
) -> None:
    content = [{"type": "image"}, text("and"), {"type": "image"}, text("what is red ?")]
    messages = [{"role": "user", "content": content}]
    files = [file(60, 40), file(30, 50)]
    request = ask(load(), messages=json.dumps(messages), images=texts(*files), max_tokens=4)
    expected = pipeline.generate(Request(messages, files, max_new_tokens=4))
    assert request.token_ids() == expected.token_ids


def test_requests_sent_together_are_answered_each_by_its_own(
    load: Callable[..., Any], pipeline: Pipeline
) -> None:
    model = load(max_rows="5", prefillers="2")
    requests = []
    for number in range(12):
        inputs: dict[str, Any] = {"images": file(40 + number)} if number % 3 else {}
        requests.append(
            ask(
                model,
                prompt=QUESTION,
                max_tokens=2 + number,
                temperature=1.0,
                seed=number,
                **inputs,
            )
        )
    for number, request in enumerate(requests):
        expected = pipeline.generate(
            Request(
                QUESTION,
                [file(40 + number)] if number % 3 else [],
                max_new_tokens=2 + number,
                temperature=1.0,
                seed=number,
            )
        )
        assert request.token_ids() == expected.token_ids


def test_a_cancelled_stream_ends_within_a_token(load: Callable[..., Any]) -> None:
    model = load(max_tokens="2000")

    def hang_up(sender: Sender) -> None:
        if len(sender.responses) == 3:
            sender.cancel()

    request = Asked({"prompt": texts(QUESTION), "max_tokens": one(2000, "int32")})
    request.sender.on_send = hang_up
    model.execute([request])
    code, _ = request.error()
    assert code is TritonError.CANCELLED
    # The token that was on its way, one more, and the error.
    assert len(request.sender.responses) <= 3 + 2 + 1


def test_a_whole_answer_that_is_cancelled_ends_in_the_model(load: Callable[..., Any]) -> None:
    model = load(max_tokens="2000")
    request = ask(model, {"stream": False}, prompt=QUESTION, max_tokens=2000)
    wait_for(lambda: model._service.metrics().active == 1)
    request.sender.cancel()
    assert request.error()[0] is TritonError.CANCELLED
    assert model._service.metrics().outcomes.get("cancelled") == 1


def test_a_waiting_request_is_cancelled_too_and_what_is_too_much_is_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(max_rows="1", max_queue="2")
    go = hold(model, monkeypatch)
    first = ask(model, prompt=QUESTION, max_tokens=2)
    wait_for_prefill(model)
    assert model._service.metrics().prefilling == 1, "it seems that nothing waits or runs"
    second, third = ask(model, prompt=QUESTION, max_tokens=2), ask(model, prompt=QUESTION)
    refused = ask(model, prompt=QUESTION)
    assert refused.error() == (TritonError.UNAVAILABLE, refused.error()[1])
    assert "max_queue = 2" in refused.error()[1]
    third.sender.cancel()
    wait_for(lambda: bool(model._service._batcher._queue.snapshot().cancelled))
    go.set()
    assert third.error()[0] is TritonError.CANCELLED
    assert len(first.outputs()) == len(second.outputs()) == 2


def test_deadlines_end_answers(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(max_tokens="2000", max_timeout_s="600")
    long = Asked({"prompt": texts(QUESTION), "max_tokens": one(2000, "int32")})

    def let_it_pass(sender: Sender) -> None:
        expire(model._service._batcher)

    long.sender.on_send = let_it_pass
    model.execute([long])
    assert long.outputs()[-1]["finish_reason"] == [b"deadline"]
    go = hold(model, monkeypatch)
    first = ask(model, prompt=QUESTION, max_tokens=1)
    wait_for_prefill(model)
    late = ask(model, timeout=1000, prompt=QUESTION)
    time.sleep(0.01)
    go.set()
    assert late.error()[0] is TritonError.UNAVAILABLE and "deadline" in late.error()[1]
    assert first.outputs()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": QUESTION, "images": b"nonsense"}, "picture"),
    ({"prompt": "<image> ?", "images": file()}, "placeholder"),
    ({"messages": json.dumps([{"role": "user", "content": "?"}]), "images": file()}, "placeholder"),
    ({"prompt": QUESTION, "images": file(), "budget": 0.001}, "budget"),
    ({"prompt": QUESTION, "temperature": float("nan")}, "temperature"),
    ({"prompt": "word " * 3000}, "context"),
    ({"prompt": QUESTION, "images": file()[:200]}, "picture"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG)
def test_what_a_client_does_wrong_is_an_invalid_argument(
    load: Callable[..., Any], inputs: dict[str, Any], message: str
) -> None:
    model = load()
    code, said = ask(model, **inputs).error()
    assert code is TritonError.INVALID_ARG and message in said
    assert ask(model, prompt=QUESTION, max_tokens=1).outputs(), "the others are served on"


@pytest.mark.parametrize(
    "parameters", ["[1]", "{", "[" * 100_000, '{"id": 1' + "0" * 5000 + "}", '{"a": 1, "a": 2}']
)
def test_parameters_that_are_no_object_are_the_clients_fault(
    load: Callable[..., Any], parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.fakes.triton.Asked.parameters", lambda _: parameters)
        code, said = ask(model, prompt=QUESTION).error()
    assert code is TritonError.INVALID_ARG and "the request's parameters" in said
    assert ask(model, prompt=QUESTION, max_tokens=1).outputs()


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \n",
        [],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [text("\t")]}],
        [{"role": "user", "content": [{"type": "image"}, text(" ")]}],
    ],
)
def test_a_prompt_without_text_is_the_same_error_in_python_and_from_a_client(
    load: Callable[..., Any], pipeline: Pipeline, prompt: Any, pictures: int
) -> None:
    files = [file()] * pictures
    with pytest.raises(TrioError, match="^the prompt has no text: write something to ask$") as own:
        pipeline.generate(Request(prompt, files))
    said = {"prompt": prompt} if isinstance(prompt, str) else {"messages": json.dumps(prompt)}
    sent = {"images": texts(*files)} if files else {}
    assert ask(load(), **said, **sent).error() == (TritonError.INVALID_ARG, str(own.value))


def test_our_own_failures_are_internal(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()

    def fail(*given: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(served_pipeline(model), "prefill", fail)
        code, said = ask(model, prompt=QUESTION).error()
        assert code is TritonError.INTERNAL and "no memory" in said
    assert ask(model, prompt=QUESTION, max_tokens=1).outputs()


def test_a_client_that_is_gone_harms_nobody(load: Callable[..., Any]) -> None:
    model = load()

    def broken(sender: Sender) -> None:
        raise RuntimeError("the connection is closed")

    gone = Asked({"prompt": texts(QUESTION)})
    gone.sender.on_send = broken
    model.execute([gone])
    assert ask(model, prompt=QUESTION, max_tokens=3).outputs()
    wait_for(lambda: not model._answers)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bundle": "missing"}, "missing"),
        ({"max_token": "5"}, "unknown parameter 'max_token'"),
        ({"runtime": "torch"}, "unknown runtime"),
        ({"budget": "0.001", "warm_up": "true"}, "budget"),
    ],
)
def test_a_model_that_cannot_be_served_says_why_and_does_not_load(
    load: Callable[..., Any],
    parameters: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(fake_utils.TritonModelException, match=message):
        load(**parameters)


def test_a_damaged_bundle_does_not_load(
    model_module: ModuleType, bundle: Path, tmp_path: Path
) -> None:
    for path in bundle.rglob("*"):
        if path.is_file():
            copy = tmp_path / "bundle" / path.relative_to(bundle)
            copy.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            copy.write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(fake_utils.TritonModelException, match="trio_vlm: .*safetensors"):
        model_module.TritonPythonModel().initialize(arguments(tmp_path, bundle="bundle"))


def test_a_model_warms_up_and_takes_tritons_own_parameters(load: Callable[..., Any]) -> None:
    model = load(warm_up="true", FORCE_CPU_ONLY_INPUT_TENSORS="no")
    assert ask(model, prompt=QUESTION, max_tokens=1).outputs()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_kv_bytes": "1"}, "max_kv_bytes is 1"),
        ({"max_prompt_tokens": "1"}, "max_prompt_tokens is 1"),
        ({"max_prompt_bytes": "1"}, "max_prompt_bytes is 1"),
        ({"max_image_pixels": "1"}, "max_image_pixels is 1"),
        ({"max_queue_bytes": "1"}, "max_queue_bytes is 1"),
        ({"budget": "0.0001"}, "budget"),
    ],
    ids=str,
)
def test_a_model_whose_limits_no_request_can_keep_does_not_load(
    load: Callable[..., Any], parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(Exception, match=f"warm-up question .* failed: .*{message}") as caught:
        load(warm_up="true", **parameters)
    assert type(caught.value) is fake_utils.TritonModelException


def test_a_model_may_take_no_longer_than_a_deadline_for_its_warm_up(
    load: Callable[..., Any],
) -> None:
    """The first run takes longer than those after it."""
    model = load(warm_up="true", max_timeout_s="1e-9")
    assert "deadline" in ask(model, prompt=QUESTION).error()[1]


def test_what_is_held_has_a_bound_in_bytes(
    load: Callable[..., Any], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of pictures that wait included: those of a small file are large."""
    picture = file()
    tiles = pipeline.prepare(Request(QUESTION, [picture])).processed[0].feeds["pixel_values"].nbytes
    assert tiles > 10 * len(picture)
    model = load(max_queue_bytes=str(2 * (tiles + len(picture) + len(QUESTION)) + 10))
    go = hold(model, monkeypatch)
    held = [ask(model, prompt=QUESTION, images=picture, max_tokens=2) for _ in range(2)]
    code, said = ask(model, prompt=QUESTION, images=picture).error()
    assert code is TritonError.UNAVAILABLE and "max_queue_bytes" in said
    code, said = ask(model, prompt=QUESTION, images=texts(*[picture] * 3)).error()
    assert code is TritonError.INVALID_ARG and "max_queue_bytes" in said
    go.set()
    assert all(request.outputs() for request in held)
    assert ask(model, prompt=QUESTION, images=picture, max_tokens=2).outputs()
    ask(model, prompt=QUESTION, images=picture, top_p=7.0).error()
    ask(model, prompt=QUESTION, images=picture, budget=0.0001).error()
    wait_for(lambda: model._service.used_bytes == 0)
    wait_for(lambda: model._service.metrics().outcomes["refused"] == 1)


def test_stopping_answers_what_was_asked(load: Callable[..., Any]) -> None:
    model = load()
    requests = [ask(model, prompt=QUESTION, max_tokens=5) for _ in range(6)]
    model.finalize()
    assert all(len(request.outputs(0)) == 5 for request in requests)
    code, said = ask(model, prompt=QUESTION).error()
    assert code is TritonError.UNAVAILABLE and "shutting down" in said


@given(
    tensors=st.dictionaries(st.sampled_from(list(INPUTS)), arrays, max_size=5),
    parameters=st.dictionaries(
        st.sampled_from(["stream", "x"]),
        st.booleans() | st.integers() | st.text(max_size=5),
        max_size=2,
    ),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_is_sent_the_instance_serves_on(
    served: Any, tensors: dict[str, np.ndarray], parameters: dict[str, Any]
) -> None:
    request = Asked({"max_tokens": one(2, "int32"), **tensors}, parameters)
    served.execute([request])
    assert request.sender.ended.wait(WAIT_S)
    last = request.sender.responses[-1:]
    if last and last[0].has_error():
        error = last[0].error()
        assert error.code() is TritonError.INVALID_ARG or "deadline" in error.message()
    assert ask(served, prompt=QUESTION, max_tokens=1).outputs()


@pytest.fixture
def served(load: Callable[..., Any]) -> Any:
    return load()
