"""Pictures come from hosts that were named, at public addresses, and from nowhere else."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.http_server import HttpServer
from tests.support.tensors import file
from tests.support.waiting import WAIT_S
from trio_deploy import Request, TrioError
from trio_deploy.pipeline import fetch as fetching
from trio_deploy.pipeline.fetch import is_public
from trio_deploy.serve.fetch import ImageHosts


class Site(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['Host']}{self.path}")
        if self.path == "/go":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        content = {"/picture": file(), "/text": b"hello"}.get(self.path, b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    Site.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Let names resolve to addresses, the next ones at each look-up, all on this machine."""
    real = socket.getaddrinfo

    def names(*lookups: tuple[str, ...]) -> None:
        waiting = list(lookups)

        def fake(host: str, port: int, *given: Any, **named: Any) -> Any:
            found = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            return [entry for each in found for entry in real(each, port, type=socket.SOCK_STREAM)]

        monkeypatch.setattr(fetching.socket, "getaddrinfo", fake)

    return names


PRIVATE = (
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
    *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1"),
    *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:a00:1::", "64:ff9b::a00:1", "no address"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_within_a_network_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and is_public("::ffff:8.8.8.8")


@pytest.mark.parametrize("addresses", [("10.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("::1",)])
def test_a_name_of_which_any_address_is_private_is_refused(
    site: int, resolve: Resolve, addresses: tuple[str, ...]
) -> None:
    resolve(addresses)
    hosts = ImageHosts.parse([f"http://images.example.com:{site}"])
    with pytest.raises(TrioError, match="not a public one"):
        hosts.fetch(f"http://images.example.com:{site}/picture", 10**6)
    assert not Site.asked


def test_the_connection_goes_to_the_address_that_was_checked(
    site: int, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(fetching, "is_public", lambda each: not checked.append(each))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    resolve(("127.0.0.1",), ("10.255.255.1",))  # another one at a second look-up
    hosts = ImageHosts.parse([f"http://images.example.com:{site}"])
    assert hosts.fetch(f"http://images.example.com:{site}/picture", 10**6) == file()
    assert checked == ["127.0.0.1"] and Site.asked == [f"images.example.com:{site}/picture"]


def test_redirects_are_not_followed_and_files_are_bounded(
    site: int, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "is_public", lambda each: True)
    resolve(("127.0.0.1",))
    hosts, address = ImageHosts(), f"http://images.example.com:{site}"
    with pytest.raises(TrioError, match="redirects"):
        hosts.fetch(f"{address}/go", 10**6)
    assert len(Site.asked) == 1
    with pytest.raises(TrioError, match="larger than 10 B"):
        hosts.fetch(f"{address}/picture", 10)
    with pytest.raises(TrioError, match="404"):
        hosts.fetch(f"{address}/nothing", 10**6)


def test_hosts_are_named_exactly() -> None:
    hosts = ImageHosts.parse(["images.example.com", "http://Other.example.com:8080"])
    for good in (
        "https://images.example.com/a.png",
        "HTTPS://IMAGES.example.com:443/a.png?b#c",
        "http://other.example.com:8080/",
    ):
        hosts.check(good)
    for bad in (
        "http://images.example.com/a.png",
        "https://images.example.com:444/a.png",
        "https://images.example.com.evil.com/a.png",
        "https://evil.com/images.example.com",
        "https://user@images.example.com/a.png",
        "https://images.example.com@evil.com/a.png",
        "https://evil.com\\@images.example.com/a.png",
        "https://images.example.com /a.png",
        "http://other.example.com/",
        "ftp://images.example.com/a.png",
        "file:///etc/passwd",
        "https://[::1/",
        "https://images.example.com:99999999/",
        "images.example.com/a.png",
        "",
    ):
        with pytest.raises(TrioError, match="not fetched from this address"):
            hosts.check(bad)
        with pytest.raises(TrioError):
            ImageHosts().check(bad)


@pytest.mark.parametrize("name", ["*.example.com", "*", "", "ftp://a.com", "a.com/b", "a b.com"])
def test_a_host_to_allow_is_a_host(name: str) -> None:
    with pytest.raises(TrioError, match="--allow-images-from takes a host"):
        ImageHosts.parse([name])


def test_the_server_answers_about_pictures_of_its_hosts_alone(
    bundles: Bundles, site: int, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(address: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": address}}
        content = [part, {"type": "text", "text": "what ?"}, part]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 3}

    pipeline, address = opened(bundles), f"http://images.example.com:{site}"
    server = HttpServer(pipeline, images=ImageHosts.parse([address]))
    try:
        monkeypatch.setattr(fetching, "is_public", lambda each: True)
        resolve(("127.0.0.1",))
        answer = server.post("/v1/chat/completions", body(f"{address}/picture")).json()
        prompt = [{"type": "image"}, {"type": "text", "text": "what ?"}, {"type": "image"}]
        request = Request([{"role": "user", "content": prompt}], [file()] * 2, max_new_tokens=3)
        assert answer["choices"][0]["message"]["content"] == pipeline.generate(request).text
        assert len(Site.asked) == 1  # both are the same
        for wrong, param in (
            ("http://127.0.0.1/picture", "messages[0].content[0].image_url.url"),
            (f"{address}/nothing", None),
            (f"{address}/text", "messages"),
        ):
            reply = server.post("/v1/chat/completions", body(wrong))
            assert (reply.status, reply.error["param"]) == (400, param)
        server.wait_until_idle()
        tokens = server.post("/tokenize", {"messages": body(f"{address}/picture")["messages"]})
        assert tokens.status == 400
    finally:
        server.close()


def test_a_picture_that_cannot_be_had_waits_for_those_that_still_come(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, come = threading.Event(), list[str]()

    def fetch(hosts: ImageHosts, url: str, max_bytes: int) -> bytes:
        if url.endswith("wrong"):
            failed.set()
            raise TrioError("cannot fetch it")
        failed.wait(WAIT_S)
        time.sleep(0.1)
        come.append(url)
        return file()

    monkeypatch.setattr(ImageHosts, "fetch", fetch)
    server = HttpServer(opened(bundles), images=ImageHosts.parse(["a.example.com"]))
    try:
        parts = [
            {"type": "image_url", "image_url": {"url": f"https://a.example.com/{name}"}}
            for name in ("wrong", "slow")
        ]
        content = [*parts, {"type": "text", "text": "what ?"}]
        body = {"messages": [{"role": "user", "content": content}]}
        assert server.post("/v1/chat/completions", body).status == 400
        assert come  # so no byte comes that is not counted any more
    finally:
        server.close()
