"""The oracle's side of a check: its tensors and answers, and what it is given.

torch and transformers are imported only here, on first use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import kind_of_label
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.prompt import Batch, Prompt, collate
from trio_deploy.pipeline.request import Request
from trio_deploy.reference.row import Row
from trio_deploy.verify.compare import SEGMENTS, TOLERANCES, ParityRow, difference
from trio_deploy.verify.examples import Example
from trio_deploy.verify.float_activations import UNROUNDED
from trio_deploy.verify.golden import Reference

NEW_TOKENS = 12
"""Number of tokens that are generated and compared per request."""


def ask_oracle(
    bundle: Bundle,
    pipeline: Pipeline,
    examples: Sequence[Example],
    checkpoint: str | Path | None,
) -> Reference:
    """Run the oracle on the examples as the runtime encodes them.

    Where graphs round activations it does, and its stages that run layers are there a second time
    without, with `UNROUNDED` behind their names.
    """
    if checkpoint is not None:  # before transformers takes a wrong path for a name on the hub
        from_folder(Path(checkpoint))
    try:
        import torch

        from trio_deploy.reference.oracle import Oracle
        from trio_deploy.reference.restore import restore_model, selection_weights
    except ImportError as error:
        raise _needed(error.name) from error
    manifest, options = bundle.manifest, _options(bundle, torch)
    quantised = manifest.quantization is not None
    rows = [Row.of(prompt.ids, pictures) for prompt, pictures in _encoded(pipeline, examples)]

    def run(rounds_inputs: bool = True) -> Any:
        if checkpoint is not None and not quantised:
            oracle = Oracle.from_checkpoint(checkpoint, **options)
        else:  # a scheme is a question apart
            model = restore_model(bundle)
            if quantised:
                options["selection_weights"] = selection_weights(bundle, model, rounds_inputs)
            oracle = Oracle(model, family=bundle.config.family, **options)
        return oracle.generate(rows, bundle.schedule, max_new_tokens=NEW_TOKENS)

    result = run()
    stages = dict(result.stages)
    if manifest.quantization is not None and manifest.quantization.calibration is not None:
        for name, stage in run(rounds_inputs=False).stages.items():
            if kind_of_label(name) in SEGMENTS:
                stages[name + UNROUNDED] = stage
    ends = set(manifest.generation.eos_token_ids)
    tokens = [_until_end(row, ends) for row in result.token_ids]
    return Reference(list(examples), stages, tokens)


def compare_scheme(
    pipeline: Pipeline, reference: Reference, checkpoint: str | Path
) -> list[ParityRow]:
    """Compare a quantised bundle with its float checkpoint: what its scheme costs.

    Nothing is beyond tolerance here: a few questions tell how large it is, no more.

    Returns:
        A row per pruning point with the share of the checkpoint's kept visual tokens that the
        bundle keeps too, and one per answer.
    """
    import torch

    from trio_deploy.reference.oracle import Oracle

    examples = reference.examples
    oracle = Oracle.from_checkpoint(checkpoint, **_options(pipeline.bundle, torch))
    encoded = [Row.of(prompt.ids, pictures) for prompt, pictures in _encoded(pipeline, examples)]
    floats = oracle.generate(encoded, pipeline.bundle.schedule, max_new_tokens=NEW_TOKENS)
    requests = [
        Request(e.prompt, e.pictures, max_new_tokens=NEW_TOKENS, bundle_sampling=False)
        for e in examples
    ]
    answers = pipeline.generate_batch(requests)
    rows = []
    for point in range(len(pipeline.bundle.schedule.points)):
        both = kept = 0
        for answer, row in zip(answers, floats.rows, strict=True):
            theirs = np.intersect1d(row.kept[point], answer.visual)
            both += len(np.intersect1d(answer.kept[point], theirs))
            kept += len(theirs)
        rows.append(ParityRow(f"scheme, point {point + 1}", overlap=both / kept if kept else 1.0))
    ends = set(pipeline.bundle.manifest.generation.eos_token_ids)
    for number, (answer, row) in enumerate(zip(answers, floats.rows, strict=True)):
        same = answer.token_ids == _until_end(row.token_ids, ends)
        rows.append(ParityRow(f"scheme, answer {number}", tokens_equal=same))
    return rows


def _options(bundle: Bundle, torch: Any) -> dict[str, Any]:
    """How the oracle of a bundle selects and stores hidden states."""
    manifest = bundle.manifest
    return {
        "probe": manifest.probe,
        "positions": manifest.positions,
        "threshold": manifest.threshold,
        "storage": None if manifest.dtype == "float32" else getattr(torch, manifest.dtype),
    }


def require_oracle() -> None:
    """Check that the oracle's packages are installed, without importing them.

    Raises:
        TrioError: names one that is not.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise _needed(name)


def _needed(package: str | None) -> TrioError:
    return TrioError(
        f"comparing with the oracle needs {package}: pip install 'trio-deploy[reference]', "
        "or check against a recorded reference with --golden"
    )


