"""A bundle as a model of lmms-eval, for all of its benchmarks.

    pip install lmms-eval trio-deploy
    lmms-eval --model trio --model_args bundle=out/b,budget=0.111 --tasks pope --batch_size 8

lmms-eval (0.7 and later) finds it by the entry point `lmms_eval.models`. Written against
lmms_eval/api/model.py and lmms_eval/models/registry_v2.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request
from trio_deploy.schedule.budget import read_budget

if TYPE_CHECKING:
    Lmms: Any = object
else:
    from lmms_eval.api.model import lmms as Lmms

N = TypeVar("N", int, float)

_MAX_NEW_TOKENS = 1024  # as lmms-eval's own LLaVA if a task sets none


class Trio(Lmms):
    """Answer lmms-eval's requests with a pruned bundle, greedily unless a task asks otherwise."""

    is_simple = True

    def __init__(
        self,
        bundle: str | os.PathLike[str] = "",
        budget: float | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        """Take `--model_args` of lmms-eval.

        Args:
            bundle: folder of the bundle.
            budget: average share of visual tokens per layer; None: the bundle's schedule.
            batch_size: requests per batch.
            options: fields of `RuntimeOptions`.

        Raises:
            TrioError: no bundle, an option that is not known, or what loading raises.
        """
        super().__init__()
        # lmms-eval passes these to every model; here the bundle and its target decide.
        for name in ("device", "max_batch_size", "pretrained"):
            options.pop(name, None)
        known = [field.name for field in fields(RuntimeOptions)]
        if unknown := set(options) - set(known):
            raise TrioError(
                f"unknown model argument {min(unknown)!r}: known are bundle, budget, "
                f"{', '.join(known)}"
            )
        if not bundle:
            raise TrioError("no bundle is named: pass --model_args bundle=FOLDER")
        if options.get("threads") is not None:
            options["threads"] = _number("threads", options["threads"], int)
        self.pipeline = Pipeline.open(bundle, RuntimeOptions(**options))
        self.budget = None if budget is None else read_budget(str(budget))
        self.batch_size = _number("batch_size", batch_size, int)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generated texts; arguments per instance: (context, settings, visual, id, task, split)."""
        answers: list[str] = []
        for group in _groups(requests, self.batch_size):
            answers += [given.text for given in self.pipeline.generate_batch(
                [self._request(*instance.args) for instance in group]
            )]  # fmt: skip
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood per token, whether greedy decoding gives all) per request.

        A loss, the smallest is the best: lmms-eval takes the argmin over a question's
        choices (lmms_eval/api/task.py, `process_results`), since its own models return the mean
        cross-entropy loss of the continuation's tokens.

        An instance's arguments are (context, continuation, doc_to_visual, id, task, split); the
        continuation may be a function of the document.
        """
        found: list[tuple[float, bool]] = []
        for group in _groups(requests, self.batch_size):
            forced = []
            for instance in group:
                context, wanted, *where = instance.args
                if not where:  # the continuation's own likelihood, for acc_mutual_info
                    raise TrioError("a likelihood without a question is not defined here")
                visual, place, task, split = where
                if callable(wanted):
                    wanted = wanted(self.task_dict[task][split][place])
                tokens = self.pipeline.tokenize(str(wanted))
                if not tokens:
                    raise TrioError(f"an empty continuation has no likelihood ({task}, {place})")
                forced.append(
                    Request(
                        context,
                        self._pictures(visual, place, task, split),
                        budget=self.budget,
                        forced=tokens,
                    )
                )
            found += [
                (-sum(given.logprobs) / len(given.logprobs), all(given.greedy))
                for given in self.pipeline.generate_batch(forced)
            ]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: which tokens of a picture are kept depends on the question."""
        raise TrioError("benchmarks of several rounds are not supported: run those of one round")

    def _request(
        self, context: str, settings: dict[str, Any], visual: Any, place: int, task: str, split: str
    ) -> Request:
        until = settings.get("until") or []
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0):
            temperature = 0.0
        if int(settings.get("num_beams") or 1) > 1:
            raise TrioError(f"the task {task} wants beam search, which a bundle does not do")
        return Request(
            context,
            self._pictures(visual, place, task, split),
            max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
            temperature=temperature,
            top_p=float(settings.get("top_p") or 1.0),
            stop=[until] if isinstance(until, str) else [text for text in until if text.strip()],
            budget=self.budget,
            bundle_sampling=False,
        )

    def _pictures(self, visual: Any, place: int, task: str, split: str) -> list[Any]:
        return list(visual(self.task_dict[task][split][place]) or [])


def _number(name: str, value: Any, kind: type[N]) -> N:
    """Read a number; lmms-eval passes what it cannot read as text."""
    try:
        return kind(value)
    except ValueError:
        raise TrioError(f"{name} must be a number here, not {value!r}") from None


def _groups(requests: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def manifest() -> Any:
    """The entry point of lmms-eval: this model's name and class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="trio", simple_class_path=f"{__name__}.{Trio.__name__}")
