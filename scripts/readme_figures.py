"""Update the picture and tables of the README, none of which are written by hand.

    python scripts/readme_figures.py

Exports the tiny model, asks about examples/scene.png, draws the kept tokens into docs/kept.png,
asks every question of examples/README.md at several budgets, and copies the
measured table from docs/measurements/core.md (scripts/bench_core.py writes it).
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from trio_deploy import Pipeline, Request, export_model
from trio_deploy.cli.run import save_kept
from trio_deploy.evaluation import scenes

ROOT = Path(__file__).parent.parent
EXAMPLES = ((2000039, "busy"), (2000011, "busy"), (2000007, "smooth"))  # as examples/README.md
BUDGETS = (0.111, 0.222, 0.333, 0.5, 1.0)
COLUMNS = 4  # what, ours, against, figure; the targets stay in the full table


def picture(pipeline: Pipeline, question: str, budget: float) -> str:
    """Answer about the example scene in the bundle's own schedule, draw docs/kept.png.

    Returns Markdown that shows both.
    """
    image = ROOT / "examples" / "scene.png"
    answer = pipeline.generate(Request(question, [image]))
    save_kept(answer, ROOT / "docs" / "kept.png")
    counts = ", ".join(str(count) for count in answer.keep_counts)
    return (
        f"![visual tokens kept at each pruning point](docs/kept.png)\n\n"
        f"“{question}” “{answer.text.strip()}”: the shipped tiny model at a budget of "
        f"{budget:.1%}, {answer.visual_tokens} visual tokens pruned to {counts}.\n"
    )


def accuracy(folder: Path, budgets: tuple[float, ...]) -> str:
    """Right answers of the tiny model to the questions of examples/README.md, per budget.

    A bundle is exported per budget, in `folder`.
    """
    asked = [
        (question, scene.image)
        for scene in (scenes.generate(seed, family) for seed, family in EXAMPLES)
        for question in scene.questions
    ]
    cells = []
    for budget in budgets:
        bundle = export_model("tiny", folder / f"{budget:g}", budget=budget, progress=False)
        answers = Pipeline.open(bundle).generate_batch(
            [Request(question.text, [image]) for question, image in asked]
        )
        right = sum(a.text.strip() == q.answer for a, (q, _) in zip(answers, asked, strict=True))
        cells.append(f"{right} of {len(asked)}")
    head = "| budget | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " |"
    return f"{head}\n|---|{'---|' * len(budgets)}\n| right | " + " | ".join(cells) + " |\n"


def table(measured: Path) -> str:
    """The first columns of core.md's table, and its machine and model."""
    lines = measured.read_text(encoding="utf-8").splitlines()
    rows = [
        "|".join(line.split("|")[: COLUMNS + 1]) + "|" for line in lines if line.startswith("|")
    ]
    about = [line for line in lines if line.startswith(("Machine:", "Model:"))]
    link = "[docs/measurements/core.md](docs/measurements/core.md)"
    return "\n".join([*rows, "", *about, f"All figures: {link}.", ""])


def replace(text: str, name: str, content: str) -> str:
    """Replace the text between the markers of this name by `content`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"the page lacks the markers {begin} and {end}: add them")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}{end}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--question", default="what color is the circle?")
    parser.add_argument("--budget", type=float, default=0.111)
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_model("tiny", Path(folder) / "bundle", budget=args.budget, progress=False)
        pipeline = Pipeline.open(bundle)
        text = replace(text, "picture", picture(pipeline, args.question, args.budget))
        text = replace(text, "accuracy", accuracy(Path(folder), BUDGETS))
    measured = ROOT / "docs" / "measurements" / "core.md"
    if measured.is_file():
        text = replace(text, "table", table(measured))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
