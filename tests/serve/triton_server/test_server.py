"""The written repository on the real Triton server, over gRPC and HTTP, on loopback.

Run by `make server-tests` with the Python of the server's environment. Two models are served:
`trio` answers as it was trained to, `endless` is the same bundle without end tokens and with a
longer context, so that its answers last as long as a test needs.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import http.client
import io
import json
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from scripts.triton_server import HOST, PROGRAM, TritonServer
from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request
from trio_deploy.checkpoint.processor_files import GenerationInfo
from trio_deploy.cli.main import main
from trio_deploy.evaluation import scenes
from trio_deploy.serve.triton_server.repository import Options, write_repository

pytestmark = pytest.mark.server

if not PROGRAM.exists():
    reason = Path(__file__).parents[3] / ".venv-triton" / "unavailable"
    pytest.skip(
        reason.read_text().strip()
        if reason.is_file()
        else "the server has an environment of its own: make server-tests",
        allow_module_level=True,
    )

grpc_client = pytest.importorskip("tritonclient.grpc")

WAIT_S = 90.0  # generous: other work may have the machine
START_S = 180.0
SCHEMA_1 = Path(__file__).parents[2] / "fixtures" / "schema_1"
LONG = 4000  # tokens, which take longer than what a test does meanwhile
TYPES = {
    "prompt": "BYTES",
    "messages": "BYTES",
    "images": "BYTES",
    "images_base64": "BYTES",
    "stop": "BYTES",
    "bad_words": "BYTES",
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "top_k": "INT32",
    "no_repeat_ngram_size": "INT32",
    "suppress_tokens": "INT64",
    "seed": "INT64",
    "temperature": "FP64",
    "top_p": "FP64",
    "min_p": "FP64",
    "repetition_penalty": "FP64",
    "presence_penalty": "FP64",
    "frequency_penalty": "FP64",
    "budget": "FP64",
    "timeout_s": "FP64",
}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP64": np.float64, "BYTES": np.object_}


# ------------------------------------------------------------------------------------ the server


@dataclass(frozen=True)
class Case:
    """A question about a picture, and what the pipeline answers alone."""

    png: bytes
    question: str
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class Running:
    """A server, the bundles it serves, and questions with known answers."""

    server: TritonServer
    bundle: Bundle
    endless: Bundle
    repositories: list[Path]
    cases: list[Case]


def without_ends(bundle: Bundle, folder: Path) -> Bundle:
    """A copy whose answers go on until their length is reached."""
    copied = folder / "endless"
    copied.mkdir()
    for name in bundle.manifest.files:
        (copied / name).parent.mkdir(exist_ok=True)
        os.link(bundle.path / name, copied / name)
    model = copy.deepcopy(bundle.manifest.model)
    model.config["text_config"]["max_position_embeddings"] = 2 * LONG
    info = GenerationInfo((), bundle.manifest.generation.pad_token_id)
    manifest = msgspec.structs.replace(bundle.manifest, generation=info, model=model)
    (copied / "manifest.json").write_bytes(manifest.dump())
    return Bundle.load(copied)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    bundle = Bundle.load(bundles.path("tiny", budget=0.111))
    endless = without_ends(bundle, folder)
    write_repository(bundle, folder / "models", Options(link=True))
    few = {"max_rows": "2", "max_queue": "2", "max_tokens": str(LONG)}
    write_repository(endless, folder / "more", Options(link=True, name="endless", settings=few))
    pipeline = Pipeline.open(bundle)
    cases = []
    for seed in scenes.TEST_SEEDS[:16]:
        scene = scenes.generate(seed)
        for question in scene.questions[:2]:
            answer = pipeline.generate(Request(question.text, [scene.image]))
            cases.append(Case(png(scene.image), question.text, answer.token_ids, answer.text))
    second = f"--model-repository={folder / 'more'}"
    with TritonServer(folder / "models", folder / "log", [second]) as server:
        yield Running(server, bundle, endless, [folder / "models", folder / "more"], cases)


# ----------------------------------------------------------------------------------- the clients


def tensors(inputs: dict[str, Any]) -> list[Any]:
    """Inputs as the client library wants them; a (type, array) pair is sent as it is."""
    made = []
    for name, value in inputs.items():
        if isinstance(value, tuple):
            kind, array = value
        else:
            kind = TYPES[name]
            items = value if isinstance(value, list) else [value]
            items = [i.encode() if isinstance(i, str) else i for i in items]
            array = np.array(items, NUMPY[kind])
        tensor = grpc_client.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


@dataclass
class Stream:
    """A streamed answer, as far as it came."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, response: Any) -> None:
        self.pieces.append(response.as_numpy("text")[0].decode())
        self.token_ids += response.as_numpy("token_ids").tolist()
        reason = response.as_numpy("finish_reason")
        if reason is not None and len(reason):
            self.reasons.append(reason[0].decode())
            self.timings = json.loads(response.as_numpy("timings")[0])


