"""Responses to Triton, and what may be asked of it."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

from tests.support.fakes.triton import Asked
from tests.support.tensors import texts
from tests.support.waiting import WAIT_S


def test_nothing_is_asked_of_triton_about_a_request_whose_last_response_is_sent(
    model_module: ModuleType,
) -> None:
    """Triton 2.51 dies of it (segmentation fault)."""
    request = Asked()
    sender = sys.modules["trio_deploy.serve.triton_server.backend"].TritonSender(request, {"text"})
    assert not sender.is_cancelled()
    request.sender.cancel()
    assert sender.is_cancelled()
    looks, go = threading.Event(), threading.Event()
    request.sender.on_look = lambda: looks.set() or go.wait(WAIT_S)
    asking = threading.Thread(target=sender.is_cancelled)
    asking.start()
    assert looks.wait(WAIT_S)
    sending = threading.Thread(target=sender.send, args=({"text": texts("a")},), kwargs={"last": 1})
    sending.start()
    sending.join(0.1)
    assert not request.sender.ended.is_set(), "the last response did not wait for the question"
    go.set()
    sending.join()
    asking.join()
    assert not sender.is_cancelled()
    assert not request.sender.crashed
    sender.send({"text": texts("b")}, last=True)
    sender.fail("too late", "INTERNAL")
    assert [response["text"] for response in request.outputs()] == [[b"a"]]
