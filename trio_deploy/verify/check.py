"""Compare a bundle with the oracle, or its recorded tensors, stage by stage and end to end.

torch and transformers are imported only to run the oracle: a recorded reference can be compared on
devices that have neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.export.cache import find_bundle
from trio_deploy.families.registry import request_limits
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request
from trio_deploy.pipeline.token_table import TokenTable
from trio_deploy.reference.trace import Tensors
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.onnxruntime import RUNTIME as ORT
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.tensorrt.runtime import TrtEngine
from trio_deploy.verify.compare import (
    PRODUCTS_OVERLAP,
    ROUNDINGS,
    TOLERANCES,
    ParityRow,
    Tolerance,
    compare_stages,
)
from trio_deploy.verify.engines import compare_engines
from trio_deploy.verify.examples import Example, default_examples
from trio_deploy.verify.float_activations import UNROUNDED, FloatActivations
from trio_deploy.verify.golden import Reference, load, store
from trio_deploy.verify.oracle import (
    NEW_TOKENS,
    ask_oracle,
    compare_inputs,
    compare_scheme,
    require_oracle,
)
from trio_deploy.verify.origin import compare_origin
from trio_deploy.verify.report import Report


def check(
    bundle: Bundle | str | Path,
    options: RuntimeOptions | None = None,
    *,
    golden: bool = False,
    checkpoint: str | Path | None = None,
    examples: Sequence[Example] | None = None,
    **keywords: Any,
) -> Report:
    """Compare a bundle with the oracle; TensorRT's engines with ONNX Runtime too.

    Args:
        bundle: as of `Pipeline.open`.
        options: how the bundle is run.
        golden: compare with what `record` stored, which needs no torch.
        checkpoint: folder that the bundle was made from: its config.json, the headers of its
            weights and its output head are compared. Without `golden` the oracle is transformers'
            model as loaded from it, and prompts are compared with its processor's; with `golden`
            nothing compares the values of its weights. None: the oracle has the weights in the
            bundle, which are not compared with any checkpoint. Of a quantised bundle it has these
            in any case, and rows `scheme` say how far the checkpoint is, if that is a float one.
        examples: questions to ask; None: `default_examples`.
        keywords: fields of `RuntimeOptions`, which replace those of `options`.

    Raises:
        TrioError: torch or transformers is missing, or nothing was recorded.
    """
    if checkpoint is not None:
        from_folder(Path(checkpoint))
    if not golden:
        require_oracle()  # a model may have to be exported first
    options = replace(options or RuntimeOptions(), **keywords)
    if golden and not isinstance(bundle, Bundle):
        refuse = partial(_refuse_fresh, bundle)
        bundle = find_bundle(bundle, options, to_run=True, before_export=refuse)
    pipeline = Pipeline.open(bundle, options)
    loaded = pipeline.bundle
    # Before transformers takes a wrong path for a name on the hub.
    rows = [] if checkpoint is None else compare_origin(loaded, Path(checkpoint))
    if golden:
        reference = load(loaded)
    else:
        asked = list(examples or default_examples())[: pipeline.max_rows]
        reference = ask_oracle(loaded, pipeline, asked, checkpoint)
        rows += compare_inputs(pipeline, reference, checkpoint)
    manifest = loaded.manifest
    tolerance = TOLERANCES[pipeline.precision]
    if pipeline.precision != manifest.dtype:  # a selection's input is exact, as is most of its work
        tolerance = replace(tolerance, overlap=max(tolerance.overlap, PRODUCTS_OVERLAP))
    segments = tolerance_of_segments(tolerance, pipeline.ran_as.activations)
    rows += _compare_stages(pipeline, reference, tolerance, segments)
    order = [stage.label for stage in loaded.stages.values()]
    rows.sort(key=lambda row: _place(row.stage, order))
    title = (
        f"{manifest.model.name}, {manifest.dialect} graphs in {manifest.dtype}, computed in "
        f"{pipeline.precision}, against {'the recorded reference' if golden else 'the oracle'}"
    )
    if isinstance(pipeline.engine(loaded.only("embed").name), TrtEngine):
        if manifest.dtype in ORT.dtypes:
            rows += _compare_engines(pipeline, tolerance, segments)
            title += "; each engine, at the shapes in brackets, against ONNX Runtime"
        else:
            title += f"; not against ONNX Runtime, which has no {manifest.dtype}"
    rows += _compare_answers(pipeline, reference, segments)
    if manifest.quantization is not None:
        if checkpoint is not None and not golden and manifest.quantization.source == "rtn":
            rows += compare_scheme(pipeline, reference, checkpoint)
        title += f"; the reference has the values of its {manifest.quantization.scheme} weights"
    if checkpoint is None:
        title += "; not compared with the checkpoint"
    elif golden:
        title += "; of the checkpoint only config.json and headers compared"
    return Report(title, rows, pipeline.ran_as)


def record(
    bundle: Bundle | str | Path,
    options: RuntimeOptions | None = None,
    *,
    checkpoint: str | Path | None = None,
    examples: Sequence[Example] | None = None,
    **keywords: Any,
) -> Bundle:
    """Store the oracle's inputs and outputs in the bundle, for `check(golden=True)`.

    `options` and `keywords` say how this machine opens the bundle, as in `check`; the oracle's
    values are stored.

    Raises:
        TrioError: torch or transformers is missing.
    """
    if checkpoint is not None:
        from_folder(Path(checkpoint))
    require_oracle()
    pipeline = Pipeline.open(bundle, options, **keywords)
    loaded = pipeline.bundle
    return store(loaded, ask_oracle(loaded, pipeline, examples or default_examples(), checkpoint))


def _refuse_fresh(model: str | Path) -> None:
    """Raise TrioError instead of exporting a bundle in which nothing can have been recorded."""
    raise TrioError(
        f"there is no recorded reference of {model}, which would have to be exported first: run "
        f"`trio check {model} --record` with the same options on a machine with torch"
    )


def _compare_stages(
    pipeline: Pipeline, reference: Reference, tolerance: Tolerance, segments: Tolerance
) -> list[ParityRow]:
    """Compare every stage; on ONNX Runtime those that round activations without that, too."""
    bundle = pipeline.bundle
    names = {stage.label: name for name, stage in bundle.stages.items()}
    compare = partial(
        compare_stages,
        threshold=bundle.manifest.threshold,
        separate_decode=bundle.manifest.decode == "separate",
        selections={s.label: s.method for s in bundle.stages.values() if s.method is not None},
    )

    def run(stage: str, feeds: Tensors) -> Mapping[str, NDArray]:
        return _run(bundle, names[stage], pipeline.engine(names[stage]), feeds)

    def run_unrounded(stage: str, feeds: Tensors) -> Mapping[str, NDArray]:
        return _run(bundle, names[stage], floats.engine(bundle, names[stage]), feeds)

    stages, unrounded = {}, {}
    for name, stage in reference.stages.items():
        if name.endswith(UNROUNDED):
            unrounded[name.removesuffix(UNROUNDED)] = stage
        else:
            stages[name] = stage
    rows = compare(stages, run, tolerance, segments=segments)
    if unrounded and pipeline.ran_as.runtime == ORT.name:
        floats = FloatActivations()
        found = compare(unrounded, run_unrounded, tolerance)
        rows += [replace(row, stage=row.stage + UNROUNDED) for row in found]
    return rows


def tolerance_of_segments(tolerance: Tolerance, activations: str | None) -> Tolerance:
    """The tolerance of stages that run layers, by what activations are rounded to in them."""
    if activations is None:
        return tolerance
    rounding = ROUNDINGS[activations]
    wide = max(tolerance.relative, rounding.products)
    return replace(tolerance, relative=wide, per_token=wide, tokens=False, norm=rounding.norm)


def _run(bundle: Bundle, stage: str, engine: Engine, feeds: Tensors) -> Mapping[str, NDArray]:
    """Run a stage on the reference's inputs; its caches have the reference's sizes."""
    info, head_dim = bundle.stages[stage], bundle.config.text.head_dim
    outputs_of = {(t.layer, t.part): t.name for t in info.outputs_of("cache")}
    cached = {t.name: t for t in info.inputs_of("cache")}
    presents = {name: outputs_of[t.layer, t.part] for name, t in cached.items()}
    feeds = _with_token_embeddings(bundle, info, feeds)
    taken = {}
    capacities = {}
    for name, spec in engine.inputs.items():
        taken[name] = np.ascontiguousarray(feeds[name], dtype=spec.dtype)
        if name in presents and isinstance(spec.shape[2], int):
            # an engine of one capacity: the rest is empty
            size = taken[name].shape[2]
            rest = [(0, 0), (0, 0), (0, spec.shape[2] - size), (0, 0)]
            taken[name] = np.pad(taken[name], rest)
            capacities[presents[name]] = size
        if name in presents:  # heads that are padded
            rest = [(0, 0), (0, 0), (0, 0), (0, int(cached[name].shape[3]) - head_dim)]
            taken[name] = np.pad(taken[name], rest)
    if info.kind == "vision":  # as many tiles at once as the pipeline shows
        tiles = {t.name: taken.pop(t.name) for t in info.inputs if t.shape[0] == "T"}
        count = max(len(array) for array in tiles.values())
        once = request_limits(bundle.config).tiles_at_once
        parts = [
            engine.run({n: a[start : start + once] for n, a in tiles.items()} | taken)
            for start in range(0, count, once)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in engine.outputs}
    outputs = dict(engine.run(taken))
    for name in outputs_of.values():
        outputs[name] = outputs[name][:, :, : capacities.get(name), :head_dim]
    return outputs


def _with_token_embeddings(bundle: Bundle, stage: StageInfo, feeds: Tensors) -> Tensors:
    """Inputs of a stage with the embeddings that its host looks up, by the reference's ids."""
    taken = stage.inputs_of("token_embeddings")
    table = TokenTable.of(bundle) if taken else None
    if table is None:
        return feeds
    ids = feeds["input_ids"]
    source = feeds.get("source_index", np.zeros_like(ids))  # a decode step has one token
    return feeds | {taken[0].name: table.rows_for_text(ids, source)}