class Asking:
    """One streamed request over gRPC; an error in a stream has a message and no status."""

    def __init__(
        self,
        server: TritonServer,
        model: str = "trio_vlm",
        parameters: Any = None,
        outputs: Any = None,
        **inputs: Any,
    ) -> None:
        self._queue: queue.Queue = queue.Queue()
        self._client = grpc_client.InferenceServerClient(server.grpc)
        self._client.start_stream(lambda result, error: self._queue.put((result, error)))
        self._client.async_stream_infer(
            model,
            tensors(inputs),
            parameters=parameters,
            outputs=outputs,
            enable_empty_final_response=True,
        )
        self.answer = Stream()

    def next(self) -> bool:
        """Takes the next response; False once there is none."""
        response, error = self._queue.get(timeout=WAIT_S)
        if error is not None:
            self.answer.error = error
            return False
        if len(response.get_response().outputs):
            self.answer.add(response)
        return not response.get_response().parameters["triton_final_response"].bool_param

    def all(self) -> Stream:
        """Everything that comes, then closes the stream."""
        while self.next():
            pass
        self.close()
        return self.answer

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def ask(server: TritonServer, model: str = "trio_vlm", parameters: Any = None, **inputs) -> Stream:
    return Asking(server, model, parameters, **inputs).all()


def post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, server.http_port, timeout=WAIT_S)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def generate(server: TritonServer, model: str = "trio_vlm", **inputs: Any) -> tuple[int, str]:
    """Status and body of a plain request for one whole answer."""
    return post(server, f"/v2/models/{model}/generate", {"stream": False, **inputs})


def encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def until(condition: Any, timeout_s: float = WAIT_S) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def metric(server: TritonServer, name: str, **labels: str) -> float:
    """The sum of a metric's values over all label sets that hold `labels`."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for line, value in server.metrics().items()
        if line.partition("{")[0] == name and all(label in line for label in wanted)
    )


# ------------------------------------------------------------------------------------ the answers


def test_a_streamed_answer_has_the_tokens_of_trio_run(running, tmp_path, capsys):
    case = running.cases[0]
    (tmp_path / "scene.png").write_bytes(case.png)
    image = ["--image", str(tmp_path / "scene.png")]
    main(["run", str(running.bundle.path), *image, "--prompt", case.question, "--json"])
    expected = json.loads(capsys.readouterr().out)
    answer = ask(running.server, prompt=case.question, images=case.png)
    assert answer.error is None
    assert answer.token_ids == expected["token_ids"]
    assert answer.text == expected["text"]
    assert answer.reasons == [expected["finish_reason"]]


def test_tokens_arrive_one_by_one_and_the_last_message_closes_the_answer(running):
    asking = Asking(running.server, "endless_vlm", prompt="what color is the star?", max_tokens=12)
    counts = [0]
    while asking.next():
        counts.append(len(asking.answer.token_ids))
    asking.close()
    assert asking.answer.error is None
    assert len(asking.answer.token_ids) == 12
    assert max(np.diff(counts)) == 1
    assert asking.answer.reasons == ["length"]
    assert asking.answer.timings


def test_32_clients_at_once_get_each_their_own_answer(running):
    barrier = threading.Barrier(32)

    def one(case: Case) -> Stream:
        barrier.wait(WAIT_S)
        return ask(running.server, prompt=case.question, images=case.png)

    assert len(running.cases) == 32
    assert len({tuple(case.token_ids) for case in running.cases}) >= 8, "mix-ups would not show"
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, running.cases))
    assert [a.error for a in answers] == [None] * 32
    assert [a.token_ids for a in answers] == [c.token_ids for c in running.cases]


def test_without_streaming_the_whole_answer_is_one_response_over_grpc(running):
    case = running.cases[1]
    asking = Asking(
        running.server, parameters={"stream": False}, prompt=case.question, images=case.png
    )
    answer = asking.all()
    assert answer.error is None
    assert answer.pieces == [case.text] and answer.token_ids == case.token_ids
    assert answer.reasons == ["stop"] and answer.timings


def test_plain_requests_at_once_get_each_their_own_whole_answer(running):
    """Of `/generate`, which takes no model of several responses, unless it sends only one."""

    def one(case: Case) -> list[int]:
        status, text = generate(
            running.server, prompt=case.question, images_base64=encoded(case.png)
        )
        assert status == 200, text
        answer = json.loads(text)
        assert (answer["text"], answer["finish_reason"]) == (case.text, "stop")
        ids = answer["token_ids"]
        return ids if isinstance(ids, list) else [ids]

    expected = [case.token_ids for case in running.cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):  # what threads do to each other shows only now and then
            assert list(pool.map(one, running.cases)) == expected


def test_server_sent_events_stream_the_answer_as_curl_sees_it(running):
    case = running.cases[2]
    connection = http.client.HTTPConnection(HOST, running.server.http_port, timeout=WAIT_S)
    body = {
        "prompt": case.question,
        "images_base64": encoded(case.png),
        "max_tokens": 16,
    }
    connection.request("POST", "/v2/models/trio_vlm/generate_stream", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [line for line in response.read().decode().split("\n\n") if line]
    connection.close()
    assert all(event.startswith("data: ") for event in events)
    answers = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(a["text"] for a in answers) == case.text
    assert [a["token_ids"] for a in answers] == case.token_ids
    assert answers[-1]["finish_reason"] == "stop"


def test_messages_with_several_images_are_answered_as_by_the_pipeline(running):
    first, second = make_picture(seed=1), make_picture(seed=2)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "how many circles are there?"},
            ],
        }
    ]
    pipeline = Pipeline.open(running.bundle)
    expected = pipeline.generate(Request(messages, [first, second]))
    answer = ask(running.server, messages=json.dumps(messages), images=[png(first), png(second)])
    assert answer.error is None
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 1.0},
        {"budget": 0.5},
        {"temperature": 1.5, "seed": 7, "top_p": 0.9},
        {"max_tokens": 1},
    ],
    ids=str,
)
def test_a_requests_own_options_do_what_they_do_in_the_pipeline(running, options):
    case = running.cases[3]
    pipeline = Pipeline.open(running.bundle)
    mine = {("max_new_tokens" if k == "max_tokens" else k): v for k, v in options.items()}
    expected = pipeline.generate_batch([Request(case.question, [case.png], **mine)])[0]
    answer = ask(running.server, prompt=case.question, images=case.png, **options)
    assert answer.error is None
    assert answer.token_ids == expected.token_ids
    assert answer.reasons == [expected.finish_reason]


# -------------------------------------------------------------------------- limits and bad requests

GOOD = png(make_picture())
INVALID = {
    "a picture that is none": ({"prompt": "hi", "images": b"not a picture"}, "image"),
    "a truncated picture": ({"prompt": "hi", "images": GOOD[: len(GOOD) // 2]}, "image"),
    "a path for a picture": ({"prompt": "hi", "images": b"/etc/passwd"}, "image"),
    "a picture of too many bytes": ({"prompt": "hi", "images": bytes(21 * 2**20)}, "image_bytes"),
    "too many pictures": ({"prompt": "hi", "images": [GOOD] * 9}, "max_images"),
    "broken base64": ({"prompt": "hi", "images_base64": "@@@"}, "base64"),
    "too long a prompt": ({"prompt": "what " * 20_000}, "prompt"),
    "nothing asked": ({"max_tokens": 3}, "prompt"),
    "a prompt and messages": ({"prompt": "hi", "messages": "[]"}, "messages"),
    "messages that are no JSON": ({"messages": "{"}, "messages"),
    "too many tokens": ({"prompt": "hi", "max_tokens": 100_000}, "max_tokens"),
    "no tokens": ({"prompt": "hi", "max_tokens": 0}, "max_tokens"),
    "a negative temperature": ({"prompt": "hi", "temperature": -1.0}, "temperature"),
    "a budget above one": ({"prompt": "hi", "images": GOOD, "budget": 1.5}, "budget"),
    "not a number": ({"prompt": "hi", "temperature": float("nan")}, "temperature"),
    "a deadline too far": ({"prompt": "hi", "timeout_s": 1e6}, "timeout"),
    "the wrong type": ({"prompt": "hi", "max_tokens": ("INT64", np.array([3]))}, "max_tokens"),
    "the wrong shape": (
        {"prompt": ("BYTES", np.array([[b"hi", b"ho"]], object))},
        "prompt",
    ),
    "an input that does not exist": ({"prompt": "hi", "bugdet": ("FP64", np.ones(1))}, "bugdet"),
    "a picture from a file": (
        {
            "messages": json.dumps(
                [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]
            )
        },
        "image",
    ),
    "a picture from the network": (
        {
            "messages": json.dumps(
                [{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1:1/"}]}]
            )
        },
        "image",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_bad_request_is_an_invalid_argument_that_names_what_is_wrong(running, name):
    inputs, said = INVALID[name]
    assert said in ask(running.server, **inputs).error.message()
    if any(isinstance(value, tuple) for value in inputs.values()):
        return  # an array that no JSON stands for
    body = {}
    for key, value in inputs.items():
        files = value if isinstance(value, list) else [value]
        body |= {"images_base64": [*map(encoded, files)]} if key == "images" else {key: value}
    status, text = generate(running.server, **body)
    assert status == 400 and said in text


def test_an_unknown_parameter_is_refused_by_name(running):
    error = ask(running.server, prompt="hi", parameters={"temprature": 1}).error
    assert "temprature" in error.message()
    status, text = generate(running.server, prompt="hi", temprature=1)
    assert status == 400 and "temprature" in text


def test_after_all_that_it_still_answers(running):
    case = running.cases[4]
    assert ask(running.server, prompt=case.question, images=case.png).token_ids == case.token_ids


def idle(server: TritonServer, model: str) -> bool:
    names = ("trio_num_requests_running", "trio_num_requests_waiting")
    return not any(metric(server, name, model=model) for name in names)


@contextlib.contextmanager
def full(server: TritonServer) -> Iterator[list[Asking]]:
    """Two answers on their way and two waiting, as many as this model takes."""

    def ended() -> float:
        outcomes = ("cancelled", "length")
        return sum(
            metric(server, "trio_requests_total", model="endless_vlm", outcome=each)
            for each in outcomes
        )

    held: list[Asking] = []
    before = ended()
    try:
        for _ in range(4):
            held.append(
                Asking(server, "endless_vlm", prompt="what color is the star?", max_tokens=LONG)
            )
            if len(held) <= 2:
                assert held[-1].next()
        assert until(lambda: metric(server, "trio_num_requests_waiting", model="endless_vlm") == 2)
        yield held
    finally:
        for asking in held:
            asking.close(cancel=True)
        # Counted, so that no later test counts them.
        assert until(lambda: ended() == before + len(held) and idle(server, "endless_vlm"))


def test_a_full_queue_refuses_clearly_and_loses_nothing(running):
    with full(running.server) as held:
        late = ask(running.server, "endless_vlm", prompt="what color is the star?")
        assert "queue" in late.error.message()
        status, text = generate(running.server, "endless_vlm", prompt="hi")
        assert status == 400 and "queue" in text
        for asking in held[:2]:
            asking.close(cancel=True)
        for asking in held[2:]:  # their turn has come
            assert asking.next() and asking.answer.token_ids


# ---------------------------------------------------------------------------- cancelling, deadlines


def test_a_cancelled_answer_stops_within_a_token_or_two(running):
    server = running.server
    assert until(lambda: idle(server, "endless_vlm"))
    cancelled = metric(server, "trio_requests_total", model="endless_vlm", outcome="cancelled")
    tokens = metric(server, "trio_generation_tokens_total", model="endless_vlm")
    asking = Asking(server, "endless_vlm", prompt="what color is the star?", max_tokens=LONG)
    for _ in range(3):
        assert asking.next()
    asking.close(cancel=True)
    assert until(
        lambda: (
            metric(server, "trio_requests_total", model="endless_vlm", outcome="cancelled")
            == cancelled + 1
        )
    )
    assert until(lambda: idle(server, "endless_vlm"))
    # The three that were read, and those on their way while the client let go: a busy machine may
    # keep that from the server for a while. Once it knows, test_model.py counts.
    made = metric(server, "trio_generation_tokens_total", model="endless_vlm") - tokens
    assert 3 <= made < LONG / 4


def test_a_deadline_ends_the_answer_with_what_there_is(running):
    # Time for the first token, however busy the machine is, and not for thousands.
    for timeout_s in (0.3 * 2**i for i in range(9)):
        answer = ask(
            running.server,
            "endless_vlm",
            prompt="what color is the star?",
            max_tokens=LONG,
            timeout_s=timeout_s,
        )
        if answer.error is None:
            break
        assert "before the first token" in answer.error.message()
    assert answer.error is None
    assert answer.reasons == ["deadline"]
    assert 0 < len(answer.token_ids) < LONG


def test_metrics_tell_what_was_done(running, tmp_path):
    """On a server of its own: there nothing that was asked before can be counted late."""
    case = running.cases[5]
    with TritonServer(running.repositories[0], tmp_path / "log") as server:
        answer = ask(server, prompt=case.question, images=case.png)
        assert answer.reasons == ["stop"]
        expected = {
            "trio_generation_tokens_total": len(answer.token_ids),
            "trio_requests_total": 1,
            "trio_time_to_first_token_seconds_count": 1,
            "trio_request_queue_time_seconds_count": 1,
            "trio_visual_tokens_total": 256,
            "trio_num_requests_waiting": 0,
            "trio_num_requests_running": 0,
        }
        found: dict[str, float] = {}

        def told() -> bool:
            found.update({name: metric(server, name, model="trio_vlm") for name in expected})
            return found == expected

        assert until(told), found
        assert metric(server, "trio_requests_total", model="trio_vlm", outcome="stop") == 1
        # What is brought up to date after the last of those.
        assert until(lambda: 0 < metric(server, "trio_kept_tokens_total", model="trio_vlm") < 256)
        assert metric(server, "trio_time_to_first_token_seconds_sum", model="trio_vlm") > 0


# --------------------------------------------------------------------------- starting and ending


def test_sigterm_lets_running_answers_finish_and_leaves_no_shared_memory(running, tmp_path):
    with TritonServer(running.repositories[1], tmp_path / "log") as server:
        family, shared = server.descendants(), server.shared_memory()
        assert shared and all(region.exists() for region in shared)
        asking = Asking(server, "endless_vlm", prompt="what color is the star?", max_tokens=150)
        assert asking.next()
        server.process.send_signal(signal.SIGTERM)
        answer = asking.all()
        assert answer.error is None
        assert len(answer.token_ids) == 150
        assert answer.reasons == ["length"]
        assert server.stop() == 0
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    assert not any(region.exists() for region in shared)


def test_sigterm_is_heeded_in_spite_of_a_stream_that_stays_open(running, tmp_path):
    """Triton waits for such a stream's client without end, unless connections have an age."""
    ages = ["--grpc-max-connection-age=2000", "--grpc-max-connection-age-grace=2000"]
    with TritonServer(running.repositories[0], tmp_path / "log", ages) as server:
        case = running.cases[6]
        asking = Asking(server, prompt=case.question, images=case.png)
        while asking.next():
            pass
        assert asking.answer.token_ids == case.token_ids
        assert server.stop() == 0  # which kills it, were it to wait
        asking.close(cancel=True)


