"""Compare a bundle with the oracle, or its recorded tensors, stage by stage and end to end.

torch and transformers are imported only to run the oracle: a recorded reference can be compared on
devices that have neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.families.base import TILES_AT_ONCE, Layout
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.prompt import Prompt, collate
from trio_deploy.pipeline.request import Request
from trio_deploy.reference.trace import Tensors
from trio_deploy.runtimes.onnxruntime import RUNTIME as ORT
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.tensorrt.runtime import TrtEngine
from trio_deploy.verify.compare import TOLERANCES, ParityRow, Tolerance, compare_stages, difference
from trio_deploy.verify.engines import compare_engines
from trio_deploy.verify.examples import Example, default_examples
from trio_deploy.verify.golden import Reference, load, store

__all__ = ["Example", "ParityRow", "Report", "check", "format_report", "record"]

NEW_TOKENS = 12
"""Number of tokens that are generated and compared per request."""


@dataclass(frozen=True)
class Report:
    """The table of a check.

    Attributes:
        title: what was compared with what.
        rows: one per stage, then one per generated answer.
    """

    title: str
    rows: list[ParityRow]

    @property
    def passed(self) -> bool:
        """Whether every row is within tolerance."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a difference that is not finite becomes null."""
        rows = [asdict(row) | {"passed": row.passed} for row in self.rows]
        for row in rows:
            for key in ("max_abs", "max_rel"):
                row[key] = row[key] if np.isfinite(row[key]) else None
        return {"title": self.title, "passed": self.passed, "rows": rows}


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
        options: how the bundle is run.
        golden: compare with what `record` stored, which needs no torch.
        checkpoint: folder with the oracle's weights and transformers' own processor; None: the
            weights in the bundle.
        examples: questions to ask; None: `default_examples`.
        keywords: fields of `RuntimeOptions`, which replace those of `options`.

    Raises:
        TrioError: torch or transformers is missing, or nothing was recorded.
    """
    loaded = _loaded(bundle)
    pipeline = Pipeline.open(loaded, options, **keywords)
    if golden:
        reference, rows = load(loaded), []
    else:
        asked = list(examples or default_examples())[: pipeline.max_rows]
        reference = _ask_oracle(loaded, pipeline, asked, checkpoint)
        rows = _compare_inputs(pipeline, reference, checkpoint)
    manifest = loaded.manifest
    names = {stage.label: name for name, stage in loaded.stages.items()}
    tolerance = TOLERANCES[pipeline.precision]
    rows += compare_stages(
        reference.stages,
        lambda stage, feeds: _run(pipeline, names[stage], feeds),
        tolerance,
        threshold=manifest.threshold,
        separate_decode=manifest.decode == "separate",
        methods=loaded.schedule.methods,
    )
    order = list(names)
    rows.sort(key=lambda row: _place(row.stage, order))
    title = (
        f"{manifest.model.name}, {manifest.dialect} graphs in {manifest.dtype}, computed in "
        f"{pipeline.precision}, against {'the recorded reference' if golden else 'the oracle'}"
    )
    if isinstance(pipeline.engine(loaded.only("embed").name), TrtEngine):
        if manifest.dtype in ORT.dtypes:
            rows += _compare_engines(pipeline, tolerance)
            title += "; each engine, at the shapes in brackets, against ONNX Runtime"
        else:
            title += f"; not against ONNX Runtime, which has no {manifest.dtype}"
    rows += _compare_answers(pipeline, reference, tolerance)
    return Report(title, rows)


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
    loaded = _loaded(bundle)
    pipeline = Pipeline.open(loaded, options, **keywords)
    return store(loaded, _ask_oracle(loaded, pipeline, examples or default_examples(), checkpoint))


def format_report(report: Report) -> str:
    """The table as text."""
    head = ("stage", "max abs", "max rel", "worst output", "kept", "in doubt", "tokens", "")
    lines = [head]
    for row in report.rows:
        lines.append(
            (
                row.stage,
                f"{row.max_abs:.1e}",
                f"{row.max_rel:.1e}",
                row.worst or "-",
                "-" if row.overlap is None else f"{row.overlap:.1%}",
                "-" if row.excluded is None else f"{row.excluded:.1%}",
                {None: "-", True: "equal", False: "differ"}[row.tokens_equal],
                "ok" if row.passed else f"BEYOND TOLERANCE: {row.problem}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    failed = sum(not row.passed for row in report.rows)
    verdict = (
        f"{failed} of {len(report.rows)} rows beyond tolerance"
        if failed
        else "all within tolerance"
    )
    tolerated = any(row.passed and row.tokens_equal is False for row in report.rows)
    return "\n".join(
        [
            report.title,
            "",
            *table,
            "",
            f"{verdict}; kept: share of the reference's "
            "kept visual tokens, in doubt: share whose rank lies within the error"
            + (
                "; tokens: answers may differ in this type, only float32 requires equal ones"
                if tolerated
                else ""
            ),
        ]
    )


def _loaded(bundle: Bundle | str | Path) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)


def _run(pipeline: Pipeline, stage: str, feeds: Tensors) -> Mapping[str, NDArray]:
    engine, info = pipeline.engine(stage), pipeline.bundle.stages[stage]
    outputs_of = {(t.layer, t.part): t.name for t in info.outputs_of("cache")}
    presents = {t.name: outputs_of[t.layer, t.part] for t in info.inputs_of("cache")}
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
    if info.kind == "vision":  # as many tiles at once as the pipeline shows
        count = len(taken[info.input_name("image")])
        parts = [
            engine.run({name: a[start : start + TILES_AT_ONCE] for name, a in taken.items()})
            for start in range(0, count, TILES_AT_ONCE)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in engine.outputs}
    outputs = engine.run(taken)
    return outputs | {name: outputs[name][:, :, :size] for name, size in capacities.items()}


def _compare_engines(pipeline: Pipeline, tolerance: Tolerance) -> list[ParityRow]:
    bundle = pipeline.bundle
    return compare_engines(
        {stage: pipeline.engine(stage).profiles for stage in bundle.stages},  # type: ignore[attr-defined]
        lambda stage: OrtRuntime().open(bundle.graph(stage)),
        pipeline.engine,
        tolerance,
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )


def _place(stage: str, order: list[str]) -> tuple[int, int]:
    """Sort key of a row: inputs first, stages in the order they run, then decoding steps."""
    name = stage.removesuffix(" (decode)")
    if name not in order:
        return (0, 0)
    return (2 if stage != name or name == "decode" else 1, order.index(name))


def _ask_oracle(
    bundle: Bundle,
    pipeline: Pipeline,
    examples: Sequence[Example],
    checkpoint: str | Path | None,
) -> Reference:
    """Run the oracle on the examples as the runtime encodes them."""
    if checkpoint is not None:  # before transformers takes a wrong path for a name on the hub
        from_folder(Path(checkpoint))
    try:
        import torch

        from trio_deploy.reference.oracle import Oracle, Row
        from trio_deploy.reference.restore import restore_model
    except ImportError as error:
        raise TrioError(
            f"comparing with the oracle needs {error.name}: pip install 'trio-deploy[reference]', "
            "or check against a recorded reference with --golden"
        ) from error
    manifest = bundle.manifest
    options: dict[str, Any] = {
        "probe": manifest.probe,
        "positions": manifest.positions,
        "threshold": manifest.threshold,
        "storage": None if manifest.dtype == "float32" else getattr(torch, manifest.dtype),
    }
    if checkpoint is None:
        oracle = Oracle(restore_model(bundle), family=bundle.config.family, **options)
    else:
        oracle = Oracle.from_checkpoint(checkpoint, **options)
    rows = []
    for prompt, pictures in _encoded(pipeline, examples):
        pixels = [picture.feeds["pixel_values"] for picture in pictures]
        rows.append(
            Row(
                prompt.ids,
                np.concatenate(pixels) if pixels else None,
                [(int(p.size[0]), int(p.size[1])) for p in pictures],
            )
        )
    result = oracle.generate(rows, bundle.schedule, max_new_tokens=NEW_TOKENS)
    ends = set(manifest.generation.eos_token_ids)
    tokens = [_until_end(row, ends) for row in result.token_ids]
    return Reference(list(examples), result.stages, tokens)


def _encoded(pipeline: Pipeline, examples: Sequence[Example]) -> list[tuple[Prompt, list[Layout]]]:
    prepared = [pipeline.prepare(Request(e.prompt, e.pictures)) for e in examples]
    return [(sequence.prompt, sequence.processed) for sequence in prepared]


def _compare_inputs(
    pipeline: Pipeline, reference: Reference, checkpoint: str | Path | None
) -> list[ParityRow]:
    """Compare the batch with transformers' packing, and prompts with its processor."""
    encoded = _encoded(pipeline, reference.examples)
    batch = collate([prompt for prompt, _ in encoded], [pictures for _, pictures in encoded])
    expected = reference.stages["embed"].inputs
    valid = np.arange(batch.source_index.shape[1]) < batch.lengths[:, None]
    same = np.array_equal(batch.lengths, expected["lengths"]) and np.array_equal(
        batch.source_index[valid], expected["source_index"][valid]
    )
    problem = "" if same else "image rows are not where transformers packs them"
    rows = [ParityRow("source_index", problem=problem)]
    if checkpoint is not None:
        rows += _compare_processor(pipeline, reference.examples, encoded, checkpoint)
    return rows


