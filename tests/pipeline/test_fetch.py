"""Pictures at http addresses are fetched within limits, and never by what servers use."""

from __future__ import annotations

import http.server
import io
import ssl
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.support.waiting import wait_for
from trio_deploy import Batcher, Pipeline, Request, TrioError
from trio_deploy.pipeline.fetch import FetchLimits, fetch, fetch_pictures, is_address


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path; counts requests."""

    asked: list[str]
    ended: list[str]
    status: int
    picture: bytes

    def do_GET(self):
        self.asked.append(self.path)
        place, _, to = self.path.partition("?")
        if place == "/circle":
            place, to = "/go", "/circle"
        if place == "/go":
            self.send_response(302)
            self.send_header("Location", to)
            self.end_headers()
        elif place == "/bottomless":  # a redirect whose body has no end
            self.send_response(self.status)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.pour(b"x" * 2**16)
        elif place == "/announcing":
            self.pour(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif place == "/stuck":  # not even an answer; read returns when the connection ends
            self.rfile.read(1)
        elif place == "/picture":
            self.answer(self.picture, len(self.picture))
        elif place == "/cut":
            self.answer(self.picture[:50], len(self.picture))
        elif place == "/unsaid":  # without Content-Length
            self.answer(self.picture, None)
        elif place == "/chunks":  # the second of which is cut
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nabcde\r\nff\r\nab")
        elif place == "/nowhere":
            self.send_response(302)
            self.end_headers()
        elif place == "/odd":
            self.send_response(304)
            self.end_headers()
        elif place == "/closed":
            pass
        elif place == "/rubbish":
            self.wfile.write(b"no HTTP\r\n")
        elif place == "/page":
            self.answer(b"<!DOCTYPE html><html><body>a picture's page</body></html>", None)
        elif place == "/slow":
            self.send_response(200)
            self.end_headers()
            self.pour(b"x", 0.02)
        else:
            self.send_error(404)

    def pour(self, content, pause=0.0):
        """Write without end, until the other side ends the connection."""
        try:
            while not self.server.stop.wait(pause):
                self.wfile.write(content)
        except OSError:
            self.ended.append(self.path)

    def answer(self, content, length):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A web server on this machine: its address, and the paths asked for."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(
        content, "png"
    )
    handler = type("Handler", (Site,), {"asked": [], "ended": [], "picture": content.getvalue()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.stop = threading.Event()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.stop.set()
    server.shutdown()
    server.server_close()


def test_a_picture_is_fetched_also_over_redirects(site):
    assert fetch(f"{site.address}/picture") == site.picture
    assert fetch(f"{site.address}/unsaid") == site.picture
    assert fetch(f"{site.address}/go?/go?/picture") == site.picture
    assert site.asked[2:] == ["/go?/go?/picture", "/go?/picture", "/picture"]


@pytest.mark.parametrize(
    ("path", "limits", "words"),
    [
        ("/none", {}, "the server says 404"),
        ("/cut", {}, "broke off"),
        ("/picture", {"max_bytes": 100}, "the file is larger than 100 B"),
        ("/unsaid", {"max_bytes": 100}, "the file is larger than 100 B"),
        ("/go?file:///etc/hostname", {}, "redirects to a scheme other than http"),
        ("/go?ftp://127.0.0.1/x", {}, "redirects to a scheme other than http"),
        ("/go?/go?/go?/picture", {"max_redirects": 2}, "redirects too often"),
        ("/circle", {}, "redirects too often"),
        ("/circle", {"max_redirects": 30}, "redirects too often"),
        ("/nowhere", {}, "the server says 302 and names no address to go to"),
        ("/odd", {}, "the server says 304"),
        ("/chunks", {}, "the connection broke off"),
        ("/closed", {}, "the server closed the connection without an answer"),
        ("/rubbish", {}, "the server does not speak HTTP"),
        ("/go?http://127.0.0.1:port/x", {}, "not valid .nonnumeric port"),
        ("/two words", {}, "the address.* is not valid"),
        ("/B\u00e4r", {}, "the address.* is not valid"),
        ("/slow", {"timeout_s": 0.3}, "it took longer than 0.3 s"),
    ],
)
def test_beyond_the_limits_is_one_error(site, path, limits, words):
    started = time.monotonic()
    with pytest.raises(TrioError, match=f"cannot fetch {site.address}.*{words}") as error:
        fetch(site.address + path, FetchLimits(**limits))
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 25, "it ends at its limit, not at the server's"


def test_a_server_without_tls_is_one_error(site):
    address = site.address.replace("http:", "https:")
    with pytest.raises(TrioError, match=f"cannot fetch {address}/picture: [^:]*SSL"):
        fetch(f"{address}/picture")


def test_a_certificate_that_does_not_fit_is_no_invalid_address(site, monkeypatch):
    def connect(connection):
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: IP address mismatch")

    monkeypatch.setattr("http.client.HTTPSConnection.connect", connect)
    with pytest.raises(TrioError, match="cannot fetch https://x/: certificate verify failed: IP"):
        fetch("https://x/")


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "x"])
def test_nothing_but_http_is_fetched(address):
    with pytest.raises(TrioError, match="only http:// and https:// addresses are fetched"):
        fetch(address)
    assert is_address(address) == ("://" in address), "and is not looked for as a file"


def test_an_address_nobody_answers_is_one_error():
    with pytest.raises(TrioError, match="cannot fetch http://127.0.0.1:1/x: "):
        fetch("http://127.0.0.1:1/x")


def _fetchers():
    return [thread for thread in threading.enumerate() if thread.name == "fetch a picture"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_body_of_a_redirect_is_not_read(site, status):
    """However long it is: the next connection ends this one."""
    site.status = status
    assert fetch(f"{site.address}/bottomless", FetchLimits(max_bytes=2**20)) == site.picture
    wait_for(lambda: site.ended == ["/bottomless"])
    wait_for(lambda: not _fetchers())


@pytest.mark.parametrize("path", ["/announcing", "/slow", "/stuck"])
def test_at_the_deadline_the_connection_ends(site, path):
    """Whatever the server sends, or does not: no thread is left that reads."""
    with pytest.raises(TrioError, match="it took longer than 0.3 s"):
        fetch(site.address + path, FetchLimits(timeout_s=0.3))
    wait_for(lambda: not _fetchers())


def test_the_time_of_a_request_is_bounded_over_all_its_addresses(site, monkeypatch):
    """Each address within its own limit; what another request fetched takes none."""
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic():
            return now

    def served(handler):
        nonlocal now
        now += 20
        Site.do_GET(handler)

    monkeypatch.setattr("trio_deploy.pipeline.fetch.time", Clock)
    site.do_GET = served
    addresses = [f"{site.address}/picture?{number}" for number in range(5)]
    limits = FetchLimits(max_request_s=50.0)
    files = {}
    assert fetch_pictures(Request("a", addresses[:3]), files, limits) == [site.picture] * 3
    assert fetch_pictures(Request("a", addresses), files, limits) == [site.picture] * 5
    with pytest.raises(
        TrioError, match=rf"cannot fetch {site.address}/picture\?3: with it .* than 50 s together"
    ):
        fetch_pictures(Request("a", addresses), {}, limits)
    assert len(site.asked) == 5 + 3, "the fourth is not asked for"


def test_an_address_may_take_what_the_request_has_left(site):
    with pytest.raises(TrioError, match="took longer than 0.3 s together: pass fewer, or download"):
        fetch_pictures(Request("a", f"{site.address}/slow"), {}, FetchLimits(max_request_s=0.3))


def test_one_address_in_several_requests_is_fetched_once(site):
    address = f"{site.address}/picture"
    files = {}
    asked = [Request("a", address), Request("b", [address, "local.png", address]), Request("c")]
    first, second, third = (fetch_pictures(request, files) for request in asked)
    assert first[0] is second[0] is second[2] == site.picture
    assert second[1] == "local.png" and third == []
    assert site.asked == ["/picture"]


def test_pictures_of_a_request_are_bounded_together(site):
    """Each request's alone, whether a file's length is said, and whoever fetched it first."""
    size = len(site.picture)
    kinds = ("picture", "unsaid")
    addresses = [f"{site.address}/{kind}?{number}" for number in (1, 2) for kind in kinds]
    limits = FetchLimits(max_request_bytes=2 * size)
    for pair in (addresses[:2], addresses[2:]):
        files = {}
        assert fetch_pictures(Request("a", pair), files, limits) == [site.picture] * 2
        assert fetch_pictures(Request("b", pair[:1]), files, limits) == [site.picture]
    fetched = {}
    for address in addresses:
        fetch_pictures(Request("a", address), fetched, limits)
    for three in (addresses[:3], addresses[1:]):
        for files in ({}, dict(fetched)):
            with pytest.raises(
                TrioError,
                match=f"cannot fetch {site.address}.* the request have more than .* together: pass",
            ):
                fetch_pictures(Request("b", three), files, limits)


def test_nothing_is_fetched_for_a_request_that_is_wrong_without_it(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    address = f"{site.address}/picture"
    placeholders = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    good = Request("what color is the circle?", address, max_new_tokens=1)
    wrong = [
        Request("", address),
        Request("x", address, budget=7.0),
        Request("x", address, budget=1e-9, keep=[1]),
        Request(placeholders, [address, address]),
        Request("x", address, max_new_tokens=0),
        Request("x", address, min_new_tokens=9, max_new_tokens=3),
        Request("x " * 100_000, address),
        Request("x", [f"{address}?{number}" for number in range(5000)]),
        "x",
    ]
    for request in wrong:
        for asked in ([request], [good, request]):
            with pytest.raises(TrioError):
                pipeline.generate_batch(asked)
    with pytest.raises(TrioError, match="request 1: prompt must be"):
        pipeline.generate_batch([good, Request(7, address)])
    assert site.asked == []


def test_an_error_of_fetching_names_the_request(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    none = f"{site.address}/none"
    with pytest.raises(TrioError, match=f"^cannot fetch {none}: the server says 404"):
        pipeline.generate(Request("what?", none))
    for first in (Request("what?"), Request("what?", f"{site.address}/page")):
        with pytest.raises(TrioError, match=f"^request 1: cannot fetch {none}: the server says"):
            pipeline.generate_batch([first, Request("what?", none)])


def test_an_error_of_a_fetched_picture_names_its_address(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    page = f"{site.address}/page"
    with pytest.raises(TrioError, match=f"^{page} cannot be read as a picture"):
        pipeline.generate(Request("what color is the circle?", page))
    with pytest.raises(TrioError, match=f"^request 1: {page} cannot be read as a picture"):
        pipeline.generate_batch([Request("what?"), Request("what?", page)])


def test_a_pipeline_fetches_and_what_servers_use_does_not(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    request = Request("what color is the circle?", f"{site.address}/picture", max_new_tokens=4)
    expected = pipeline.generate(Request(request.prompt, site.picture, max_new_tokens=4))
    assert pipeline.generate(request).token_ids == expected.token_ids
    with pipeline.stream(request) as stream:
        assert "".join(stream) == expected.text
    fetched = list(site.asked)
    with pytest.raises(TrioError, match="is an address, .* pass the content of the file"):
        pipeline.prepare(request)
    with Batcher(pipeline) as batcher, pytest.raises(TrioError, match="is an address"):
        batcher.submit(request).result(60)
    assert site.asked == fetched


def test_a_budget_below_one_token_is_named_in_the_answer(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    for budget, said in ((0.001, True), (0.111, False)):
        asked = Request("what color is the circle?", site.picture, max_new_tokens=1, budget=budget)
        warnings = pipeline.generate(asked).warnings
        assert any("keeps less than one of 256 visual tokens" in w for w in warnings) is said


def test_arrays_are_pictures_in_either_order_of_channels(site, bundles):
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    array = np.asarray(Image.open(io.BytesIO(site.picture)))
    for images, bgr in ((array, False), ([array], False), (array[..., ::-1], True)):
        state = pipeline.prepare(Request("what?", images, bgr=bgr))
        assert np.array_equal(np.asarray(state.images[0]), array)
    both = [Request("what?", array, bgr=bgr, max_new_tokens=1) for bgr in (False, True)]
    plain, swapped = (answer.images[0] for answer in pipeline.generate_batch(both))
    assert np.array_equal(np.asarray(plain), np.asarray(swapped)[..., ::-1])
    for wrong in (array[..., 0], array.astype(np.float32), array[None], array[:0], array[..., :2]):
        with pytest.raises(TrioError, match=r"an array must be a picture of uint8 \[height, width"):
            pipeline.prepare(Request("what?", wrong))