def test_an_unloaded_models_metrics_say_that_nothing_runs(running, tmp_path):
    """The server keeps them, and a model that is loaded again goes on from there."""
    arguments = ["--model-control-mode=explicit", "--load-model=endless_vlm"]
    with TritonServer(running.repositories[1], tmp_path / "log", arguments) as server:

        def tokens(loads: int) -> None:
            told = {
                "trio_generation_tokens_total": 40.0 * loads,
                "trio_requests_total": 2.0 * loads,
            }
            told |= dict.fromkeys(
                ("trio_num_requests_running", "trio_num_requests_waiting", "trio_kv_bytes"), 0.0
            )
            assert until(lambda: {name: metric(server, name) for name in told} == told)

        for loads in (1, 2):
            asked = [Asking(server, "endless_vlm", prompt="hi", max_tokens=20) for _ in range(2)]
            assert all(asking.next() for asking in asked)
            assert post(server, "/v2/repository/models/endless_vlm/unload", {})[0] == 200
            for asking in asked:
                assert asking.all().reasons == ["length"]
            assert until(lambda: "UNAVAILABLE" in post(server, "/v2/repository/index", {})[1])
            tokens(loads)
            if loads == 1:
                assert post(server, "/v2/repository/models/endless_vlm/load", {})[0] == 200


