"""The service behind a server of ten lines: what any server gets without Triton."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.batching import waiting
from tests.support.bundles import Bundles
from tests.support.questions import SCHEDULE
from tests.support.tensors import file
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.pipeline.batcher.events import Cancelled, DeadlinePassed, Event, Refused
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest
from trio_deploy.serve.service import Service

QUESTION = "what color is the circle ?"


class Server:
    """A server: a body comes in, pieces of text go out, then how it ended."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def post(self, **body: Any) -> list[str]:
        said: list[str] = []
        prompt = body.pop("prompt", QUESTION).encode()
        try:
            client = ClientRequest(prompt=prompt, **body)
            answer = self.service.submit(client, lambda event: said.append(event.text))
            reason = answer.result(WAIT_S).finish_reason
            return [*said, reason]
        except TrioError as error:
            return [type(error).__name__, str(error)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Pipeline:
    """The shipped model, told that a token ends answers which it does not give."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    bundles.copy(folder, "tiny", schedule=SCHEDULE)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["generation"]["eos_token_ids"] = [60]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Pipeline.open(folder, threads=1)


@pytest.fixture
def service(pipeline: Pipeline) -> Iterator[Service]:
    service = Service(pipeline, ServiceLimits(max_tokens=2000), warm_up=False)
    yield service
    service.close()


def hold(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keep prefills waiting until the event is set."""
    go, prefill = threading.Event(), pipeline.prefill
    monkeypatch.setattr(pipeline, "prefill", lambda *given: go.wait(WAIT_S) and prefill(*given))
    return go


def test_a_server_of_ten_lines_answers_as_the_pipeline_does(
    service: Service, pipeline: Pipeline
) -> None:
    expected = pipeline.generate_batch([Request(QUESTION, [file()], max_new_tokens=6)])[0]
    *pieces, reason = Server(service).post(images=[file()], max_tokens=6)
    assert "".join(pieces) == expected.text and reason == expected.finish_reason
    assert len(pieces) == len(expected.token_ids)


def test_what_a_client_does_wrong_is_told_and_counted(service: Service) -> None:
    server = Server(service)
    assert server.post(images=[b"nonsense"])[1].startswith("image 0: ")
    assert server.post(max_tokens=2001)[1].startswith("max_tokens must be 1 to 2000")
    assert "context" in server.post(prompt="word " * 3000)[1]
    service.count_rejected(TrioError("no JSON"))
    assert server.post(max_tokens=1)[-1] == "length"
    assert service.metrics().outcomes == {"invalid": 4, "length": 1}
    assert service.used_bytes == 0


def test_requests_beyond_the_bytes_are_refused_until_there_is_room(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = pipeline.prepare(Request(QUESTION, [file()])).processed[0].feeds["pixel_values"].nbytes
    one = tiles + len(file()) + len(QUESTION)
    service = Service(pipeline, ServiceLimits(max_queue_bytes=2 * one), warm_up=False)
    go = hold(pipeline, monkeypatch)
    client = ClientRequest(prompt=QUESTION.encode(), images=[file()], max_tokens=1)
    handles = [service.submit(client) for _ in range(2)]
    assert service.used_bytes == 2 * one
    with pytest.raises(Refused, match="max_queue_bytes"):
        service.submit(client)
    with pytest.raises(TrioError, match="max_queue_bytes") as caught:
        service.submit(ClientRequest(prompt=b"?", images=[file()] * 3))
    assert type(caught.value) is TrioError
    go.set()
    for handle in handles:
        handle.result(WAIT_S)
    assert service.used_bytes == 0
    assert service.submit(client).result(WAIT_S).finish_reason == "length"
    assert service.metrics().outcomes == {"refused": 1, "invalid": 1, "length": 3}
    assert service.close()


def test_a_full_queue_refuses_and_frees_what_was_counted(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ServiceLimits(batcher=BatcherLimits(max_rows=1, max_queue=1))
    service = Service(pipeline, limits, warm_up=False)
    go = hold(pipeline, monkeypatch)
    client = ClientRequest(prompt=b"what is red ?", max_tokens=1)
    first = service.submit(client)
    wait_for(lambda: service.metrics().queued == 0)
    second = service.submit(client)
    used = service.used_bytes
    with pytest.raises(Refused, match="max_queue = 1"):
        service.submit(client)
    assert service.used_bytes == used == 2 * len("what is red ?")
    go.set()
    assert first.result(WAIT_S).token_ids == second.result(WAIT_S).token_ids
    service.close()


def test_deadlines_and_cancelling_reach_the_batcher(
    pipeline: Pipeline, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold(pipeline, monkeypatch)
    first = service.submit(ClientRequest(prompt=b"what is red ?", max_tokens=1))
    wait_for(lambda: service.metrics().queued == 0)
    late = service.submit(ClientRequest(prompt=b"what is red ?", timeout_s=0.001))
    gone = service.submit(ClientRequest(prompt=b"what is red ?"))
    gone.cancel()
    wait_for(lambda: len(waiting(service._batcher)) == 2)
    go.set()
    first.result(WAIT_S)
    with pytest.raises(DeadlinePassed):
        late.result(WAIT_S)
    with pytest.raises(Cancelled):
        gone.result(WAIT_S)
    assert service.used_bytes == 0


def test_a_listener_that_raises_frees_what_was_counted(service: Service) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("client gone")

    handle = service.submit(ClientRequest(prompt=b"what is red ?", max_tokens=500), broken)
    with pytest.raises(Cancelled):
        handle.result(WAIT_S)
    assert service.used_bytes == 0


def test_closing_answers_what_was_submitted_and_refuses_more(service: Service) -> None:
    client = ClientRequest(prompt=b"what is red ?", max_tokens=5)
    handles = [service.submit(client) for _ in range(4)]
    assert service.close()
    assert all(handle.done for handle in handles)
    assert Server(service).post()[0] == "Refused"


def test_closing_without_time_cancels(service: Service) -> None:
    handle = service.submit(ClientRequest(prompt=b"what is red ?", max_tokens=2000))
    assert not service.close(timeout=0.0)
    with pytest.raises(Cancelled):
        handle.result(0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ServiceLimits(batcher=BatcherLimits(max_kv_bytes=1)), "max_kv_bytes is 1"),
        (ServiceLimits(max_image_pixels=1), "max_image_pixels is 1"),
        (ServiceLimits(max_queue_bytes=1), "max_queue_bytes is 1"),
    ],
)
def test_limits_that_no_request_can_keep_show_in_the_warm_up(
    pipeline: Pipeline, limits: ServiceLimits, message: str
) -> None:
    with pytest.raises(TrioError, match=f"warm-up question about a picture failed: .*{message}"):
        Service(pipeline, limits)


def test_a_warm_up_is_not_counted(pipeline: Pipeline) -> None:
    service = Service(pipeline)
    assert service.metrics().outcomes == {} and service.metrics().prefills == 0
    service.close()
