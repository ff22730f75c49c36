"""`trio_vlm`, for Triton's python backend: answers streamed token by token.

Imported by the model.py of a repository that `trio triton` writes, inside Triton's own process for
the model; `triton_python_backend_utils` exists there alone.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.serve.service import Service, switch_threads_often
from trio_deploy.serve.triton_server.answer import Answer
from trio_deploy.serve.triton_server.backend import (
    TritonSender,
    configured_outputs,
    input_arrays,
)
from trio_deploy.serve.triton_server.metrics import Exporter
from trio_deploy.serve.triton_server.request import read
from trio_deploy.serve.triton_server.settings import Settings
from trio_deploy.serve.triton_server.watch import Watch

_LOG = logging.getLogger(__name__)
_POLL_S = 0.05  # between checks whether waiting requests were cancelled, and updates of metrics
_DRAIN_S = 30.0


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Raises:
            TritonModelException: the bundle is broken or a parameter is wrong, so that the model
                does not become ready.
        """
        switch_threads_often()
        try:
            settings = Settings.parse(_parameters(args))
            pipeline = _open(settings, Path(args["model_repository"]))
            self._service = Service(pipeline, settings.limits, warm_up=settings.warm_up)
        except (TrioError, OSError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from error
        self._outputs = configured_outputs(args)
        self._exporter = _exporter(args)
        self._answers: set[Answer] = set()
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="trio-poll", daemon=True)
        self._poller.start()
        self._watch = Watch(args["model_name"]) if settings.watch else None

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses are sent by other threads."""
        for request in requests:
            sender = TritonSender(request, self._outputs)
            try:
                self._take(sender, request)
            except Exception as error:  # nothing that a client sends may end the instance
                _LOG.exception("a request failed")
                sender.fail(f"internal error: {error!r:.200}", "INTERNAL")

    def finalize(self) -> None:
        """Answer the requests taken, then stop."""
        if self._watch is not None:
            self._watch.close()
        self._service.close(timeout=_DRAIN_S)
        self._stop.set()
        self._poller.join()
        try:
            self._export()  # the server keeps the metrics of unloaded models
        except Exception:
            _LOG.exception("the last metrics were lost")

    def _take(self, sender: TritonSender, request: Any) -> None:
        answer = Answer(sender, self._answers.discard)
        try:
            client, delivery = read(input_arrays(request), request.parameters(), request.timeout())
        except Exception as error:
            self._service.count_rejected(error)
            answer.fail(error)
            return
        self._answers.add(answer)
        answer.submit(self._service, client, delivery)

    def _poll(self) -> None:
        """Cancel requests that have no tokens yet and whose clients are gone; export metrics."""
        while not self._stop.wait(_POLL_S):
            try:
                for answer in list(self._answers):
                    if not answer.begun:
                        answer.check_cancelled()
                self._export()
            except Exception:
                _LOG.exception("polling requests failed, and goes on")

    def _export(self) -> None:
        if self._exporter is not None:
            self._exporter.update(self._service.metrics())


def _parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The model's parameters; names in capitals are Triton's own."""
    given = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in given.items() if name != name.upper()}


def _open(settings: Settings, folder: Path) -> Pipeline:
    options = settings.options
    # A target is a name, or a file that `trio triton` puts into the model's folder.
    if str(options.target).endswith(".yaml"):
        options = replace(options, target=str(folder / str(options.target)))
    return Pipeline.open(Bundle.load(folder / settings.bundle), options)


def _exporter(args: Mapping[str, str]) -> Exporter | None:
    labels = {"model": args["model_name"], "version": args["model_version"]}
    try:
        return Exporter(pb_utils, labels)
    except Exception as error:  # the server may be started without metrics
        _LOG.warning("no metrics are exported: %s", error)
        return None