def test_a_server_of_this_version_dies_of_classes_of_strings(running, tmp_path):
    """docs/triton.md warns of it; once a server answers instead, that can go."""
    with TritonServer(running.repositories[0], tmp_path / "log") as server:
        classes = [grpc_client.InferRequestedOutput("text", class_count=1)]
        asking = Asking(server, outputs=classes, prompt="hi")
        assert server.process.wait(WAIT_S) == -signal.SIGFPE
        asking.close(cancel=True)


def test_a_locked_server_answers_questions_and_lets_nobody_at_its_memory(running, tmp_path):
    apis = "shared-memory,model-repository,logging,trace:admin-key=secret"
    locks = [f"--http-restricted-api={apis}", f"--grpc-restricted-protocol={apis}"]
    with TritonServer(running.repositories[1], tmp_path / "log", locks) as server:
        region = f"/{server.shared_memory()[0].name}"
        body = {"key": region, "offset": 0, "byte_size": 1024}
        assert post(server, "/v2/systemsharedmemory/region/mine/register", body)[0] == 403
        assert post(server, "/v2/repository/index", {})[0] == 403
        with (
            grpc_client.InferenceServerClient(server.grpc) as client,
            pytest.raises(grpc_client.InferenceServerException, match="restricted"),
        ):
            client.register_system_shared_memory("mine", region, 1024)
        assert ask(server, "endless_vlm", prompt="hi", max_tokens=3).reasons == ["length"]


