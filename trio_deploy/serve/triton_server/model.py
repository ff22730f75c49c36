"""`trio_vlm`, for Triton's python backend: answers streamed token by token.

Imported by the model.py of a repository that `trio triton` writes, inside Triton's own process for
the model; `triton_python_backend_utils` exists there alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.batcher import Batcher
from trio_deploy.pipeline.batcher.events import (
    Cancelled,
    DeadlinePassed,
    Event,
    Failed,
    Handle,
    Refused,
)
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Generation
from trio_deploy.serve.admission import HeldBytes
from trio_deploy.serve.limits import Settings
from trio_deploy.serve.triton_server.backend import TritonSender, input_arrays
from trio_deploy.serve.triton_server.local_socket import Ask, LocalServer
from trio_deploy.serve.triton_server.metrics import Exporter
from trio_deploy.serve.triton_server.request import Question, read
from trio_deploy.serve.triton_server.sender import Sender
from trio_deploy.serve.triton_server.watch import Watch

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.05  # between looks at whether waiting requests were cancelled, and at the metrics
_DRAIN_S = 30.0


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Raises:
            TritonModelException: it is broken, or a parameter is wrong; the model does not get
                ready then.
        """
        # Threads hand the interpreter over often: the model's must not wait for long.
        sys.setswitchinterval(0.0005)
        try:
            self._settings = Settings.parse(_parameters(args))
            pipeline = _open(self._settings, Path(args["model_repository"]))
            if self._settings.warm_up:
                _warm_up(pipeline, self._settings)
            self._batcher = _batcher(pipeline, self._settings)
        except (TrioError, OSError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from error
        self._exporter = _exporter(args)
        self._answers: set[_Answer] = set()
        self._held = _held(pipeline, self._settings)
        self._unasked: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="trio-keep", daemon=True)
        self._keeper.start()
        try:
            self._local = LocalServer(args["model_name"], self._take)
        except (OSError, RuntimeError) as error:
            text = f"{args['model_name']} cannot listen for plain requests: {error}"
            raise pb_utils.TritonModelException(text) from error
        self._watch = Watch(args["model_name"]) if self._settings.watch else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses are sent as they come to be."""
        for request in requests:
            sender = TritonSender(request)
            try:
                arrays = input_arrays(request)
                self._take(sender, Ask(arrays, request.parameters(), request.timeout()))
            except Exception as error:  # nothing that a client sends may end the instance
                _LOG.exception("a request failed")
                sender.fail(f"internal error: {error!r:.200}", "INTERNAL")

    def finalize(self) -> None:
        """Answer what was asked, then stop."""
        if self._watch is not None:
            self._watch.close()
        self._local.close()
        self._batcher.close(timeout=_DRAIN_S)
        self._stop.set()
        self._keeper.join()
        try:
            self._export()  # the server keeps the metrics of models that it has unloaded
        except Exception:
            _LOG.exception("the last metrics were lost")

    def _take(self, sender: Sender, ask: Ask) -> None:
        answer = _Answer(sender, self._forget)
        try:
            answer.held = self._held.take(ask.tensors)
            question = read(ask.tensors, ask.parameters, ask.timeout_us, self._settings)
        except Exception as error:
            with self._counting:
                self._unasked["refused" if isinstance(error, Refused) else "invalid"] += 1
            answer.fail(error)
            return
        self._answers.add(answer)
        try:
            answer.ask(self._batcher, question)
        except BaseException:
            self._forget(answer)
            raise

    def _forget(self, answer: _Answer) -> None:
        self._answers.discard(answer)
        size, answer.held = answer.held, 0
        self._held.give_back(size)

    def _keep(self) -> None:
        """Heed the cancelling of requests that get no tokens yet, and keep the metrics."""
        while not self._stop.wait(_LOOK_S):
            try:
                for answer in list(self._answers):
                    if not answer.begun:
                        answer.look()
                self._export()
            except Exception:
                _LOG.exception("looking after requests failed, and goes on")

    def _export(self) -> None:
        if self._exporter is not None:
            metrics = self._batcher.metrics()
            with self._counting:
                unasked = dict(self._unasked)
            for outcome, count in unasked.items():
                metrics.outcomes[outcome] = metrics.outcomes.get(outcome, 0) + count
            self._exporter.update(metrics)


class _Answer:
    """One request's responses.

    Attributes:
        begun: whether there was a token.
        held: bytes that count as long as it is not done.
    """

    def __init__(self, sender: Sender, done: Callable[[_Answer], None]) -> None:
        self._sender = sender
        self._done = done
        self._handle: Handle | None = None
        self._asking = threading.Lock()
        self._stream = True
        self.begun = False
        self.held = 0

    def ask(self, batcher: Batcher, question: Question) -> None:
        """Submit the question; if it is refused, that is the answer."""
        self._stream = question.stream
        try:
            with self._asking:
                self._handle = batcher.submit(
                    question.request, self._on_event, timeout_s=question.timeout_s
                )
        except Refused as error:
            self.fail(error)

    def look(self) -> None:
        """End the answer if the client has cancelled it."""
        with self._asking:  # the first tokens may be there before the handle is
            handle = self._handle
        if handle is not None and not handle.done and self._sender.is_cancelled():
            handle.cancel()

    def fail(self, error: Exception) -> None:
        """Send an error, and that it is the last response."""
        code = _CODES.get(type(error), "INTERNAL")
        if code == "INTERNAL":
            _LOG.error("a request failed", exc_info=error)
        text = str(error) if isinstance(error, TrioError) else f"internal error: {error!r:.200}"
        self._done(self)
        self._sender.fail(text, code)

    def _on_event(self, event: Event) -> None:
        self.begun = True
        if event.last:
            self._done(self)
        if event.error is not None:
            self.fail(event.error)
            return
        if event.generation is None:
            self.look()
            if not self._stream:
                return
        ids = [] if event.token_id is None else [event.token_id]
        text = event.text
        if event.generation is not None and not self._stream:
            ids, text = event.generation.token_ids, event.generation.text
        outputs = {"text": _string(text), "token_ids": np.array(ids, np.int64)}
        if event.generation is not None:
            outputs |= _end(event.generation)
        self._sender.send(outputs, last=event.last)


def _parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The model's parameters; names in capitals are Triton's own."""
    given = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in given.items() if name != name.upper()}


