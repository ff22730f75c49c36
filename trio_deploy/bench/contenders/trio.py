"""The bundle itself, answering through its pipeline."""

from __future__ import annotations

from collections.abc import Callable

from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.workload import Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Generation, Request


def open_pipeline(case: Case) -> Pipeline:
    """Open the bundle of a case without end tokens, so that every run generates as many tokens."""
    return Pipeline.open(Bundle.load(case.bundle).with_end_tokens([]), case.options)


def open_trio(pipeline: Pipeline, case: Case, work: Workload) -> Callable[[int], Run]:
    """A contender that answers with an open pipeline at the budget of a case."""

    def answer(seed: int) -> Run:
        generation = pipeline.generate(
            Request(
                work.messages(),
                work.pictures(seed),
                max_new_tokens=work.new_tokens,
                budget=case.budget,
                bundle_sampling=False,
            )
        )
        return _run(generation, pipeline)

    return answer


def _run(generation: Generation, pipeline: Pipeline) -> Run:
    stages = {stage: s for stage, s in generation.timings.items() if stage != "decode"}
    text = pipeline.bundle.config.text
    prefilled = sum((stop - start) * tokens for start, stop, tokens in generation.layer_ranges)
    at_end = prefilled + text.num_layers * (len(generation.token_ids) - 1)
    return Run(
        stages=stages,
        first_token_s=generation.first_token_s,
        tokens_per_s=generation.tokens_per_s,
        prompt_tokens=generation.prompt_tokens,
        visual_tokens=generation.visual_tokens,
        keep=tuple(generation.keep_counts),
        layer_ranges=tuple(generation.layer_ranges),
        # Every layer has grown by the generated tokens; only the prompt's share is reported.
        kv_bytes=round(generation.kv_bytes * prefilled / at_end),
        precision=pipeline.precision,
        ran_as=pipeline.ran_as,
    )