def test_a_killed_instance_is_reported_and_ends_the_server(running, tmp_path):
    """Though a request never ends, and the server would wait for it for long."""
    with TritonServer(
        running.repositories[1], tmp_path / "log", ["--exit-timeout-secs=600"]
    ) as server:
        shared = server.shared_memory()
        asking = Asking(server, "endless_vlm", prompt="what color is the star?", max_tokens=LONG)
        assert asking.next()
        (pid,) = [
            pid
            for pid in server.descendants()
            if b"endless_vlm_0_0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(pid, signal.SIGKILL)

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return server.get("/v2/health/ready")[0] == 200
            return False

        assert until(lambda: not ready())
        assert until(lambda: server.process.poll() is not None)
        assert "the process of endless_vlm was killed" in server.tail(200)
        asking.close(cancel=True)
    assert until(lambda: not any(region.exists() for region in shared))


def test_a_killed_server_takes_its_models_along(running, tmp_path):
    with TritonServer(running.repositories[0], tmp_path / "log") as server:
        family, shared = server.descendants(), server.shared_memory()
        server.process.kill()
        server.process.wait()
        assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
        assert until(lambda: not any(region.exists() for region in shared))


def test_a_broken_bundle_keeps_the_server_unready_and_is_named(running, tmp_path):
    write_repository(running.bundle, tmp_path / "models", Options())
    (weights,) = (tmp_path / "models/trio_vlm/1/bundle/weights").iterdir()
    os.truncate(weights, weights.stat().st_size // 2)
    with TritonServer(
        tmp_path / "models", tmp_path / "log", ["--exit-on-error=false"], wait_s=None
    ) as server:

        def failed() -> bool:
            with contextlib.suppress(OSError):
                index = json.loads(post(server, "/v2/repository/index", {})[1])
                states = {model["name"]: model.get("state") for model in index}
                return states.get("trio_vlm") == "UNAVAILABLE"
            return False

        assert until(failed, START_S)
        assert server.get("/v2/health/live")[0] == 200
        assert server.get("/v2/health/ready")[0] != 200
        assert server.get("/v2/models/trio_vlm/ready")[0] != 200
        index = post(server, "/v2/repository/index", {})[1]
        assert weights.name in index and "bytes where the manifest says" in index


def test_a_repository_of_the_first_version_says_which_model_is_gone_and_serves_the_other(tmp_path):
    models = tmp_path / "models"
    shutil.copytree(SCHEMA_1 / "triton_repository", models)
    picture = (SCHEMA_1.parents[2] / "examples" / "scene.png").read_bytes()
    asked = {"prompt": "what color is the circle?", "images_base64": encoded(picture)}
    with TritonServer(models, tmp_path / "log", ["--exit-on-error=false"], wait_s=None) as server:

        def states() -> dict[str, str]:
            with contextlib.suppress(OSError):
                index = json.loads(post(server, "/v2/repository/index", {})[1])
                return {model["name"]: model.get("state", "") for model in index}
            return {}

        settled = {"trio_vlm": "READY", "trio_vlm_complete": "UNAVAILABLE"}
        assert until(lambda: states() == settled, START_S)
        assert "removed in trio-deploy 0.2: delete its folder" in server.log.read_text()
        status, text = generate(server, **asked)
        assert status == 200 and json.loads(text)["text"]
    shutil.rmtree(models / "trio_vlm_complete")
    with TritonServer(models, tmp_path / "log") as server:
        assert generate(server, **asked)[0] == 200
