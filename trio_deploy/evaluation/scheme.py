"""What quantised weights cost: kept tokens and answers beside those of the float weights.

Whether graphs compute what their weights say is another question, which `trio check` answers; here
both sides are asked the same questions at the same schedules, and what differs is the scheme's. Its
bars are those that a scheme is offered with (docs/quantisation.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from trio_deploy.evaluation.ask import Measured
from trio_deploy.evaluation.configurations import UNPRUNED
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.statistics import Bootstrap, Estimate, EstimateForm, points_text
from trio_deploy.files import convert
from trio_deploy.pipeline.ran_as import RanAs

ENOUGH = 640
"""Questions from which on a scheme is judged; of fewer the figures alone are shown."""


@dataclass(frozen=True)
class Bars:
    """What a scheme has to reach at each configuration.

    Attributes:
        overlap: share of the float weights' kept visual tokens that are kept, at each point.
        agreement: share of answers that are the float weights', word for word.
        lost: most accuracy that may be lost, as a share of the questions; None: no bar.
    """

    overlap: float
    agreement: float
    lost: float | None = None

    def __str__(self) -> str:
        lost = ""
        if self.lost is not None:
            points = 100 * self.lost
            lost = f", at most {points:g} point{'s' * (points != 1)} of accuracy lost"
        return (
            f"{self.overlap:.0%} of the kept tokens at each pruning point, {self.agreement:.0%} of "
            f"the answers{lost}"
        )


BARS = {
    "int8": Bars(0.98, 0.99),
    "int4": Bars(0.95, 0.98, 0.01),
    "int4-g32": Bars(0.95, 0.98, 0.01),
}
"""By scheme; one that is not here is shown and not judged."""


@dataclass(frozen=True)
class SchemeRow:
    """One configuration with quantised weights beside the same with float weights.

    Attributes:
        name, share: as of `Result`.
        overlap: at each pruning point, mean share of the float weights' kept visual tokens of a
            question that are kept too; None where none keep any, as of questions without pictures.
        agreement: share of answers that are the float weights'.
        accuracy: of the float weights; None if no question has a reference.
        gained: accuracy minus that of the float weights, with its paired interval.
        problems: what misses a bar; empty where nothing was judged.
    """

    name: str
    share: float
    overlap: tuple[Estimate | None, ...]
    agreement: Estimate
    accuracy: Estimate | None
    gained: Estimate | None
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "share": self.share,
            "overlap": [each and each.to_json() for each in self.overlap],
            "agreement": self.agreement.to_json(),
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "gained": self.gained and self.gained.to_json(),
            "problems": list(self.problems),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SchemeRow:
        """From what `to_json` returns, checked before."""
        accuracy, gained = (
            Estimate.from_json(raw[key]) if raw[key] else None for key in ("accuracy", "gained")
        )
        return cls(
            raw["name"],
            raw["share"],
            tuple(each and Estimate.from_json(each) for each in raw["overlap"]),
            Estimate.from_json(raw["agreement"]),
            accuracy,
            gained,
            tuple(raw["problems"]),
        )


@dataclass(frozen=True)
class SchemeResults:
    """What a scheme costs.

    Attributes:
        scheme: its name.
        against: the float bundle or model.
        judged: whether there are bars for the scheme, and questions enough.
        rows: per configuration, the unpruned one first.
        ran_as: how the engines ran that answered with float weights.
    """

    scheme: str
    against: str
    judged: bool
    rows: tuple[SchemeRow, ...]
    ran_as: RanAs | None = None

    @property
    def passed(self) -> bool:
        """Whether no configuration misses a bar."""
        return not any(row.problems for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence: whether the scheme is good enough, by which bars."""
        if self.scheme not in BARS:
            return f"There are no bars for {self.scheme}: nothing was judged."
        bars = f"{self.scheme} asks for at least {BARS[self.scheme]}"
        if not self.judged:
            return f"{bars}; not judged, which takes {ENOUGH} questions or more."
        if self.passed:
            return f"{bars}: met by every configuration."
        missed = sum(bool(row.problems) for row in self.rows)
        return (
            f"{bars}: missed by {missed} of {len(self.rows)} configurations. A wider scheme keeps "
            "more of the same tokens."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "scheme": self.scheme,
            "against": self.against,
            "judged": self.judged,
            "passed": self.passed,
            "rows": [row.to_json() for row in self.rows],
            "ran_as": self.ran_as and self.ran_as.to_json(),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SchemeResults:
        """From what `to_json` returns, checked before."""
        rows = tuple(map(SchemeRow.from_json, raw["rows"]))
        ran_as = convert(raw["ran_as"], RanAs) if raw["ran_as"] else None
        return cls(raw["scheme"], raw["against"], raw["judged"], rows, ran_as)


class _RowForm(msgspec.Struct):
    """The form of a `SchemeRow` in results.json."""

    name: str
    share: float
    overlap: list[EstimateForm | None]
    agreement: EstimateForm
    accuracy: EstimateForm | None
    gained: EstimateForm | None
    problems: list[str]


class SchemeForm(msgspec.Struct):
    """The form of `SchemeResults` in results.json."""

    scheme: str
    against: str
    judged: bool
    passed: bool
    rows: list[_RowForm]
    ran_as: RanAs | None


def compare_schemes(
    quantised: Sequence[Measured],
    floats: Sequence[Measured],
    shares: Sequence[float],
    questions: Sequence[Question],
    *,
    scheme: str,
    against: str,
) -> SchemeResults:
    """Compare the answers of the same configurations with quantised and with float weights.

    Args:
        shares: visual tokens of each configuration per layer, as a share of all.
    """
    bootstrap = Bootstrap([question.picture for question in questions])
    known = np.array([question.reference is not None for question in questions])
    scored = bool(known.any())
    bars = BARS.get(scheme)
    judged = bars is not None and len(questions) >= ENOUGH
    rows = []
    for mine, theirs, share in zip(quantised, floats, shares, strict=True):
        same = np.mean(
            [
                [a.text.strip() == b.text.strip() for a, b in zip(ours, others, strict=True)]
                for ours, others in zip(mine.answers, theirs.answers, strict=True)
            ],
            axis=0,
        )
        row = SchemeRow(
            mine.configuration.name,
            share,
            ()
            if mine.configuration.name == UNPRUNED
            else tuple(
                bootstrap.mean(kept, some) if (some := ~np.isnan(kept)).any() else None
                for kept in _overlap(mine, theirs)
            ),
            bootstrap.mean(same),
            bootstrap.mean(theirs.scores(), known) if scored else None,
            bootstrap.difference(mine.scores(), theirs.scores(), np.ones(len(known)), known)
            if scored
            else None,
        )
        if bars is not None and judged:
            row = replace(row, problems=_missed(row, bars))
        rows.append(row)
    return SchemeResults(scheme, against, judged, tuple(rows), floats[0].ran_as)


def _overlap(mine: Measured, theirs: Measured) -> np.ndarray:
    """Share of `theirs` kept tokens that `mine` keeps: [points, questions], NaN where none are."""
    runs = []
    for ours, others in zip(mine.answers, theirs.answers, strict=True):
        shares = [
            [
                len(np.intersect1d(kept, wanted)) / len(wanted) if len(wanted) else math.nan
                for kept, wanted in zip(a.kept, b.kept, strict=True)
            ]
            for a, b in zip(ours, others, strict=True)
        ]
        runs.append(np.array(shares).T)
    return np.mean(runs, axis=0)


def _missed(row: SchemeRow, bars: Bars) -> tuple[str, ...]:
    """What misses a bar, a phrase each."""
    problems = [
        f"{each.value:.1%} of the kept tokens agree at point {number}, below {bars.overlap:.0%}"
        for number, each in enumerate(row.overlap, 1)
        if each is not None and each.value < bars.overlap
    ]
    if row.agreement.value < bars.agreement:
        problems.append(f"{row.agreement.value:.1%} of the answers, below {bars.agreement:.0%}")
    if bars.lost is not None and row.gained is not None and row.gained.value < -bars.lost:
        problems.append(
            f"{-100 * row.gained.value:.1f} points of accuracy lost, above {100 * bars.lost:g}"
        )
    return tuple(problems)


def table_of(results: SchemeResults) -> list[str]:
    """Lines of a table in Markdown, the verdict behind it."""
    lines = [
        f"Weights in {results.scheme} beside the float ones of {results.against}:",
        "",
        "| configuration | tokens | kept tokens that agree, by pruning point | "
        "answers that agree | accuracy of floats | difference |  |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results.rows:
        state = "; ".join(row.problems) or ("met" if results.judged else "")
        lines.append(
            f"| {row.name} | {row.share:.1%} | {overlap_text(row)} | {row.agreement.value:.1%} | "
            f"{'' if row.accuracy is None else f'{row.accuracy.value:.1%}'} | "
            f"{points_text(row.gained)} | {state} |"
        )
    ran = [] if results.ran_as is None else ["", f"The floats ran as {results.ran_as}."]
    return [
        *lines,
        "",
        f"Is the scheme good enough? {results.verdict} Whether its graphs are right is another",
        "question, which `trio check` answers.",
        *ran,
    ]


def overlap_text(row: SchemeRow) -> str:
    """The shares at each point; a dash where nothing was kept."""
    return ", ".join("–" if one is None else f"{one.value:.1%}" for one in row.overlap)
