"""The table of a check, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.verify.compare import ParityRow


@dataclass(frozen=True)
class Report:
    """The table of a check.

    Attributes:
        title: what was compared with what.
        rows: one per stage, then one per generated answer.
        ran_as: how the engines ran.
    """

    title: str
    rows: list[ParityRow]
    ran_as: RanAs | None = None

    @property
    def passed(self) -> bool:
        """Whether every row is within tolerance."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a difference that is not finite becomes null."""
        rows = [asdict(row) | {"passed": row.passed} for row in self.rows]
        for row in rows:
            for key in ("max_abs", "max_rel"):
                row[key] = row[key] if np.isfinite(row[key]) else None
        ran_as = self.ran_as and self.ran_as.to_json()
        return {"title": self.title, "ran_as": ran_as, "passed": self.passed, "rows": rows}


def format_report(report: Report) -> str:
    """The table as text."""
    head = ("stage", "max abs", "max rel", "worst output", "kept", "in doubt", "tokens", "")
    lines = [head]
    for row in report.rows:
        lines.append(
            (
                row.stage,
                f"{row.max_abs:.1e}",
                f"{row.max_rel:.1e}",
                row.worst or "-",
                "-" if row.overlap is None else f"{row.overlap:.1%}",
                "-" if row.excluded is None else f"{row.excluded:.1%}",
                {None: "-", True: "equal", False: "differ"}[row.tokens_equal],
                "ok" if row.passed else f"BEYOND TOLERANCE: {row.problem}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    failed = sum(not row.passed for row in report.rows)
    verdict = (
        f"{failed} of {len(report.rows)} rows beyond tolerance"
        if failed
        else "all within tolerance"
    )
    tolerated = any(row.passed and row.tokens_equal is False for row in report.rows)
    return "\n".join(
        [
            report.title,
            *([f"ran as {report.ran_as}"] if report.ran_as else []),
            "",
            *table,
            "",
            f"{verdict}; kept: share of the reference's "
            "kept visual tokens, in doubt: share whose rank lies within the error"
            + (
                "; tokens: answers may differ, only float32 requires equal ones"
                if tolerated
                else ""
            ),
        ]
    )
