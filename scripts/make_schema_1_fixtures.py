"""Write tests/fixtures/schema_1/: bundles, a Triton repository and answers of one old commit.

This ran at commit 29d6dd7, before bundles had schema 2, and runs only in a checkout of that commit
(to which this file was added). tests/test_schema_1.py checks that later code opens the fixtures.

    bundle_ort/          float32, `ort` dialect, two pruning points, with golden tensors
    bundle_primitive/    float32, `primitive` dialect, shared decode, pruned before layer 0, too
    triton_repository/   written by `trio triton` from bundle_ort, before the golden tensors
    answers.json         requests as arguments of `trio run` and `trio eval`, with their answers

The two bundles are of a tiny random LLaVA-NeXT checkpoint. Commands run in a temporary folder and
get relative paths, so that no file names a place on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "fixtures" / "schema_1"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

#: Picture → questions; the first two of each are also asked at the other budgets.
QUESTIONS = {
    "scene.png": (
        "what color is the circle?",
        "what digit is on the blue square?",
        "what shape is orange?",
        "how many triangles are there?",
        "what is on the plate?",
        "is the red square left of the green star?",
    ),
    "scene-2.png": (
        "what is on the plate?",
        "what color is the heart?",
        "what shape is yellow?",
        "is there a white cross?",
        "how many squares are there?",
        "where is the red square?",
    ),
    "scene-smooth.png": (
        "where is the orange circle?",
        "what is on the plate?",
        "what color is the square?",
        "how many stars are there?",
        "is there a blue star?",
        "is the orange circle above the blue star?",
    ),
}
OTHER_BUDGETS = ("0.222", "1.0")
BUNDLES = ("bundle_ort", "bundle_primitive")
#: Picture, question, further options; asked of both bundles.
OF_BUNDLES = (
    ("scene.png", "what color is the circle ?", ()),
    ("scene-smooth.png", "how many digit can you read ?", ("--budget", "0.6")),
)
EVAL = ("--scenes", "2", "--budgets", "own,0.222", "--no-plot")


def main() -> None:
    """Make a checkpoint, export it, ask, and move everything to its place."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_checkpoint(folder / "checkpoint")
        _write_bundles(folder)
        answers = {
            "run": [_answered(folder, *request) for request in _requests()],
            "eval": {"options": EVAL, "answers": _evaluated(folder)},
        }
        _move(folder, answers)


def _write_checkpoint(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.checkpoints import make_llava_next

    make_llava_next(
        folder, hidden=32, heads=2, kv_heads=1, image_size=24, max_positions=256, seed=2
    )


def _write_bundles(folder: Path) -> None:
    common = ("export", "--model", "checkpoint", "--target", "cpu", "--dtype", "float32")
    _trio(folder, *common, "--out", "bundle_ort", "--schedule", "1:0.6:divprune,3:0.3")
    _trio(
        folder,
        *(*common, "--out", "bundle_primitive", "--dialect", "primitive"),
        *("--schedule", "0:0.6:cls-attention,2:0.3", "--positions", "original"),
        *("--probe", "shifted"),
    )
    _trio(folder, "triton", "bundle_ort", "--out", "triton_repository")
    _trio(folder, "check", "bundle_ort", "--record", "--checkpoint", "checkpoint")
    _trio(folder, "export", "--model", "tiny", "--out", "tiny")


def _requests() -> list[tuple[str, str, list[str]]]:
    """List model, picture and further arguments of `trio run`."""
    found: list[tuple[str, str, list[str]]] = []
    for picture, questions in QUESTIONS.items():
        found += [("tiny", picture, ["--prompt", question]) for question in questions]
        for budget in OTHER_BUDGETS:
            options = ["--budget", budget]
            found += [("tiny", picture, ["--prompt", q, *options]) for q in questions[:2]]
    for bundle in BUNDLES:
        for picture, question, more in OF_BUNDLES:
            options = ["--prompt", question, "--max-new-tokens", "12", *more]
            found.append((bundle, picture, options))
    return found


def _answered(folder: Path, model: str, picture: str, options: Sequence[str]) -> dict[str, Any]:
    image = ROOT / "examples" / picture
    said = json.loads(_trio(folder, "run", model, "--image", str(image), *options, "--json"))
    kept = ("text", "token_ids", "finish_reason", "visual_tokens", "keep_counts", "kept")
    answer = {key: said[key] for key in kept}
    return {"model": model, "image": picture, "options": options, "answer": answer}


def _evaluated(folder: Path) -> list[dict[str, str]]:
    """Return question → answer of each configuration, in no particular order."""
    _trio(folder, "eval", "tiny", "--out", "evaluated", *EVAL)
    found = []
    for file in sorted((folder / "evaluated" / "answers").iterdir()):
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found.append({line["id"]: line["text"] for line in lines})
    return found


def _trio(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "trio_deploy.cli", *arguments]
    print("trio", *arguments, file=sys.stderr)
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _move(folder: Path, answers: dict[str, Any]) -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for name in (*BUNDLES, "triton_repository"):
        shutil.copytree(folder / name, OUT / name)
    asked = ",\n".join(json.dumps(request) for request in answers["run"])
    text = f'{{"run": [\n{asked}\n],\n"eval": {json.dumps(answers["eval"])}}}\n'
    (OUT / "answers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
