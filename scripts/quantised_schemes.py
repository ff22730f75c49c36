"""What each scheme of quantisation does to a model: kept tokens, answers, perplexity.

    python scripts/quantised_schemes.py MODEL [--scenes 20] [--tokens 2000] [--json OUT]

Every scheme is compared with the float bundle at the same schedule, on questions about generated
scenes: the share of the float bundle's kept visual tokens that it keeps too, at each pruning point;
how often the first token and the whole answer are the same. Perplexity is of text of this project's
documentation, without a picture. The shares of the weights at each width are printed too, since a
matrix may have more bits than its scheme says. The row `float16` is the same float model in 16 bit:
what rounding of another kind changes, and no scheme of 4 or 8 bit can be expected to fall below.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy import Pipeline, Request, export_model
from trio_deploy.bundle.describe import inspect
from trio_deploy.checkpoint.tokenizer import load_tokenizer
from trio_deploy.evaluation.questions import SCENE_TOKENS, Question, question_set
from trio_deploy.pipeline.request import Generation
from trio_deploy.quant.schemes import NO_SCHEME, SCHEMES

_ROOT = Path(__file__).parents[1]
_TEXT = ("docs/architecture.md", "docs/evaluation.md")
_PIECE = 256  # tokens of a text that are read at once
HALF = "float16"  # float weights and arithmetic in 16 bit: what rounding alone changes
_FIRST = 8  # of them the prompt; perplexity is of those behind it


def main() -> None:
    """Export a bundle per scheme, ask all of them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--schedule")
    parser.add_argument("--schemes", default=",".join((HALF, *SCHEMES)))
    parser.add_argument("--scenes", type=int, default=20, help="scenes, 16 questions each")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of text for perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    questions = question_set(args.scenes).questions if args.scenes else []
    found: dict[str, dict[str, Any]] = {}
    reference: list[Generation] = []
    for scheme in (NO_SCHEME, *args.schemes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            half = scheme == HALF
            bundle = export_model(
                args.model,
                Path(folder) / "bundle",
                quantize=NO_SCHEME if half else scheme,
                dtype="float16" if half else None,
                target=args.target,
                schedule=args.schedule,
                progress=False,
            )
            pipeline = Pipeline.open(bundle, threads=args.threads)
            answers = [_ask(pipeline, question) for question in questions]
            reference = reference or answers
            found[scheme] = {
                **_compare(answers, reference),
                "perplexity": _perplexity(pipeline, args.tokens),
                "weights": next(
                    (line.strip() for line in inspect(bundle).splitlines() if "of the w" in line),
                    "",
                ),
            }
        print(scheme, json.dumps(found[scheme]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _ask(pipeline: Pipeline, question: Question) -> Generation:
    return pipeline.generate(Request(question.prompt, question.images, max_new_tokens=SCENE_TOKENS))


def _compare(answers: list[Generation], reference: list[Generation]) -> dict[str, Any]:
    if not answers:
        return {}
    points = range(len(reference[0].kept))
    overlap = [
        np.mean([_overlap(a, r, p) for a, r in zip(answers, reference, strict=True)])
        for p in points
    ]
    pairs = [(a.token_ids, r.token_ids) for a, r in zip(answers, reference, strict=True)]
    return {
        "overlap": [round(float(share), 4) for share in overlap],
        "first token": round(sum(a[:1] == r[:1] for a, r in pairs) / len(pairs), 4),
        "answer": round(sum(a == r for a, r in pairs) / len(pairs), 4),
    }


def _overlap(answer: Generation, reference: Generation, point: int) -> float:
    mine, theirs = (np.intersect1d(each.kept[point], each.visual) for each in (answer, reference))
    return len(np.intersect1d(mine, theirs)) / max(1, len(theirs))


def _perplexity(pipeline: Pipeline, count: int) -> float | None:
    if not count:
        return None
    text = "".join((_ROOT / name).read_text(encoding="utf-8") for name in _TEXT)
    tokenizer = load_tokenizer(pipeline.bundle.tokenizer_path, "export the bundle again")
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:count]
    total, seen = 0.0, 0
    for start in range(0, len(ids) - 1, _PIECE):
        piece = ids[start : start + _PIECE]
        if len(piece) <= _FIRST:
            break
        forced = piece[_FIRST:]
        answer = pipeline.generate(
            Request(
                tokenizer.decode(piece[:_FIRST]),
                raw=True,
                forced=forced,
                max_new_tokens=len(forced),
            )
        )
        total += float(np.sum(answer.logprobs))
        seen += len(answer.logprobs)
    return round(math.exp(-total / seen), 3)


if __name__ == "__main__":
    main()