def _compare_engines(
    pipeline: Pipeline, tolerance: Tolerance, segments: Tolerance
) -> list[ParityRow]:
    bundle = pipeline.bundle
    return compare_engines(
        {stage: pipeline.engine(stage).profiles for stage in bundle.stages},  # type: ignore[attr-defined]
        lambda stage: OrtRuntime().open(bundle.graph(stage), bundle.places(stage)),
        pipeline.engine,
        tolerance,
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
        segments=segments,
    )


def _place(stage: str, order: list[str]) -> tuple[int, int]:
    """Sort key of a row: inputs first, stages in the order they run, then decoding steps."""
    label = stage.removesuffix(UNROUNDED)
    name = label.removesuffix(" (decode)")
    if name not in order:
        return (0, 0)
    return (2 if label != name or name == "decode" else 1, order.index(name))


def _compare_answers(
    pipeline: Pipeline, reference: Reference, tolerance: Tolerance
) -> list[ParityRow]:
    """Compare greedy answers of the whole pipeline: one batch, and the first request alone."""
    requests = [
        Request(e.prompt, e.pictures, max_new_tokens=NEW_TOKENS, bundle_sampling=False)
        for e in reference.examples
    ]
    answers = [
        (f"answer {i}", r.token_ids, expected)
        for i, (r, expected) in enumerate(
            zip(pipeline.generate_batch(requests), reference.tokens, strict=True)
        )
    ]
    alone = pipeline.generate_batch(requests[:1])[0]
    answers.append(("answer 0, alone", alone.token_ids, reference.tokens[0]))
    rows = []
    for name, tokens, expected in answers:
        equal = tokens == expected
        problem = "" if equal or not tolerance.tokens else "other tokens than the reference's"
        rows.append(ParityRow(name, tokens_equal=equal, problem=problem))
    return rows
