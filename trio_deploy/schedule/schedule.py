"""Pruning points: the layers before which visual tokens are dropped, and what each point keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.schedule.methods import METHODS

RATIO_DIGITS = 6  # a stored ratio is exact to one token in half a million
SMALLEST_RATIO = 10.0**-RATIO_DIGITS


@dataclass(frozen=True)
class PruningPoint:
    """Before `layer` runs, keep `keep` visual tokens: a share of N (float) or a count (int)."""

    layer: int
    keep: float | int
    method: str = "trio"


@dataclass(frozen=True)
class Schedule:
    """Pruning points in layer order; without any, nothing is pruned."""

    points: tuple[PruningPoint, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(point.layer for point in self.points)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(point.method for point in self.points)

    def with_method(self, method: str) -> Schedule:
        """The same layers and keeps with `method` at every point."""
        return Schedule(tuple(replace(point, method=method) for point in self.points))

    def with_keeps(self, keeps: Sequence[float | int]) -> Schedule:
        """The same layers and methods with other keeps, one per point."""
        points = zip(self.points, keeps, strict=True)
        return Schedule(tuple(replace(point, keep=keep) for point, keep in points))

    def segments(self, num_layers: int) -> list[tuple[int, int]]:
        """Layer ranges [start, stop) between pruning points; `prefill_i` runs range i.

        A pruning point before layer 0 leaves an empty first range, which has no graph.
        """
        return list(pairwise((0, *self.layers, num_layers)))

    def resolve(self, visual: int) -> tuple[int, ...]:
        """Visual tokens kept at each point, out of N = `visual` in the prompt; never increasing.

        A ratio r becomes max(1, floor(r N + 1/2)), a count is capped at N; both are 0 if there are
        no visual tokens.
        """
        kept: list[int] = []
        left = visual
        for point in self.points:
            if isinstance(point.keep, int):
                count = point.keep
            else:
                count = max(1, math.floor(point.keep * visual + 0.5))
            left = min(left, count)
            kept.append(left)
        return tuple(kept)

    def rounded_up(self, visual: int) -> str | None:
        """A sentence on pruning points that keep one token where their ratio is less than half.

        A picture decides it, so it is no error: a server's budget meets pictures of all sizes.
        """
        few = [
            f"{point.keep * visual:.2g} before layer {point.layer}"
            for point in self.points
            if visual and not isinstance(point.keep, int) and point.keep * visual < 0.5
        ]
        if not few:
            return None
        return (
            f"the budget keeps less than one of {visual} visual tokens ({', '.join(few)}): one is "
            "kept, which is more than was asked for"
        )

    def visual_per_layer(self, visual: int, num_layers: int) -> list[int]:
        """Visual tokens in each layer, [L]."""
        counts = (visual, *self.resolve(visual))
        return [
            count
            for count, (start, stop) in zip(counts, self.segments(num_layers), strict=True)
            for _ in range(start, stop)
        ]

    def average(self, visual: int, num_layers: int) -> float:
        """Visual tokens per layer on average: the paper's token budget."""
        return sum(self.visual_per_layer(visual, num_layers)) / num_layers

    def validate(self, num_layers: int, visual: int | None = None) -> None:
        """Check against a model of `num_layers` and, if given, the number of visual tokens.

        Raises:
            TrioError: layers outside the model or not increasing; keeps that increase, exceed
                the visual tokens, or mix ratios with counts; an unknown method.
        """
        for point in self.points:
            if not 0 <= point.layer < num_layers:
                raise TrioError(
                    f"the schedule prunes before layer {point.layer}, but this model has layers "
                    f"0 to {num_layers - 1}: choose layers inside the model"
                )
            if point.method not in METHODS:
                raise TrioError(
                    f"unknown pruning method '{point.method}' before layer {point.layer}: "
                    f"known are {', '.join(METHODS)}"
                )
            _check_keep(point, visual)
        for before, after in pairwise(self.points):
            if after.layer <= before.layer:
                raise TrioError(
                    f"the schedule's layers must increase, but {after.layer} follows "
                    f"{before.layer}: list the pruning points in layer order"
                )
            if isinstance(before.keep, int) != isinstance(after.keep, int):
                raise TrioError(
                    f"the schedule mixes ratios and token counts ({before.keep} and {after.keep}): "
                    "use one kind for all its points"
                )
            if after.keep > before.keep:
                raise TrioError(
                    f"the schedule keeps {after.keep} before layer {after.layer} after only "
                    f"{before.keep} before layer {before.layer}: pruned tokens do not come back, "
                    "so keep must not increase"
                )

    def to_json(self) -> list[dict[str, Any]]:
        return [{"layer": p.layer, "keep": p.keep, "method": p.method} for p in self.points]

    @classmethod
    def from_json(cls, raw: Any) -> Schedule:
        """From a list of {"layer", "keep", "method"} (method optional), as in recipes.

        Raises:
            TrioError: not such a list.
        """
        if not isinstance(raw, list):
            raise TrioError(
                f"a schedule is a list of pruning points with `layer` and `keep`, not {raw!r}"
            )
        points = []
        for entry in raw:
            if not isinstance(entry, dict) or not {"layer", "keep"} <= set(entry):
                raise TrioError(f"a pruning point needs `layer` and `keep`: {entry!r}")
            if unknown := set(entry) - {"layer", "keep", "method"}:
                raise TrioError(
                    f"unknown key '{min(map(str, unknown))}' in pruning point {entry!r}: "
                    "known are layer, keep, method"
                )
            layer, keep = entry["layer"], entry["keep"]
            if type(layer) is not int or type(keep) not in (int, float):
                raise TrioError(
                    f"in pruning point {entry!r}, `layer` must be an integer and `keep` a ratio "
                    "(with a decimal point) or a count"
                )
            points.append(PruningPoint(layer, keep, str(entry.get("method", "trio"))))
        return cls(tuple(points))

    @classmethod
    def parse(cls, text: str, method: str = "trio") -> Schedule:
        """From a command line: `1:0.16,10:0.094,15:0.038`, `1:16%,…` or counts `1:92,10:54,15:22`.

        A point may name its method: `0:96:divprune,16:32`.

        Args:
            method: method of points that name none.

        Raises:
            TrioError: the text is not of this form.
        """
        points = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            try:
                layer, keep, *own = (part.strip() for part in item.split(":", 2))
                named = own[0] if own else method
                points.append(PruningPoint(int(layer), _parse_keep(keep), named))
            except ValueError:
                raise TrioError(
                    f"cannot read '{item}' as a pruning point: write layer:keep, for example "
                    "1:0.16,10:0.094,15:0.038 (ratios) or 1:92,10:54,15:22 (counts), or "
                    "layer:keep:method"
                ) from None
        if not points:
            raise TrioError("the schedule is empty: write layer:keep, for example 1:0.16,10:0.094")
        return cls(tuple(points))

    def __str__(self) -> str:
        return ", ".join(map(_point_text, self.points)) or "no pruning"


def _point_text(point: PruningPoint) -> str:
    text = f"{point.layer}:{_keep_text(point.keep)}"
    return text if point.method == "trio" else f"{text}:{point.method}"


def _keep_text(keep: float | int) -> str:
    """As `_parse_keep` reads it: a ratio of 1 is `1.0`, since `1` is a count."""
    return f"{keep:g}" if isinstance(keep, int) or keep != 1 else "1.0"


def _parse_keep(text: str) -> float | int:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if any(mark in text for mark in ".eE") else int(text)


def _check_keep(point: PruningPoint, visual: int | None) -> None:
    keep = point.keep
    if isinstance(keep, int):
        if keep < 0:
            raise TrioError(f"the schedule keeps {keep} tokens before layer {point.layer}")
        if visual is not None and keep > visual:
            raise TrioError(
                f"the schedule keeps {keep} visual tokens before layer {point.layer}, but there "
                f"are only {visual}: keep at most {visual}, or give ratios"
            )
    elif not 0 < keep <= 1:
        raise TrioError(
            f"the schedule keeps a ratio of {keep} before layer {point.layer}: a ratio lies above "
            "0 and is at most 1 (counts are written without a decimal point)"
        )
