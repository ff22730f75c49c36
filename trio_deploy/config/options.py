"""What callers choose: how a bundle is run, how it is exported, how its selections work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trio_deploy.config.target import SELECTIONS, TABLES, Target
from trio_deploy.errors import TrioError
from trio_deploy.schedule.budget import check_budget
from trio_deploy.schedule.schedule import Schedule

DEFAULT_THRESHOLD = 0.8
"""τ: the cosine similarity at which a kept token suppresses another, where nobody says one."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a bundle is run; None takes what its target says.

    Attributes:
        runtime: name of the runtime, such as `onnxruntime`.
        target: name or file of a target, or the target itself; None: the one the bundle was
            exported for.
        provider: execution provider of ONNX Runtime, `cpu` or `cuda`.
        precision: float type that OpenVINO computes in, `float32` or `bfloat16`.
        threads: CPU threads per operator; None: the runtime's choice, within the cores that the
            process may use.
        low_memory: keep weights in the page cache alone (ONNX Runtime; slower decode).
    """

    runtime: str | None = None
    target: str | Path | Target | None = None
    provider: str | None = None
    precision: str | None = None
    threads: int | None = None
    low_memory: bool = False


@dataclass(frozen=True)
class SelectionOptions:
    """How selections work; None takes the recipe's value.

    Attributes:
        probe: position of the probe tokens: `last`, they end at the last valid token, or `shifted`,
            one before it.
        positions: position ids after pruning: `renumber` or `original`; None, if the recipe says
            nothing either: what the family prefers.
        threshold: cosine similarity at which a kept token suppresses another, in (0, 1].
    """

    probe: str | None = None
    positions: str | None = None
    threshold: float | None = None


class Calibration(msgspec.Struct, frozen=True):
    """What was measured of activations, by which graphs round them.

    Attributes:
        source: name of the file of questions, or what else was asked.
        questions: number of those asked.
        greatest: the greatest magnitude of what each matrix of the decoder layers is multiplied by,
            by canonical name. Scales are a 448th of it, the greatest number of E4M3.
    """

    source: str
    questions: int
    greatest: dict[str, float]


@dataclass(frozen=True)
class ExportOptions:
    """What an export makes of a model.

    Attributes:
        budget: average share of visual tokens per layer; None: 0.111.
        schedule: pruning points instead of a budget, as text, the name of one of the recipe's
            schedules, or a file that `trio tune` wrote.
        method: selection method of pruning points that name none; None: the recipe's, else trio.
        dtype: float type of graphs and weights; None: the target's.
        dialect: dialect of the graphs; None: the target's.
        quantize: scheme to quantise by, `int8`, `int4`, `int4-g32`, `fp8` or `nvfp4`; `none`:
            weights stay float; None: the recipe's, else the target's, else none.
        selections: what selections compute with beside quantised weights: `int8`, copies of their
            layer's matrices and the head in 8 bit, or `float`, the checkpoint's values; None: the
            recipe's, else the target's, else int8.
        embeddings: where the table of token embeddings is: `device`, in the graphs that look tokens
            up, or `host`, where the pipeline looks them up in the mapped weight file; None: the
            target's.
        calibration: what `calibrate` measured, or a function that measures it for these options
            once all else has been checked; `fp8` alone needs it.
        weights: `constants` of the graphs, or `inputs`, which the runtime binds: one copy in memory
            for all stages; None: the target's.
        target: name or file of a target, or the target itself; None: `cpu`.
        chat_template: file with the chat template, instead of the checkpoint's; `none`: there is
            none, and the bundle takes raw prompts alone, as base models do.
        max_pixels: most pixels that a picture is resized to, for families whose pictures keep their
            sizes; None: the recipe's, else the checkpoint's.
        link_weights: hard-link the checkpoint's files instead of copying weights.
        graphs_only: write graphs without weights.
        force: replace an existing bundle, once the new one is complete.
        selection: how selections work.
    """

    budget: float | None = None
    schedule: Schedule | str | None = None
    method: str | None = None
    dtype: str | None = None
    dialect: str | None = None
    weights: str | None = None
    quantize: str | None = None
    selections: str | None = None
    embeddings: str | None = None
    calibration: Calibration | Callable[[ExportOptions], Calibration] | None = None
    target: str | Path | Target | None = None
    chat_template: str | Path | None = None
    max_pixels: int | None = None
    link_weights: bool = False
    graphs_only: bool = False
    force: bool = False
    selection: SelectionOptions = field(default_factory=SelectionOptions)

    def __post_init__(self) -> None:
        """Raises TrioError for a budget that is no share, or a choice that there is not."""
        if self.budget is not None:
            check_budget(self.budget)
        for name, allowed in (("selections", SELECTIONS), ("embeddings", TABLES)):
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise TrioError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