def _open(settings: Settings, folder: Path) -> Pipeline:
    return Pipeline.open(
        folder / settings.bundle,
        runtime=settings.runtime,
        target=_target(settings, folder),
        threads=settings.threads,
        low_memory=settings.low_memory,
        provider=settings.provider,
        precision=settings.precision,
    )


def _target(settings: Settings, folder: Path) -> str | None:
    """A target's name, or its file, which `trio triton` puts into the model's folder."""
    if settings.target is not None and settings.target.endswith(".yaml"):
        return str(folder / settings.target)
    return settings.target


def _batcher(pipeline: Pipeline, settings: Settings) -> Batcher:
    return Batcher(
        pipeline,
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        prefill_rows=settings.prefill_rows,
        prefill_tokens=settings.prefill_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_kv_bytes=settings.max_kv_bytes,
        prefillers=settings.prefillers,
        preparers=settings.preparers,
    )


def _held(pipeline: Pipeline, settings: Settings) -> HeldBytes:
    return HeldBytes(settings.max_queue_bytes, pipeline.bundle.config, settings.max_images)


def _warm_up(pipeline: Pipeline, settings: Settings) -> None:
    """Begin two answers, as long as those that ask for no length, with a picture and without.

    Every stage runs then, and limits that no request can keep show. The batcher is one of its own,
    so that this is not counted; there is no deadline, since the first run takes longer than others.

    Raises:
        TrioError: there was no answer.
    """
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), (127, 127, 127)).save(blank, "PNG")
    prompt = {"prompt": _string("what is this?")}
    picture = {"images": np.array([blank.getvalue()], np.object_)}
    with _batcher(pipeline, settings) as batcher:
        for tensors, what in ((prompt | picture, "about a picture"), (prompt, "without a picture")):
            try:
                _held(pipeline, settings).take(tensors)
                _begin(batcher, read(tensors, "", 0, settings))
            except TrioError as error:
                raise TrioError(f"the warm-up question {what} failed: {error}") from error


def _begin(batcher: Batcher, question: Question) -> None:
    """Get two tokens of an answer, which takes a step of decoding."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    handle = batcher.submit(question.request, events.put)
    if events.get().last or events.get().last:
        handle.result()
        return
    handle.cancel()
    with contextlib.suppress(Cancelled):
        handle.result()


def _exporter(args: Mapping[str, str]) -> Exporter | None:
    labels = {"model": args["model_name"], "version": args["model_version"]}
    try:
        return Exporter(pb_utils, labels)
    except Exception as error:  # a server may be told to export none
        _LOG.warning("no metrics are exported: %s", error)
        return None


_CODES: dict[type[Exception], str] = {
    TrioError: "INVALID_ARG",
    Refused: "UNAVAILABLE",
    DeadlinePassed: "UNAVAILABLE",
    Cancelled: "CANCELLED",
    Failed: "INTERNAL",
}


def _end(generation: Generation) -> dict[str, np.ndarray]:
    """Why the answer ended, and what it took: JSON with seconds, counts and bytes."""
    timings = {
        "first_token_s": generation.first_token_s,
        "tokens_per_s": generation.tokens_per_s,
        "stages": generation.timings,
        "prompt_tokens": generation.prompt_tokens,
        "visual_tokens": generation.visual_tokens,
        "kept_tokens": generation.keep_counts,
        "kv_bytes": generation.kv_bytes,
    }
    return {
        "finish_reason": _string(generation.finish_reason),
        "timings": _string(json.dumps(timings)),
    }


def _string(text: str) -> np.ndarray:
    # The whole of a character's bytes or its replacement: a tokenizer may produce half of one.
    return np.array([text.encode(errors="replace")], np.object_)
