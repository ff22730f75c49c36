"""What each scheme of quantisation does to a model: kept tokens, answers, perplexity.

    python scripts/quantised_schemes.py MODEL [--scenes 2] [--tokens 4096] [--out] [--title TEXT]
    python scripts/quantised_schemes.py        # writes the page again from what is recorded

Every scheme is compared with the float32 bundle at the same schedule, on questions about generated
scenes: the share of the float bundle's kept visual tokens that it keeps too, at each pruning point;
how often the first token and the whole answer are the same. Perplexity is of text of this project's
documentation, without a picture. The shares of the weights at each width are printed too, since a
matrix may have more bits than its scheme says. The row `float16` is the same float model in 16 bit:
what rounding of another kind changes, and no scheme of 4 or 8 bit can be expected to fall below.
In the row `table-int8` the table of embeddings alone is rounded, to 8 bit with a scale per row, as
is the table of a model whose head is tied to it; the head keeps its values.
Scales of `fp8` are measured over other scenes, and its graphs run on ONNX Runtime, which computes
them in float. With --out the rows are written to docs/measurements/quantised-schemes.json, with the
machine, and the page to quantised-schemes.md: they, and what `trio eval --quantize SCHEME` wrote,
recorded as eval-quantised-SCHEME.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))

from trio_deploy import Pipeline, Request, export_model
from trio_deploy.bench.environment import load_average, machine, machine_text
from trio_deploy.bundle.describe import quantised_widths
from trio_deploy.checkpoint.tokenizer import load_tokenizer
from trio_deploy.evaluation.calibrate import calibrate
from trio_deploy.evaluation.questions import (
    SCENE_TOKENS,
    Question,
    QuestionSet,
    scene_questions,
    scene_set,
)
from trio_deploy.evaluation.results import Results
from trio_deploy.evaluation.scheme import table_of
from trio_deploy.pipeline.request import Generation
from trio_deploy.quant.matrix import dequantised, round_to_nearest
from trio_deploy.quant.schemes import NO_SCHEME, WHOLE_NUMBERS

_ROOT = Path(__file__).parents[1]
OUT = _ROOT / "docs" / "measurements" / "quantised-schemes.json"
PAGE = OUT.with_suffix(".md")
_TEXT = ("docs/architecture.md", "docs/evaluation.md")
_PIECE = 256  # tokens of a text that are read at once
_FIRST = 8  # of them the prompt; perplexity is of those behind it
_BATCH = 16  # questions, and pieces of text, that are run at once
FLOAT, HALF = "float32", "float16"  # what is compared with, and the same in 16 bit
FP8 = "fp8"
TABLE = "table-int8"  # float32, but for the table of embeddings
_CALIBRATED = 2  # scenes that scales of activations are measured over, with so many questions each:
_EACH = 16


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--schedule")
    parser.add_argument("--schemes", default=",".join((HALF, TABLE, *WHOLE_NUMBERS, FP8)))
    parser.add_argument("--scenes", type=int, default=2, help="scenes, 16 questions each")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text for perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--title", default="", help="what the page calls the model")
    parser.add_argument("--out", action="store_true", help="record the rows")
    args = parser.parse_args()
    for found in measure(args) if args.model else ():
        print(table(found["rows"][-1:]).splitlines()[-1], flush=True)
        if args.out:
            OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.out or not args.model:
        PAGE.write_text(page(json.loads(OUT.read_text(encoding="utf-8"))), encoding="utf-8")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Export a bundle per scheme and ask it; what was found so far, after each."""
    found: dict[str, Any] = {
        "model": args.title or args.model,
        "questions": 16 * args.scenes,
        "text": hashlib.sha256(_text().encode()).hexdigest(),
        "machine": machine(args.threads),
        "load": [load_average(), None],
        "rows": [],
    }
    questions = scene_set(args.scenes).questions if args.scenes else []
    reference: list[Generation] = []
    for scheme in (FLOAT, *args.schemes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            model = args.model
            if scheme == TABLE:
                model = with_rounded_table(Path(model), Path(folder) / "rounded")
            bundle = export_model(
                model,
                Path(folder) / "bundle",
                schedule=args.schedule,
                progress=False,
                **export_options(args.model, scheme),
            )
            pipeline = Pipeline.open(bundle, runtime="onnxruntime", threads=args.threads)
            answers = _ask(pipeline, questions)
            reference = reference or answers
            perplexity, found["tokens"] = _perplexity(pipeline, args.tokens)
        widths = "".join(quantised_widths(bundle.manifest)[1:]).removeprefix("of the weights ")
        found["schedule"] = ", ".join(
            f"{point.layer}:{point.keep:g}:{point.method}" for point in bundle.schedule.points
        )
        found["rows"].append(
            {
                "scheme": scheme,
                **compare(answers, reference),
                "perplexity": perplexity,
                "weights": widths or f"all in {bundle.manifest.dtype}",
            }
        )
        found["load"][1] = load_average()
        yield found


def export_options(model: str, scheme: str) -> dict[str, Any]:
    """Options of the export of a scheme, or of floats of a type."""
    if scheme in (FLOAT, HALF, TABLE):
        dtype = HALF if scheme == HALF else FLOAT
        return {"quantize": NO_SCHEME, "dtype": dtype, "target": "cpu"}
    if scheme != FP8:
        return {"quantize": scheme, "target": "cpu"}
    asked = QuestionSet(scene_questions(_CALIBRATED, split="tuning", each=_EACH))
    return {
        "quantize": scheme,
        "dtype": FLOAT,
        "target": "rtx-40",
        "calibration": partial(calibrate, model, asked, progress=False),
    }


def with_rounded_table(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint with its table of embeddings rounded, and a head with values of its own."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    values = table.weight.detach()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    rounded = dequantised(round_to_nearest(values.numpy(), 8, values.shape[1]))
    table.weight = torch.nn.Parameter(torch.from_numpy(rounded))
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder


def _ask(pipeline: Pipeline, questions: Sequence[Question]) -> list[Generation]:
    requests = [Request(q.prompt, q.images, max_new_tokens=SCENE_TOKENS) for q in questions]
    return _in_batches(pipeline, requests)


def _in_batches(pipeline: Pipeline, requests: Sequence[Request]) -> list[Generation]:
    starts = range(0, len(requests), _BATCH)
    return [a for s in starts for a in pipeline.generate_batch(requests[s : s + _BATCH])]


def compare(answers: Sequence[Generation], reference: Sequence[Generation]) -> dict[str, Any]:
    """Shares of kept visual tokens, per pruning point, of first tokens and of answers."""
    if not answers:
        return {"overlap": [], "first": None, "answer": None}
    pairs = list(zip(answers, reference, strict=True))
    points = range(len(reference[0].kept))
    return {
        "overlap": [float(np.mean([_overlap(a, r, point) for a, r in pairs])) for point in points],
        "first": float(np.mean([a.token_ids[:1] == r.token_ids[:1] for a, r in pairs])),
        "answer": float(np.mean([a.token_ids == r.token_ids for a, r in pairs])),
    }


def _overlap(answer: Generation, reference: Generation, point: int) -> float:
    mine, theirs = (np.intersect1d(each.kept[point], each.visual) for each in (answer, reference))
    return len(np.intersect1d(mine, theirs)) / max(1, len(theirs))


def _text() -> str:
    return "".join((_ROOT / name).read_text(encoding="utf-8") for name in _TEXT)


def _perplexity(pipeline: Pipeline, count: int) -> tuple[float | None, int]:
    """Perplexity of the documentation's first tokens, and how many of them it is of."""
    tokenizer = load_tokenizer(pipeline.bundle.tokenizer_path, "export the bundle again")
    ids = tokenizer.encode(_text(), add_special_tokens=False).ids[:count]
    pieces = [ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE)]
    requests = [
        Request(
            tokenizer.decode(piece[:_FIRST]),
            raw=True,
            forced=piece[_FIRST:],
            max_new_tokens=len(piece) - _FIRST,
        )
        for piece in pieces
        if len(piece) > _FIRST
    ]
    found = [value for answer in _in_batches(pipeline, requests) for value in answer.logprobs]
    return (math.exp(-float(np.mean(found))) if found else None), len(found)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    heads = (
        "weights",
        "kept tokens that agree, by pruning point",
        "first tokens that agree",
        "answers that agree",
        "perplexity",
        "bits of the weights",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            f"`{row['scheme']}`",
            ", ".join(f"{share:.3f}" for share in row["overlap"]),
            *("" if row[key] is None else f"{row[key]:.2f}" for key in ("first", "answer")),
            "" if row["perplexity"] is None else f"{row['perplexity']:.1f}",
            row["weights"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """The page of what was measured, and of evaluations that are recorded beside it."""
    asked = found["questions"]
    text = (
        f"# What quantised weights change\n\n## A real language model\n\n{found['model']}, pruned "
        f"by `{found['schedule']}`, on ONNX Runtime. Each line is compared with `{FLOAT}` on the "
        f"same {asked} questions about {asked // 16} generated scenes; perplexity is of "
        f"{found['tokens']:,} tokens of {' and '.join(_TEXT)} (SHA-256 {found['text'][:12]}…, so "
        f"that figures of another text are told from these). `{HALF}` is the same model "
        "in 16 bit, without codes: what rounding alone changes. "
        f"{machine_text(found['machine'], *found['load'])} Made by `python "
        f"scripts/quantised_schemes.py MODEL --schedule {found['schedule'].replace(', ', ',')} "
        f"--scenes {asked // 16} --out`.\n\n{table(found['rows'])}\n"
    )
    for file in (OUT.parent / f"eval-quantised-{scheme}.json" for scheme in WHOLE_NUMBERS):
        if file.is_file():
            text += evaluation(Results.load(file))
    return text


def evaluation(results: Results) -> str:
    """The section of an evaluation."""
    found = results.scheme
    assert found is not None
    return (
        f"\n## `trio eval {results.model} --quantize {found.scheme}`\n\n"
        f"{results.data}. {machine_text(results.machine, None, None)}\n\n"
        + "\n".join(table_of(found))
        + "\n"
    )


if __name__ == "__main__":
    main()
