"""llama.cpp as a baseline for the language model: a prompt of as many tokens, all of them text.

`llama_child.py` writes random weights of the same sizes as GGUF and answers, in a Python
environment that has xllamacpp and gguf, or through a llama-server of another build.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.contenders.child import Child, start_error
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.pipeline.ran_as import RanAs

WEIGHTS = ("Q4_0", "Q8_0")
"""Types of weights that are measured: blocks of 32 in 4 and 8 bit, with a scale in float16."""

_CHILD = Path(__file__).parent.with_name("llama_child.py")
_NEEDED = "import xllamacpp, gguf"
_ROOM = 64  # tokens of context beyond the prompt and the answer


def missing(python: str) -> str | None:
    """Why this interpreter cannot run llama.cpp; None if it can."""
    reason = start_error(python, _NEEDED)
    return reason and (
        f"{reason}: pip install xllamacpp gguf into an environment of its own and pass its "
        "interpreter as --llama-python"
    )


def unlike(config: ModelConfig) -> str | None:
    """Why a language model is none of Llama's form; None if it is."""
    text = config.text
    if text.qkv_bias or text.o_bias or text.mlp_bias or text.qk_norm or text.rope.axes:
        return "its weights are written for language models of Llama's form alone"
    return None


class LlamaCpp:
    """Processes that answer with llama.cpp; a contender inside `with`.

    Flash attention is on or off, whichever took less time to the first token in a run of each.
    """

    def __init__(self, case: Case, work: Workload) -> None:
        """Write the weights if need be, and answer once each way.

        Raises:
            TrioError: llama.cpp is not installed, or does not run.
        """
        python = case.python or ""
        if reason := missing(python):
            raise TrioError(f"the baseline llama.cpp: {reason}")
        self._case = case
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._child, self._flash, self._tried = self._better(work, stack)
            self._closing = stack.pop_all()

    def _better(
        self, work: Workload, stack: contextlib.ExitStack
    ) -> tuple[Child, bool, dict[bool, float]]:
        """The faster child, whether it has flash attention, and the seconds with and without."""
        case = self._case
        bundle = Bundle.load(case.bundle)
        prompt, _ = Inputs(bundle).encode(work.messages(), work.pictures(0))
        file = f"{bundle.manifest.model.name}-{case.weights}.gguf"
        folder = (
            Path(case.checkpoint).parent  # where `trio bench --size` keeps what it makes
            if case.checkpoint
            else stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-bench-"))
        )
        sizes = asdict(bundle.config.text)
        arguments = {
            "file": str(Path(folder) / file),
            "weights": case.weights,
            "sizes": {**sizes, "rope_theta": sizes.pop("rope")["theta"]},
            "threads": case.options.threads or os.cpu_count(),
            "prompt_tokens": prompt.length,
            "new_tokens": work.new_tokens,
            "context": prompt.length + work.new_tokens + _ROOM,
            "server": case.server,
        }
        tried: dict[bool, float] = {}
        found: dict[bool, contextlib.ExitStack] = {}
        children: dict[bool, Child] = {}
        for flash in (True, False):
            found[flash] = stack.enter_context(contextlib.ExitStack())
            children[flash] = found[flash].enter_context(
                Child("llama.cpp failed", case.python or "", _CHILD, {**arguments, "flash": flash})
            )
            tried[flash] = children[flash].ask("0")["prompt_s"]
        best = min(tried, key=tried.__getitem__)
        found[not best].close()
        return children[best], best, tried

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def __call__(self, seed: int) -> Run:
        """Answer once.

        Raises:
            TrioError: the process ended.
        """
        reply = self._child.ask(str(seed))
        case = self._case
        with_, without = (f"{self._tried[flash]:.2f}" for flash in (True, False))
        return Run(
            stages={"prefill": reply["prompt_s"]},
            first_token_s=reply["prompt_s"],
            tokens_per_s=reply["tokens_per_s"],
            prompt_tokens=reply["prompt_tokens"],
            remark=(
                f"the language model alone, text in place of pictures, head in Q8_0, "
                f"{reply['version']}; flash attention {'on' if self._flash else 'off'} "
                f"({with_} s with, {without} s without in the first runs)"
            ),
            precision=case.weights or "",
            ran_as=RanAs("llama.cpp", None, None, "float32", "float32", "CPU", case.weights),
            peak_mib=reply["peak_mib"],
        )
