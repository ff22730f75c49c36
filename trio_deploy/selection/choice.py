"""What a method's graph decides at a pruning point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = Any
"""A value of a graph (onnx_ir.Value): methods do not import ONNX."""


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, and the scores they were chosen by.

    Attributes:
        kept: bool [B,S], visual tokens that stay.
        score: f32 [B,S], the scores to report, 0 where not visual.
        finite: f32 [B,S], the scores that must be finite for the row to be used.
        converged: bool [B], whether an iteration reached its end; None if there is none.
        merge: (op, keep_index [B,W]) → hidden states after the pruning point, [B,W,d], of which
            those behind a row's end are ignored; None: those of the tokens kept.
    """

    kept: Value
    score: Value
    finite: Value
    converged: Value | None = None
    merge: Callable[[Any, Value], Value] | None = None