def _compare_processor(
    pipeline: Pipeline,
    examples: Sequence[Example],
    encoded: Sequence[tuple[Prompt, list[Layout]]],
    checkpoint: str | Path,
) -> list[ParityRow]:
    """Compare prompts and pixels with those of transformers' processor."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend="pil")
    worst, problem = (0.0, 0.0), ""
    for example, (prompt, pictures) in zip(examples, encoded, strict=True):
        content = [{"type": "image"} for _ in example.pictures]
        content.append({"type": "text", "text": example.prompt})
        batch = processor(
            text=processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            ),
            images=list(example.pictures) or None,
            return_tensors="np",
        )
        if not np.array_equal(batch["input_ids"][0], prompt.ids):
            problem = "the prompt's tokens are not those of transformers' processor"
        if pictures:
            pixels = np.asarray(batch["pixel_values"])
            if pixels.ndim == 5:  # images with fewer tiles are padded to the largest
                pixels = np.concatenate(
                    [
                        tiles[: len(p.feeds["pixel_values"])]
                        for tiles, p in zip(pixels, pictures, strict=True)
                    ]
                )
            mine = np.concatenate([picture.feeds["pixel_values"] for picture in pictures])
            if mine.shape != pixels.shape:
                problem = "the pictures have other tiles than transformers' processor gives them"
            else:
                worst = max(worst, difference(mine, pixels), key=lambda pair: pair[1])
    if worst[1] > TOLERANCES["float32"].relative:
        problem = problem or f"pixel_values differs by {worst[1]:.1e}"
    return [ParityRow("processor", *worst, worst="pixel_values", problem=problem)]


def _compare_answers(
    pipeline: Pipeline, reference: Reference, tolerance: Tolerance
) -> list[ParityRow]:
    """Compare greedy answers of the whole pipeline: one batch, and the first request alone."""
    requests = [
        Request(e.prompt, e.pictures, max_new_tokens=NEW_TOKENS) for e in reference.examples
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


def _until_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
