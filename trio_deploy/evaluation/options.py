"""Options of `trio eval` and `trio tune`; imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path

SCENE_TOKENS = 8  # of an answer: the longest about a scene has 5
FILE_TOKENS = 128
BUDGETS = (0.111, 0.222, 0.333)
FIRST_SCENE = 10_000
"""Scenes of a split before this one are left out: model card, README and tests ask about them."""


def add_eval(command: argparse.ArgumentParser) -> None:
    """Options of `trio eval`."""
    command.add_argument("model", help="folder of a bundle, or what `trio export --model` takes")
    command.add_argument("--out", type=Path, required=True, help="folder for answers and results")
    command.add_argument(
        "--budgets",
        help="shares of visual tokens, comma-separated, and `own` for a bundle's own schedule "
        "(default: 0.111,0.222,0.333, of a bundle own,0.111,0.222,0.333)",
    )
    command.add_argument(
        "--methods",
        help="comma-separated: recipe (the recipe's schedules), trio, divprune, … in the "
        "published schedule's shape, METHOD@LAYER+LAYER, or METHOD@recipe for the recipe's layers "
        "and keeps (default: recipe; a bundle has its own)",
    )
    command.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="[NAME=]LAYER:KEEP:METHOD,…",
        help="measure this schedule; may be repeated, and comes before the methods",
    )
    command.add_argument("--threshold", help="cosines τ to compare, comma-separated")
    command.add_argument("--probe", help="last, shifted or both: last,shifted")
    command.add_argument("--positions", help="renumber, original or both")
    command.add_argument(
        "--seeds", type=int, default=1, help="runs of a random selection to average (default: 1)"
    )
    command.add_argument("--blind", action="store_true", help="also ask without the picture")
    command.add_argument("--no-plot", action="store_true", help="write no picture")
    _add_questions(command, split="test", scenes=64)
    command.add_argument(
        "--annotations", type=Path, help="of --questions: the benchmark's own file"
    )
    command.add_argument(
        "--scorer",
        default="exact",
        help="of --questions: exact, pope, scienceqa, textvqa or vqav2 (default: exact)",
    )
    _add_running(command)
    command.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_tune(command: argparse.ArgumentParser) -> None:
    """Options of `trio tune`."""
    command.add_argument("model", help="what `trio export --model` takes")
    command.add_argument(
        "--out", type=Path, required=True, help="folder for the search and its result"
    )
    command.add_argument(
        "--budget", type=float, help="average share of visual tokens a layer sees (default: 0.111)"
    )
    command.add_argument(
        "--methods", default="trio,divprune", help="to choose from (default: trio,divprune)"
    )
    command.add_argument("--points", type=int, default=3, help="pruning points at most, 1 to 3")
    command.add_argument("--threshold", help="cosines τ to begin with (default: 0.8)")
    command.add_argument("--probe", help="last, shifted or both: last,shifted")
    command.add_argument("--positions", help="renumber, original or both")
    command.add_argument("--candidates", type=int, help="schedules to begin with at most")
    command.add_argument(
        "--start", action="append", default=[], metavar="SCHEDULE", help="begin with this one too"
    )
    _add_questions(command, split="tuning", scenes=40)
    command.set_defaults(scorer="exact", annotations=None)
    _add_running(command)


def _add_questions(command: argparse.ArgumentParser, split: str, scenes: int) -> None:
    # Not argparse's defaults, so that an option given beside a question file is noticed.
    command.set_defaults(
        scene_defaults={"scenes": scenes, "family": "busy", "split": split, "first": FIRST_SCENE}
    )
    command.add_argument(
        "--scenes", type=int, help=f"generated pictures, 16 questions each (default: {scenes})"
    )
    command.add_argument("--family", help="of scenes: busy (default) or smooth")
    command.add_argument("--split", help=f"of scenes: test or tuning (default: {split})")
    command.add_argument(
        "--first", type=int, help=f"first scene of the split (default: {FIRST_SCENE})"
    )
    command.add_argument(
        "--questions", type=Path, metavar="JSONL", help="questions of your own instead of scenes"
    )
    command.add_argument("--images", type=Path, help="folder of the questions' pictures")
    command.add_argument("--append", default="", help="a line added to every question")
    command.add_argument("--limit", type=int, help="take the first so many questions")


def _add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=int, default=16, help="requests at a time (default: 16)")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"default: {FILE_TOKENS}, of scenes {SCENE_TOKENS}",
    )
    command.add_argument("--target", default="cpu", help="target name or file (default: cpu)")
    command.add_argument("--dtype", help="of exported bundles (default: the target's)")
    command.add_argument("--runtime", help="onnxruntime or openvino (default: by the target)")
    command.add_argument("--provider", help="of ONNX Runtime: cpu or cuda (default: by the target)")
    command.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")