def compare_inputs(
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
    if batch.position_ids.ndim == 3:
        rows += _compare_places(reference, batch, [p for _, layouts in encoded for p in layouts])
    if checkpoint is not None:
        rows += _compare_processor(pipeline, reference.examples, encoded, checkpoint)
    return rows


def _compare_places(
    reference: Reference, batch: Batch, pictures: Sequence[Layout]
) -> list[ParityRow]:
    """Compare the three positions per token, and the tower's inputs, with transformers'."""
    stages = reference.stages
    expected = next(s.inputs["position_ids"] for s in stages.values() if "position_ids" in s.inputs)
    valid = np.arange(expected.shape[2]) < batch.lengths[:, None]
    same = np.array_equal(np.where(valid[:, None], batch.position_ids, 0), expected)
    rows = [ParityRow("position_ids", problem="" if same else "positions differ from the model's")]
    worst, problem = (0.0, 0.0), ""
    shown = [stage for name, stage in stages.items() if kind_of_label(name) == "vision"]
    for stage, picture in zip(shown, pictures, strict=True):
        for name, wanted in stage.inputs.items():
            mine = picture.feeds[name]
            if mine.shape != wanted.shape:
                problem = f"{name} has the shape {list(mine.shape)}, expected {list(wanted.shape)}"
            elif mine.dtype == np.int64 and not np.array_equal(mine, wanted):
                problem = f"{name} differs from the model's"
            else:
                worst = max(worst, difference(mine, wanted), key=lambda pair: pair[1])
    if worst[1] > TOLERANCES["float32"].relative:
        problem = problem or f"an input of the tower differs by {worst[1]:.1e}"
    return [*rows, ParityRow("patches", *worst, problem=problem)]


def _encoded(pipeline: Pipeline, examples: Sequence[Example]) -> list[tuple[Prompt, list[Layout]]]:
    prepared = [pipeline.prepare(Request(e.prompt, e.pictures)) for e in examples]
    return [(sequence.prompt, sequence.processed) for sequence in prepared]


def _compare_processor(
    pipeline: Pipeline,
    examples: Sequence[Example],
    encoded: Sequence[tuple[Prompt, list[Layout]]],
    checkpoint: str | Path,
) -> list[ParityRow]:
    """Compare prompts and pixels with those of transformers' processor."""
    process = _processor(checkpoint, pipeline.bundle)
    worst, problem = (0.0, 0.0), ""
    for example, (prompt, pictures) in zip(examples, encoded, strict=True):
        content = [{"type": "image"} for _ in example.pictures]
        content.append({"type": "text", "text": example.prompt})
        batch = process([{"role": "user", "content": content}], list(example.pictures))
        if not np.array_equal(batch["input_ids"][0], prompt.ids):
            problem = "the prompt's tokens are not those of transformers' processor"
        if pictures:
            pixels = np.asarray(batch["pixel_values"])
            mine = Row.of(prompt.ids, pictures).pixel_values
            if pixels.ndim == 5:  # images with fewer tiles are padded to the largest
                pixels = np.concatenate(
                    [
                        tiles[: len(p.feeds["pixel_values"])]
                        for tiles, p in zip(pixels, pictures, strict=True)
                    ]
                )
            if mine is None or mine.shape != pixels.shape:
                problem = "the pictures have other tiles than transformers' processor gives them"
            else:
                worst = max(worst, difference(mine, pixels), key=lambda pair: pair[1])
    if worst[1] > TOLERANCES["float32"].relative:
        problem = problem or f"pixel_values differs by {worst[1]:.1e}"
    return [ParityRow("processor", *worst, worst="pixel_values", problem=problem)]


def _processor(
    checkpoint: str | Path, bundle: Bundle
) -> Callable[[list[dict[str, Any]], list[Image.Image]], Mapping[str, Any]]:
    """transformers' processor of a conversation and its pictures.

    That of a family with clips needs torchvision: without it, its parts, which are the tokenizer
    and the image processor, are put together as the processor does. Where pictures have any size,
    the bundle bounds it, whatever the checkpoint says.
    """
    import transformers

    def whole(chat: list[dict[str, Any]], pictures: list[Image.Image]) -> Mapping[str, Any]:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        return processor(text=text, images=pictures or None, return_tensors="np", **bounds)

    def parts(chat: list[dict[str, Any]], pictures: list[Image.Image]) -> Mapping[str, Any]:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        shown = images(pictures, return_tensors="np", **bounds) if pictures else {}
        first, *rest = text.split(token)
        counts = [grid.prod() // images.merge_size**2 for grid in shown.get("image_grid_thw", ())]
        text = first + "".join(
            token * int(count) + after for count, after in zip(counts, rest, strict=True)
        )
        return {**shown, **tokenizer(text, return_tensors="np")}

    bounds = {} if bundle.config.pixels is None else {"size": bundle.preprocessor["size"]}
    try:
        processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend="pil")
        return whole
    except ImportError:
        images = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        token: str = tokenizer.convert_ids_to_tokens(config.image_token_id)
        return parts


def _until_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
