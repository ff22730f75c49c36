"""What can be measured: a bundle at a budget, and the baselines beside it, all in one form."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trio_deploy.bench.inputs import Inputs
from trio_deploy.bench.workload import Workload, prompt_of_length
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Generation

BASELINES = ("transformers", "oracle", "genai")

#: Stages in the groups that tables and charts show, in the order they run.
GROUPS = {
    "preprocess": ("preprocess",),
    "vision": ("vision",),
    "embed": ("embed",),
    "layers": ("prefill_", "prefill"),
    "selection": ("select_",),
}
OTHER = "other"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: its key in results, unique.
        kind: `trio`, or one of `BASELINES`.
        bundle: folder of the bundle.
        budget: share of visual tokens; None is the bundle's schedule, 1 prunes nothing.
        runtime, target, provider, precision, threads: as `Pipeline.open` takes them.
        checkpoint, python: for OpenVINO GenAI: the checkpoint's folder and the interpreter that
            has it.
    """

    name: str
    kind: str
    bundle: str
    budget: float | None = None
    runtime: str | None = None
    target: str | None = None
    provider: str | None = None
    precision: str | None = None
    threads: int | None = None
    checkpoint: str | None = None
    python: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Case:
        return cls(**raw)


@dataclass(frozen=True)
class Run:
    """One answer's costs.

    Attributes:
        stages: seconds a stage up to the first token, in order.
        first_token_s: from the call to the first token; at least the sum of the stages.
        tokens_per_s: of the tokens after the first, 0 where there is none.
        prompt_tokens, visual_tokens: before pruning; 0 where the baseline does not say.
        keep: visual tokens kept at each pruning point.
        layer_ranges: (first, stop, tokens) of each range of layers.
        kv_bytes: keys and values at the end of the prefill.
        precision: what the layers were computed in.
        peak_mib: of a process of its own, where the case is one.
    """

    stages: dict[str, float]
    first_token_s: float
    tokens_per_s: float
    prompt_tokens: int = 0
    visual_tokens: int = 0
    keep: tuple[int, ...] = ()
    layer_ranges: tuple[tuple[int, int, int], ...] = ()
    kv_bytes: int | None = None
    precision: str = ""
    peak_mib: float | None = None

    @property
    def groups(self) -> dict[str, float]:
        """Seconds a group of `GROUPS`, then `OTHER`: what no stage accounts for."""
        result = dict.fromkeys(GROUPS, 0.0)
        for stage, seconds in self.stages.items():
            group = next(g for g, prefixes in GROUPS.items() if stage.startswith(prefixes))
            result[group] += seconds
        result[OTHER] = max(0.0, self.first_token_s - sum(self.stages.values()))
        return result

    @property
    def prefill_s(self) -> float:
        """Embedding, layers and selections: the language model up to the first logits."""
        groups = self.groups
        return groups["embed"] + groups["layers"] + groups["selection"]


@dataclass
class Opened:
    """Pipelines that several cases share, and what has to be closed at the end.

    Only budgets differ between most cases, so their graphs are loaded once.
    """

    _pipelines: dict[tuple[Any, ...], Pipeline] = field(default_factory=dict)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def pipeline(self, case: Case) -> Pipeline:
        """The bundle of a case, without its end tokens: every run generates as many tokens."""
        key = (case.bundle, case.runtime, case.target, case.provider, case.precision, case.threads)
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline.open(
                without_ends(Bundle.load(case.bundle)),
                runtime=case.runtime,
                target=case.target,
                threads=case.threads,
                provider=case.provider,
                precision=case.precision,
            )
        return self._pipelines[key]

    def open(self, case: Case, work: Workload) -> Callable[[int], Run]:
        """A function that answers once about the workload with a seed's pictures.

        Raises:
            TrioError: the bundle does not open, or the baseline is not installed.
        """
        if case.kind == "genai":
            from trio_deploy.bench.genai import GenAI

            return self._closing.enter_context(GenAI(case, work))
        if case.kind in BASELINES:
            from trio_deploy.bench import baselines

            return baselines.open_baseline(case, Bundle.load(case.bundle), work)
        pipeline = self.pipeline(case)

        def answer(seed: int) -> Run:
            generation = pipeline.generate(
                work.pictures(seed),
                work.messages(),
                max_new_tokens=work.new_tokens,
                budget=case.budget,
            )
            return _run(generation, pipeline)

        return answer


def _run(generation: Generation, pipeline: Pipeline) -> Run:
    stages = {stage: s for stage, s in generation.timings.items() if stage != "decode"}
    text = pipeline.bundle.config.text
    held = sum((stop - start) * tokens for start, stop, tokens in generation.layer_ranges)
    at_end = held + text.num_layers * (len(generation.token_ids) - 1)
    return Run(
        stages=stages,
        first_token_s=generation.first_token_s,
        tokens_per_s=generation.tokens_per_s,
        prompt_tokens=generation.prompt_tokens,
        visual_tokens=generation.visual_tokens,
        keep=tuple(generation.keep_counts),
        layer_ranges=tuple(generation.layer_ranges),
        # Every layer has grown by the tokens that were generated; what the prompt left is wanted.
        kv_bytes=round(generation.kv_bytes * held / at_end),
        precision=pipeline.precision,
    )


def without_ends(bundle: Bundle) -> Bundle:
    """The bundle with no end tokens, so that answers have the length that was asked for."""
    manifest = bundle.manifest
    endless = replace(manifest.generation, eos_token_ids=())
    return replace(bundle, manifest=replace(manifest, generation=endless))


def fitted(work: Workload, bundle: Bundle, text_tokens: int) -> tuple[Workload, int]:
    """The workload with a prompt of as many text tokens, the chat template's counted; and tiles.

    Raises:
        TrioError: the prompt and its answer do not fit into the model's context.
    """
    inputs = Inputs(bundle)
    _, processed = inputs.encode(work.messages(), work.pictures(0))
    rows = [len(picture.rows) for picture in processed]

    def count(text: str) -> int:
        return inputs.prompt(replace(work, prompt=text).messages(), rows).length - sum(rows)

    work = replace(work, prompt=prompt_of_length(count, text_tokens))
    length = sum(rows) + count(work.prompt)
    if length + work.new_tokens > bundle.config.text.max_positions:
        raise TrioError(
            f"a prompt of {length} tokens, {sum(rows)} of them visual, and {work.new_tokens} new "
            f"ones do not fit into the model's context of {bundle.config.text.max_positions}: ask "
            "for fewer --images, or in --size for a larger context="
        )
    return work, sum(len(picture.pixel_values) for picture in processed)


@contextlib.contextmanager
def timed(
    stages: dict[str, float], name: str, now: Callable[[], float] = time.perf_counter
) -> Iterator[None]:
    """Adds the seconds spent inside to a stage."""
    start = now()
    yield
    stages[name] = stages.get(name, 0.0) + now() - start
