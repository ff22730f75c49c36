"""Measure structured output per step, beside a decode step of a model of that vocabulary.

    python scripts/mask_cost.py --tokenizer tokenizer.json --out docs/measurements

For each kind of form, some rows choose from random logits with a grammar and without; the
difference is what the grammar costs, masks and tokens together, in processor time. Its share is
that of a decode step of as many rows of a model with random weights, which is exported for this
(`--size`, as of `trio bench`). The masks of 16 rows alone are timed twice: one after the other, as
the batcher has them made, and together on all cores by llguidance's executor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from llguidance import LLExecutor

from trio_deploy import Pipeline, Request, RuntimeOptions, export_model
from trio_deploy.bench.environment import load_average, machine, machine_text
from trio_deploy.bench.synthetic import Size, write_checkpoint
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.pipeline.grammar import Grammar, GrammarCompiler, Structure
from trio_deploy.pipeline.sampling import Sampler
from trio_deploy.runtimes.machine import usable_cores

FIELDS = {
    "color": {"type": "string", "maxLength": 40},
    "count": {"type": "integer"},
    "kind": {"enum": ["circle", "square", "star"]},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
}
SCHEMA = {
    "type": "object",
    "properties": FIELDS,
    "required": list(FIELDS),
    "additionalProperties": False,
}
FORMS = {
    "a schema of four fields": Structure(schema=json.dumps(SCHEMA)),
    "any JSON": Structure(schema="{}"),
    "one of 20 texts": Structure(choices=tuple(f"the answer {number}" for number in range(20))),
    "the expression `[a-z ]{1,200}`": Structure(regex="[a-z ]{1,200}"),
}
ROWS = (1, 16)
STEPS = 40
END = 0  # the id of the token that ends an answer, whatever else it is


def grammar_ms(compiler: GrammarCompiler, form: Structure, rows: int, width: int) -> float:
    """What the grammars of so many rows cost per step, milliseconds of processor time."""
    generator, costs = np.random.default_rng(0), []
    options = SamplingOptions(temperature=0.0)
    free = Sampler(options)
    while len(costs) < STEPS:
        formed = [Sampler(options, (), (END,), compiler.grammar(form)) for _ in range(rows)]
        tokens = [-1]
        while END not in tokens and len(costs) < STEPS:
            logits = generator.standard_normal((rows, width), np.float32)
            start = time.process_time()
            for row in logits:
                free(row)
            between = time.process_time()
            tokens = [sampler(row) for sampler, row in zip(formed, logits, strict=True)]
            costs.append(1e3 * (time.process_time() - between - (between - start)))
    return statistics.mean(costs)


def masks_ms(compiler: GrammarCompiler, form: Structure, width: int) -> list[float]:
    """The masks of the most rows, one after the other and together, milliseconds of time."""
    generator, executor = np.random.default_rng(0), LLExecutor(usable_cores())
    words = -(-width // 32)
    masks = np.empty((ROWS[-1], words), np.int32)

    def in_turn(matchers: Sequence[object]) -> None:
        for matcher in matchers:
            matcher.compute_bitmask()  # type: ignore[attr-defined]

    def together(matchers: Sequence[object]) -> None:
        numbered = [(matcher, row) for row, matcher in enumerate(matchers)]
        executor.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, 4 * words, len(masks))  # type: ignore[arg-type]

    ways: list[Callable[[Sequence[object]], None]] = [in_turn, together]
    spent: list[list[float]] = [[], []]
    while len(spent[0]) < STEPS:
        grammars = [compiler.grammar(form) for _ in masks]
        tokens = [-1]
        while END not in tokens and len(spent[0]) < STEPS:
            for way in (0, 1) if len(spent[0]) % 2 else (1, 0):
                matchers = [matcher_of(grammar).deep_copy() for grammar in grammars]
                start = time.perf_counter()
                ways[way](matchers)
                spent[way].append(1e3 * (time.perf_counter() - start))
            logits = generator.standard_normal((len(masks), width), np.float32)
            pairs = list(zip(grammars, logits, strict=True))
            tokens = [int(np.argmax(grammar.mask(row))) for grammar, row in pairs]
            for grammar, token in zip(grammars, tokens, strict=True):
                if token != END:
                    grammar.take(token)
    return [statistics.mean(each) for each in spent]


def matcher_of(grammar: Grammar):
    """What llguidance has of a grammar."""
    return grammar._matcher


def step_ms(pipeline: Pipeline, rows: int, clock: Callable[[], float]) -> float:
    """A decode step of so many rows, milliseconds of a clock."""

    def spent(tokens: int) -> float:
        requests = [Request("what is it ?", max_new_tokens=tokens, min_new_tokens=tokens)] * rows
        start = clock()
        pipeline.generate_batch(requests)
        return clock() - start

    spent(2)
    return 1e3 * statistics.median((spent(14) - spent(2)) / 12 for _ in range(3))


def decode_steps(size: Size, quantize: str) -> list[tuple[float, float]]:
    """Decode steps by rows: milliseconds of processor time, and of time."""
    with tempfile.TemporaryDirectory() as scratch:
        source = write_checkpoint(Path(scratch) / size.name, size.config(), progress=False)
        bundle = export_model(source, Path(scratch) / "bundle", quantize=quantize, progress=False)
        pipeline = Pipeline.open(bundle, RuntimeOptions(threads=usable_cores()))
        return [
            (step_ms(pipeline, rows, time.process_time), step_ms(pipeline, rows, time.perf_counter))
            for rows in ROWS
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--vocabulary", type=int, default=151936, help="logits per row")
    parser.add_argument(
        "--size", default="d=896,layers=24,heads=14,mlp=4864,image=56", help="of the model"
    )
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"], help="its weights")
    parser.add_argument("--out", type=Path, help="folder for mask.md")
    args = parser.parse_args()
    before = load_average()
    text = args.tokenizer.read_text(encoding="utf-8")
    compiler = GrammarCompiler(lambda: text, args.vocabulary, [END])
    size = Size.parse(f"{args.size},vocab={args.vocabulary}")
    steps = {name: decode_steps(size, name) for name in args.quantize}
    lines = [
        "# Structured output per step\n",
        f"Command: `python scripts/mask_cost.py --tokenizer {args.tokenizer.name} "
        f"--vocabulary {args.vocabulary} --size {args.size} "
        f"--quantize {' '.join(args.quantize)}`.\n",
        f"Machine: {machine_text(machine(None), before, load_average())}\n",
        "Decode steps of a model with random weights, milliseconds of processor time (of time):\n",
        "| weights | " + " | ".join(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS) + " |",
        "|---" * (1 + len(ROWS)) + "|",
    ]
    for name, found in steps.items():
        lines.append(f"| {name} | " + " | ".join(f"{cpu:.0f} ({t:.0f})" for cpu, t in found) + " |")
    shares = " | ".join(f"share of a step, {name}" for name in steps)
    lines += [
        "\nWhat grammars cost per step, milliseconds of processor time, and which share of a step "
        f"that is; milliseconds of time that the masks of {ROWS[-1]} rows take one after the "
        "other, and together on all cores:\n",
        f"| form | rows | grammars | {shares} | masks in turn, together |",
        "|---" * (4 + len(steps)) + "|",
    ]
    for name, form in FORMS.items():
        masks = "{:.1f}, {:.1f}".format(*masks_ms(compiler, form, args.vocabulary))
        for row, rows in enumerate(ROWS):
            cost = grammar_ms(compiler, form, rows, args.vocabulary)
            parts = " | ".join(f"{cost / found[row][0]:.1%}" for found in steps.values())
            last = masks if rows == ROWS[-1] else ""
            lines.append(f"| {name} | {rows} | {cost:.1f} | {parts} | {last} |")
    report = "\n".join(lines) + "\n"
    print(report)
    if args.out:
        (args.out / "mask.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
