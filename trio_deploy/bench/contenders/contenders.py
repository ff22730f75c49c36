"""Opens the contender of a case; several cases share one pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.contenders.genai import GenAI
from trio_deploy.bench.contenders.llama_cpp import LlamaCpp
from trio_deploy.bench.contenders.trio import open_pipeline, open_trio
from trio_deploy.bench.workload import Workload
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.pipeline.pipeline import Pipeline


@dataclass
class Contenders:
    """Contenders that are open, and what has to be closed at the end.

    Most cases differ only in their budget, so their graphs are loaded once.
    """

    _pipelines: dict[tuple[str, RuntimeOptions], Pipeline] = field(default_factory=dict)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Contenders:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def pipeline(self, case: Case) -> Pipeline:
        """The pipeline of a case, opened once per bundle and options."""
        key = (case.bundle, case.options)
        if key not in self._pipelines:
            self._pipelines[key] = open_pipeline(case)
        return self._pipelines[key]

    def open(self, case: Case, work: Workload) -> Callable[[int], Run]:
        """A function that answers the workload once, with the pictures of a seed.

        Raises:
            TrioError: the bundle does not open, or the baseline is not installed.
        """
        if case.kind == "genai":
            return self._closing.enter_context(GenAI(case, work))
        if case.kind == "llama.cpp":
            return self._closing.enter_context(LlamaCpp(case, work))
        # These two import torch when they are opened.
        if case.kind == "transformers":
            from trio_deploy.bench.contenders.hf import open_transformers

            return open_transformers(case, work)
        if case.kind == "oracle":
            from trio_deploy.bench.contenders.oracle import open_oracle

            return open_oracle(case, work)
        return open_trio(self.pipeline(case), case, work)
