"""OpenVINO GenAI's own pipeline as a baseline, in the Python environment that has it.

optimum-intel converts the checkpoint there once. `genai_child.py` then answers in a process of that
environment, one line per request, and waits between requests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.contenders.child import Child, start_error
from trio_deploy.bench.workload import Workload
from trio_deploy.checkpoint.folder import image_settings
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.ran_as import RanAs

_CHILD = Path(__file__).parent.with_name("genai_child.py")
_NEEDED = "import openvino_genai, optimum.intel, openvino_tokenizers"
_MODEL = "openvino_language_model.xml"
_CONVERSION = (
    "optimum.commands.optimum_cli export openvino --task image-text-to-text --weight-format fp16"
).split()
_SPLIT = "CDPRUNER_SPLIT_THRESHOLD"  # visual tokens beyond which its pruner halves them; 0: never
_TEXT_ROOM = 8192  # tokens of text beside the visual ones that a prompt may have
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def missing(python: str) -> str | None:
    """Why this interpreter cannot run GenAI; None if it can."""
    reason = start_error(python, _NEEDED)
    return reason and (
        f"{reason}: pip install openvino-genai optimum-intel into an environment of its own and "
        "pass its interpreter as --genai-python"
    )


def convert(checkpoint: Path, python: str) -> Path:
    """Convert a checkpoint with optimum-intel, once, into a folder next to it.

    Raises:
        TrioError: optimum-intel refuses it.
    """
    converted = checkpoint.with_name(f"{checkpoint.name}-genai")
    if not (converted / _MODEL).is_file():
        unfinished = checkpoint.with_name(f".{converted.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _convert(checkpoint, unfinished, python)
            shutil.rmtree(converted, ignore_errors=True)
            unfinished.rename(converted)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return converted


def _convert(checkpoint: Path, out: Path, python: str) -> None:
    done = subprocess.run(
        [python, "-m", *_CONVERSION, "--model", str(checkpoint), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # all it needs is in the folder
    )
    if done.returncode or not (out / _MODEL).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrioError(f"optimum-intel did not convert the checkpoint ({last})")
    # GenAI reads this file alone, which newer transformers fold into processor_config.json.
    settings = json.dumps(image_settings(checkpoint), indent=1)
    (out / "preprocessor_config.json").write_text(settings, encoding="utf-8")


class GenAI(Child):
    """A process that answers with openvino_genai.VLMPipeline; a contender inside `with`."""

    def __init__(self, case: Case, work: Workload) -> None:
        """Convert the checkpoint if need be, and start the process.

        Raises:
            TrioError: GenAI is not installed, or the checkpoint does not convert.
        """
        python = case.python or ""
        if reason := missing(python):
            raise TrioError(f"the baseline genai: {reason}")
        if case.checkpoint is None:
            raise TrioError(
                "the baseline genai converts a checkpoint: pass its folder as --checkpoint"
            )
        self._work, self._halves = work, case.halves
        self._precision = case.options.precision or "float32"
        arguments = {
            "folder": str(convert(Path(case.checkpoint), python)),
            "threads": case.options.threads,
            "precision": _PRECISIONS[self._precision],
            "prompt": work.prompt,
            "new_tokens": work.new_tokens,
            "pruning_ratio": case.pruning_ratio,
            "most_tokens": work.visual_tokens + _TEXT_ROOM,
        }
        environment = {name: value for name, value in os.environ.items() if name != _SPLIT}
        super().__init__(
            "OpenVINO GenAI failed on this checkpoint",
            python,
            _CHILD,
            arguments,
            environment if case.halves else {**environment, _SPLIT: "0"},
        )

    def __call__(self, seed: int) -> Run:
        """Answer once.

        Raises:
            TrioError: the process ended.
        """
        file = self.folder / "pictures.npy"
        np.save(file, np.stack([np.asarray(image) for image in self._work.pictures(seed)]))
        reply = self.ask(str(file))
        return Run(
            stages=_stages(reply),
            first_token_s=reply["first_token_s"],
            tokens_per_s=reply["tokens_per_s"],
            prompt_tokens=reply["input_tokens"],
            visual_tokens=self._work.visual_tokens,
            keep=_kept(reply["pruning"], self._work.visual_tokens),
            remark=pruning_text(reply["pruning"], self._work.visual_tokens, self._halves),
            precision=self._precision,
            # GenAI does not say what it computes in: its properties are those that were passed.
            ran_as=RanAs("openvino genai", None, None, "float16", self._precision, "CPU"),
            peak_mib=reply["peak_mib"],
        )


def _stages(reply: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per stage; empty where this version of GenAI does not report them.

    Preparing the language model's inputs is one figure: preprocessing, the tower, its pruner and
    the embedding of text. (What it calls vision encoding leaves out the tower of Qwen's models.)
    """
    prepare = reply["prepare_s"]
    if prepare is None:
        return {}
    return {"vision": prepare, "prefill": max(0.0, reply["first_token_s"] - prepare)}


def _dropped(tried: Mapping[str, Any] | None) -> int:
    """Input tokens that GenAI's pruner dropped."""
    return 0 if tried is None or not tried["known"] else tried["before"] - tried["after"]


def _kept(tried: Mapping[str, Any] | None, visual: int) -> tuple[int, ...]:
    """Visual tokens that GenAI's pruner left; empty where it dropped none."""
    dropped = _dropped(tried)
    return (visual - dropped,) if dropped else ()


def pruning_text(tried: Mapping[str, Any] | None, visual: int, halves: bool) -> str:
    """What GenAI's own pruner did, for a table; "" if it was not tried.

    Args:
        tried: `known`, whether this GenAI has a pruner; `ratio`, its per cent; `relevance_weight`;
            `before` and `after`, the input tokens without and with it; `same`, whether both gave
            one answer.
        visual: visual tokens of the request.
        halves: whether it chose in each half of them.
    """
    if tried is None:
        return ""
    if not tried["known"]:
        return "this version has no pruning_ratio, so nothing was pruned"
    told = f"pruning_ratio {tried['ratio']} %"
    if dropped := _dropped(tried):
        how = "in each half" if halves else f"among all of them ({_SPLIT}=0)"
        return (
            f"{told}, relevance_weight {tried['relevance_weight']}: kept {visual - dropped} of "
            f"{visual} visual tokens, chosen {how}"
        )
    if tried["same"]:
        return f"{told} was ignored: as many input tokens and the same answer without it"
    return f"{told} changed the answer, and not the number of input tokens that is reported"
