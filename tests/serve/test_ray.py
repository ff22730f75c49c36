"""The application under Ray Serve: two nodes of a local cluster, one of which dies under load.

Run by `make ray-tests` with the Python of an environment of its own, since Ray is large.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.serve.openai.keys import API_KEY
from trio_deploy.serve.ray_app import Asked, app

QUESTIONS = (
    "what color is the circle?",
    "what shape is red?",
    "where is the circle?",
    "what is it?",
)
LIMITS = {"max_tokens": "6", "max_rows": "8", "threads": "1", "name": "tiny"}
KEY = "k-1"


def asked(bundles: Bundles, **more: str) -> dict[str, str]:
    return {"bundle": str(bundles.path("tiny")), **LIMITS, **more}


def test_options_and_limits_are_read_before_anything_starts(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    found = Asked.parse(asked(bundles, no_auth="true", replicas="2", max_replicas="3"))
    assert found.options.replicas == 2 and found.settings.service.max_tokens == 6
    assert found.settings.service.batcher.max_rows == 8 and not found.keys
    for wrong, message in (
        ({}, "no_auth=true"),
        ({"no_auth": "true", "max_token": "1"}, "unknown parameter 'max_token'"),
        ({"no_auth": "true", "bundle": str(tmp_path)}, "is no folder of a bundle"),
        ({"no_auth": "true", "replicas": "3", "max_replicas": "2"}, "at least replicas"),
        ({"no_auth": "true", "replicas": "0"}, "replicas must be 1 or more"),
    ):
        with pytest.raises(TrioError, match=message):
            Asked.parse(asked(bundles, **wrong))
    monkeypatch.setenv(API_KEY, KEY)
    assert len(Asked.parse(asked(bundles)).keys) == 1
    with pytest.raises(TrioError, match="one of the two"):
        Asked.parse(asked(bundles, no_auth="true"))
    monkeypatch.setenv(API_KEY, "clé")
    with pytest.raises(TrioError, match="ASCII"):
        Asked.parse(asked(bundles))


def test_a_replica_asks_for_the_key_or_knows_the_hosts(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    served = Asked.parse(asked(bundles)).open()
    served.service.close(timeout=0.0)
    assert served.name == "tiny" and served.doors.keys and served.doors.hosts is None
    monkeypatch.delenv(API_KEY)
    served = Asked.parse(asked(bundles, no_auth="true", allowed_host="A.example.com")).open()
    served.service.close(timeout=0.0)
    assert served.doors.hosts == {"a.example.com"} and served.doors.any_address


@dataclass
class Load:
    """Clients that ask until they are told to stop.

    Attributes:
        right: answers that were right, streamed or not; `wrong`: those that were not.
        failed: status of each request that failed; `cut`: streams that ended too early.
    """

    url: str
    expected: dict[str, str]
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    cut: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def run(self, number: int) -> None:
        """One client; those with odd numbers stream."""
        import openai

        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        count = number
        while not self.stop.is_set():
            question = QUESTIONS[count % len(QUESTIONS)]
            count += 1
            try:
                text = self._ask(client, question, stream=number % 2 == 1)
            except openai.APIStatusError as error:
                with self.lock:
                    self.failed.append(error.status_code)
                continue
            except openai.APIError:
                with self.lock:
                    self.cut += 1
                continue
            with self.lock:
                if text == self.expected[question]:
                    self.right += 1
                else:
                    self.wrong.append(text)

    @staticmethod
    def _ask(client: Any, question: str, *, stream: bool) -> str:
        from tests.support.http_server import asking
        from tests.support.tensors import file

        messages = asking(question, file())
        answer = client.chat.completions.create(model="tiny", messages=messages, stream=stream)
        if not stream:
            return str(answer.choices[0].message.content)
        parts, ended = [], False
        for chunk in answer:
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                ended = ended or choice.finish_reason is not None
        if not ended:
            import openai

            raise openai.APIConnectionError(request=None)  # type: ignore[arg-type]
        return "".join(parts)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes with room for one replica each."""
    pytest.importorskip("ray", reason="Ray has an environment of its own: make ray-tests")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [found.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=found.address, log_to_driver=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": port},
        )
        yield found, nodes, f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        found.shutdown()


def replicas() -> int:
    from ray import serve

    deployment = serve.status().applications["default"].deployments["trio"]
    return int(deployment.replica_states.get("RUNNING", 0))


@pytest.mark.ray
def test_a_node_dies_under_load_and_no_answer_is_wrong(
    bundles: Bundles, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from tests.support.tensors import file

    found, nodes, url = cluster
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    expected = {
        each: pipeline.generate(Request(each, file(), max_new_tokens=6)).text for each in QUESTIONS
    }
    monkeypatch.setenv(API_KEY, KEY)
    serve.run(app(asked(bundles, replicas="2", cpus="1")), name="default")
    wait_for(lambda: replicas() == 2)
    load = Load(url, expected)
    threads = [threading.Thread(target=load.run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: load.right >= 60)
        found.remove_node(nodes[0], allow_graceful=False)
        seen = load.right
        wait_for(lambda: load.right >= seen + 60)  # the other one goes on
        found.add_node(num_cpus=1)
        wait_for(lambda: replicas() == 2)
        seen = load.right
        wait_for(lambda: load.right >= seen + 30)
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    print(f"right {load.right}, failed {load.failed}, cut {load.cut}")
    assert not load.wrong
    assert set(load.failed) <= {500, 503}  # Ray's own, for what was in flight
    assert len(load.failed) + load.cut <= len(threads) * 3
