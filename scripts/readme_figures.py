"""Update picture and tables of README.md and examples/README.md, none of which are written by hand.

    python scripts/readme_figures.py

Exports the tiny model, asks two questions about examples/scene.png and draws what each kept into
docs/kept.png, asks every question of examples/README.md at several budgets and marks there what
was answered wrongly, and copies the measured table from docs/measurements/core.md
(scripts/bench_core.py writes it).
"""

from __future__ import annotations

import argparse
import re
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

from trio_deploy import Pipeline, Request, Schedule, export_model
from trio_deploy.evaluation import scenes
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.pipeline.draw import draw_questions

ROOT = Path(__file__).parent.parent
EXAMPLES = {  # of examples/README.md: picture → seed and family of its scene
    "scene": (2000039, "busy"),
    "scene-2": (2000011, "busy"),
    "scene-smooth": (2000007, "smooth"),
}
HERO = Schedule.parse("0:0.19:divprune,8:0.03")  # a last point tight enough to show a difference
QUESTIONS = ("what color is the circle?", "what digit is on the red square?")
PAIRED_SCENES = 50
BUDGETS = (0.111, 0.222, 0.333, 0.5, 1.0)
COLUMNS = 4  # what, ours, against, figure; the targets stay in the full table


def picture(folder: Path) -> str:
    """Draw docs/kept.png: one scene, two questions, and what pruning kept for each.

    Returns Markdown that shows it, with the overlap of the two sets and that of other scenes.
    """
    bundle = export_model("tiny", folder / "hero", schedule=HERO, progress=False)
    pipeline = Pipeline.open(bundle)
    image = ROOT / "examples" / "scene.png"
    answers = [pipeline.generate(Request(question, [image])) for question in QUESTIONS]
    texts = [answer.text.strip() for answer in answers]
    captions = [f"{q} {text}" for q, text in zip(QUESTIONS, texts, strict=True)]
    draw_questions(captions, answers).save(ROOT / "docs" / "kept.png")
    one, other = (set(answer.kept_visual[-1].tolist()) for answer in answers)
    pairs, overlap = shared_tokens(pipeline, PAIRED_SCENES)
    _, recipe = shared_tokens(
        Pipeline.open(export_model("tiny", folder / "recipe", progress=False)), PAIRED_SCENES
    )
    visual = len(answers[0].visual)
    share = HERO.average(visual, bundle.config.text.num_layers) / visual
    return (
        f"![visual tokens kept for two questions about one picture](docs/kept.png)\n\n"
        f"One picture, two questions, and the last {len(one)} of {visual} visual tokens that the "
        f"shipped tiny model keeps for each: {len(one & other)} of them are the same. That is no "
        f"lucky pick: over the {pairs:,} pairs of questions about {PAIRED_SCENES} held-out scenes "
        f"a median of {overlap:.0%} is shared. The schedule, `{HERO}` ({share:.1%} of the visual "
        f"tokens on average), goes by diversity before layer 0, where no question has been read, "
        f"and by TRIO before layer 8. The default recipe keeps more there: {recipe:.0%} is "
        "shared.\n"
    )


def shared_tokens(pipeline: Pipeline, scene_count: int) -> tuple[int, float]:
    """Compare what two questions about one held-out scene keep, for all pairs of its questions.

    Returns:
        The number of pairs, and the median share of a question's tokens, as the last pruning point
        leaves them, that the other one keeps too.
    """
    asked: dict[str, list[Request]] = {}
    for question in scene_questions(scene_count):
        request = Request(question.prompt, list(question.images), max_new_tokens=1)
        asked.setdefault(question.picture, []).append(request)
    shares = []
    for requests in asked.values():
        answers = pipeline.generate_batch(requests)
        kept = [set(answer.kept_visual[-1].tolist()) for answer in answers]
        shares += [len(one & other) / len(one) for one, other in combinations(kept, 2)]
    return len(shares), float(np.median(shares))


def example_answers(folder: Path, budget: float) -> dict[str, list[tuple[str, str, str]]]:
    """(question, true answer, the tiny model's answer at a budget) for each example picture.

    A bundle is exported in `folder`.
    """
    bundle = export_model("tiny", folder / f"{budget:g}", budget=budget, progress=False)
    pipeline = Pipeline.open(bundle)
    found = {}
    for name, (seed, family) in EXAMPLES.items():
        scene = scenes.generate(seed, family)
        requests = [Request(question.text, [scene.image]) for question in scene.questions]
        answers = pipeline.generate_batch(requests)
        found[name] = [
            (question.text, question.answer, answer.text.strip())
            for question, answer in zip(scene.questions, answers, strict=True)
        ]
    return found


def accuracy(answered: dict[float, dict[str, list[tuple[str, str, str]]]]) -> str:
    """Table of the right answers to the questions of examples/README.md, per budget."""
    head = "| budget | " + " | ".join(f"{budget:.1%}" for budget in answered) + " |"
    cells = []
    for by_picture in answered.values():
        lines = [line for lines in by_picture.values() for line in lines]
        right = sum(answer == truth for _, truth, answer in lines)
        cells.append(f"{right} of {len(lines)}")
    return f"{head}\n|---|{'---|' * len(cells)}\n| right | " + " | ".join(cells) + " |\n"


def example_table(lines: list[tuple[str, str, str]], budget: float) -> str:
    """Table of one picture's questions; a wrong answer is shown beside the true one."""
    rows = [f"| question | true answer | the model's at {budget:.1%} |", "|---|---|---|"]
    for question, truth, answer in sorted(lines):
        said = "right" if answer == truth else f"**wrong**: {answer}"
        rows.append(f"| {question} | {truth} | {said} |")
    return "\n".join([*rows, ""])


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
    parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        text = replace(text, "picture", picture(Path(folder)))
        answered = {budget: example_answers(Path(folder), budget) for budget in BUDGETS}
    text = replace(text, "accuracy", accuracy(answered))
    examples = ROOT / "examples" / "README.md"
    page = examples.read_text(encoding="utf-8")
    for name, lines in answered[BUDGETS[0]].items():
        page = replace(page, name, example_table(lines, BUDGETS[0]))
    examples.write_text(page, encoding="utf-8")
    measured = ROOT / "docs" / "measurements" / "core.md"
    if measured.is_file():
        text = replace(text, "table", table(measured))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
