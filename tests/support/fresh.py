"""A bundle in a process of its own, in which nothing has run before.

What an engine reads from memory that is no longer its own may be right by chance where the same
process has run another engine before; a new process has no such luck.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.waiting import WAIT_S
from trio_deploy import Bundle
from trio_deploy.verify.golden import Reference, load

_CHILD = """
import json, sys
from trio_deploy import Bundle, Pipeline, Request, check
from trio_deploy.verify.golden import load
options = json.loads(sys.argv[2])
rows = check(sys.argv[1], golden=True, **options).to_json()["rows"]
pipeline = Pipeline.open(sys.argv[1], **options)
examples = load(Bundle.load(sys.argv[1])).examples
asked = [Request(each.prompt, each.pictures, max_new_tokens=1) for each in examples]
answers = pipeline.generate_batch(asked)
kept = [[tokens.tolist() for tokens in answer.kept] for answer in answers]
visual = [answer.visual.tolist() for answer in answers]
print(json.dumps({"rows": rows, "kept": kept, "visual": visual}))
"""


@dataclass(frozen=True)
class Fresh:
    """What a new process found.

    Attributes:
        problems: what is beyond the check's tolerances, by stage.
        selections: share of the reference's kept visual tokens that each selection keeps, given
            the reference's inputs.
        end_to_end: the same at each pruning point of a whole prefill.
    """

    problems: dict[str, str]
    selections: dict[str, float]
    end_to_end: list[float]


def check_in_new_process(bundle: Path, **options: object) -> Fresh:
    """Compare a bundle with the reference stored in it, and its kept tokens end to end."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, str(bundle), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=10 * WAIT_S,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    return Fresh(
        problems={row["stage"]: row["problem"] for row in found["rows"] if row["problem"]},
        selections={
            row["stage"]: row["overlap"] for row in found["rows"] if row["overlap"] is not None
        },
        end_to_end=_end_to_end(load(Bundle.load(bundle)), found["kept"], found["visual"]),
    )


def _end_to_end(
    reference: Reference, kept: list[list[list[int]]], visual: list[list[int]]
) -> list[float]:
    """Share of the reference's kept visual tokens that were kept, at each pruning point."""
    selections = [stage for name, stage in reference.stages.items() if name.startswith("select")]
    agreeing, total = np.zeros(len(selections), int), np.zeros(len(selections), int)
    for row, (mine, own) in enumerate(zip(kept, visual, strict=True)):
        theirs = None
        for point, stage in enumerate(selections):
            index = stage.outputs["keep_index"][row]
            index = index[index >= 0]
            theirs = index if theirs is None else theirs[index]
            meant = set(theirs.tolist()) & set(own)
            agreeing[point] += len(meant & set(mine[point]))
            total[point] += len(meant)
    return (agreeing / total).tolist()
