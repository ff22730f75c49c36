"""Inputs and outputs of each stage: those of one row, and of a batch of rows, padded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trio_deploy.schedule.methods import ENCODER_SCORES

Tensors = dict[str, NDArray]

# Concatenated over the rows of a batch instead of stacked.
_ROWS_OF_FEATURES = ("pixel_values", "image_features")
_DEEPSTACK = "deepstack."
# Padding of shorter rows; 0 for the rest.
_PADDING = {"keep_index": -1, "feature_index": -1, "feature_index_out": -1}


@dataclass
class Stage:
    """Inputs and outputs of one graph, named as the graph names them."""

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


@dataclass
class Trace:
    """What is recorded while a row is generated.

    Attributes:
        stages: tensors of each stage by name.
        recording: whether the tensors of all stages are copied; else `vision` and `embed` alone.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    recording: bool = True

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Context in which a stage runs; a subclass may measure its time."""
        return nullcontext()


def stack_rows(rows: Sequence[dict[str, Stage]]) -> dict[str, Stage]:
    """Stages of a batch from the stages of its rows (each with B = 1), padded on the right.

    `source_index` of a row counts its own feature rows from its own S and has -1 for the newline;
    both are moved to their places in the batch (see `pipeline.prompt.collate`), and so are rows of
    `feature_index`. Runs of the vision graph that see one picture each are numbered anew.
    """
    features = [row["embed"].inputs["image_features"].shape[0] for row in rows]
    before = np.cumsum([0, *features])[:-1]
    length = max(row["embed"].inputs["input_ids"].shape[1] for row in rows)
    pictures = [stage for row in rows for name, stage in row.items() if name.startswith("vision_")]
    batch = {f"vision_{number}": stage for number, stage in enumerate(pictures)}
    for name in rows[0]:
        # a row that ended at once decodes nothing
        if name.startswith("vision_") or not all(name in row for row in rows):
            continue
        stage = batch[name] = Stage()
        for side in ("inputs", "outputs"):
            tensors = [getattr(row[name], side) for row in rows]
            for key in tensors[0]:
                values = [tensor[key] for tensor in tensors]
                if key.startswith("feature_index"):
                    values = [
                        np.where(value < 0, value, value + start)
                        for value, start in zip(values, before, strict=True)
                    ]
                getattr(stage, side)[key] = _stack(key, values)
    batch["embed"].inputs["source_index"] = np.concatenate(
        [
            _move_source(row["embed"].inputs["source_index"], length, start, sum(features))
            for row, start in zip(rows, before.tolist(), strict=True)
        ]
    )
    return batch


def _stack(name: str, rows: list[NDArray]) -> NDArray:
    if name == "width":
        return np.max(rows, axis=0)
    per_feature = name in ENCODER_SCORES and rows[0].ndim == 1  # else per token, [1, S]
    if name in _ROWS_OF_FEATURES or per_feature or name.startswith(_DEEPSTACK):
        return np.concatenate(rows)
    shape = np.max([row.shape for row in rows], axis=0)
    padded = [
        np.pad(
            row,
            [(0, want - have) for want, have in zip(shape.tolist(), row.shape, strict=True)],
            constant_values=_PADDING.get(name, 0),
        )
        for row in rows
    ]
    # Every row has B = 1, so padding never touches the batch axis.
    return np.concatenate(padded)


def _move_source(source: NDArray, length: int, before: int, total: int) -> NDArray:
    own = source.shape[1]
    moved = np.where(source >= own, source - own + length + before, source)
    moved = np.where(source < 0, length + total, moved)
    padding = np.arange(own, length, dtype=np.int64)[None]
    return np.concatenate([moved, padding], axis=1)
