"""Optimisation profiles: which shapes an engine is built for, from the schedule and the limits.

A profile covers exactly the shapes reachable within the target's limits: after a pruning point
there are at most as many tokens as the largest allowed budget keeps, and a KV cache has room for
its segment's tokens and the generated ones. Larger requests are rejected.

B rows, S tokens, T tiles, R image rows of a batch, C capacity of a KV cache, W width after pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.config.target import Limits, Target
from trio_deploy.errors import TrioError
from trio_deploy.families.base import TILES_AT_ONCE, ModelConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.runtimes.tensorrt.allocator import SLACK
from trio_deploy.schedule.budget import smallest_budget, solve
from trio_deploy.schedule.schedule import Schedule

PREFILL, DECODE, DEFAULT = "prefill", "decode", "default"

Shape = tuple[int, ...]
Dims = Sequence[int | str]
"""An input's sizes, and names of those that are not fixed."""


class Bounds(NamedTuple):
    """Least, typical and largest shape (or values) of an input."""

    min: Shape
    opt: Shape
    max: Shape


class Span(NamedTuple):
    """Least, typical and largest size of a dimension."""

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, least: int, typical: int, most: int) -> Span:
        """With the typical size moved into the range."""
        most = max(least, most)
        return cls(least, min(max(least, typical), most), most)


@dataclass(frozen=True)
class Profile:
    """What one optimisation profile of an engine admits.

    Attributes:
        name: `prefill` and `decode` where one engine does both, else `default`.
        shapes: of every input, in the graph's order.
        values: of inputs whose values make shapes (`width` of a selection).
    """

    name: str
    shapes: dict[str, Bounds]
    values: dict[str, Bounds] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """`from_json` is the inverse."""

        def plain(bounds: Mapping[str, Bounds]) -> dict[str, Any]:
            return {name: [list(shape) for shape in each] for name, each in bounds.items()}

        return {"name": self.name, "shapes": plain(self.shapes), "values": plain(self.values)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Profile:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""

        def bounds(entries: Mapping[str, Any]) -> dict[str, Bounds]:
            return {
                name: Bounds(*(tuple(int(size) for size in shape) for shape in each))
                for name, each in entries.items()
            }

        return cls(str(raw["name"]), bounds(raw["shapes"]), bounds(raw["values"]))


@dataclass(frozen=True)
class Sizes:
    """What a model's prompts can be like within the limits, stage by stage.

    Attributes:
        batch, tiles: B; T of one call of the vision tower.
        rows: R, image rows of a whole batch.
        tokens: S before the first pruning point and behind each.
        capacity: C of each segment of layers, entry i behind i pruning points.
    """

    batch: Span
    tiles: Span
    rows: Span
    tokens: tuple[Span, ...]
    capacity: tuple[Span, ...]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        schedule: Schedule,
        limits: Limits,
        budgets: Mapping[float, Schedule] | None = None,
    ) -> Sizes:
        """For a schedule's pruning points and the budgets that the limits allow.

        Args:
            budgets: the recipe's schedules at these points.

        Raises:
            TrioError: the largest budget cannot be reached at these pruning points.
        """
        largest = request_limits(config)
        visual = _visual(config, limits)
        context = config.text.max_positions
        if limits.max_text_tokens > context:
            raise TrioError(
                f"max_text_tokens {limits.max_text_tokens} of the target exceeds the model's "
                f"context of {context} tokens: lower it"
            )
        usual = min(limits.typical_visual_tokens, largest.visual_tokens)
        usual_kept = (usual, *schedule.resolve(usual))
        kept = partial(_most_kept, config, schedule, limits.max_budget, budgets)
        # Text is never dropped: as much of it as there may be, then visual tokens, is the most.
        prompt = limits.max_text_tokens
        longest = [prompt + most for most in kept(min(visual, context - prompt))]
        others, seen = _answered(config, limits)
        fullest = [others + most for most in kept(seen)]
        tokens, capacity = [], []
        for most, room, typical in zip(longest, fullest, usual_kept, strict=True):
            typical += limits.typical_text_tokens
            tokens.append(Span.of(1, typical, most))
            capacity.append(Span.of(2, typical + limits.typical_new_tokens, room))
        tiles = largest.tiles
        images = limits.max_batch * limits.max_images
        usual_tiles = min(tiles, math.ceil(usual / largest.tile_rows))
        together = max(tiles, min(TILES_AT_ONCE, images * tiles))
        return cls(
            batch=Span.of(1, limits.typical_batch, limits.max_batch),
            tiles=Span.of(1, usual_tiles, together),
            rows=Span.of(
                0,
                limits.typical_batch * usual_tiles * largest.tile_rows,
                images * tiles * largest.tile_rows,
            ),
            tokens=tuple(tokens),
            capacity=tuple(capacity),
        )


def _visual(config: ModelConfig, limits: Limits) -> int:
    """Visual tokens of a row, at most."""
    return min(limits.max_visual_tokens, limits.max_images * request_limits(config).visual_tokens)


def _answered(config: ModelConfig, limits: Limits) -> tuple[int, int]:
    """Text and new tokens, and visual ones before any pruning, of the row that holds most.

    All of them fit into the model's context. The first two are never dropped, so there are as many
    of them as there may be, and visual ones in what is left.
    """
    context = config.text.max_positions
    others = min(limits.max_text_tokens + limits.max_new_tokens, context)
    return others, min(_visual(config, limits), context - others)


def _most_kept(
    config: ModelConfig,
    schedule: Schedule,
    budget: float,
    budgets: Mapping[float, Schedule] | None,
    visual: int,
) -> tuple[int, ...]:
    """Visual tokens before the first point and behind each, at most, of `visual`.

    Up to `budget`, or as the schedule itself has it.

    Between the recipe's budgets keeps change evenly, so that none lies above its neighbours'.
    """
    if not schedule.points:
        return (visual,)
    depth, budgets = config.text.num_layers, budgets or {}
    floor = smallest_budget(depth, schedule.layers)
    known = [at for at in budgets if floor < at <= budget]
    try:
        largest = [solve(at, depth, schedule.layers, like=budgets) for at in (*known, budget)]
    except TrioError as error:
        raise TrioError(f"the target's max_budget does not fit: {error}") from None
    # A recipe's own are rounded, and may lie above what is solved for their budgets.
    largest += [schedule, *(budgets[at] for at in known)]
    kept = [each.resolve(visual) for each in largest]
    return (visual, *(max(point) for point in zip(*kept, strict=True)))


def cache_bytes(
    config: ModelConfig,
    schedule: Schedule,
    limits: Limits,
    budgets: Mapping[float, Schedule] | None,
    *,
    buffers: int,
    item: int,
) -> int:
    """Bytes of the KV caches of a full batch at the limits.

    Args:
        budgets: the recipe's schedules at the same pruning points.
        buffers: 1 if a cache is updated in place, with the one capacity that the largest budget
            needs; 2 if each step writes the other buffer, as large as `schedule` needs.
        item: bytes per entry.

    Raises:
        TrioError: the limits do not fit the model.
    """
    text = config.text
    capacities = [span.max for span in Sizes.of(config, schedule, limits, budgets).capacity]
    if buffers > 1:
        others, visual = _answered(config, limits)
        capacities = [others + kept for kept in (visual, *schedule.resolve(visual))]
    lengths = [
        capacity
        for capacity, (start, stop) in zip(
            capacities, schedule.segments(text.num_layers), strict=True
        )
        for _ in range(start, stop)
    ]
    return text.kv_bytes(lengths, item) * limits.max_batch * buffers


def buffer_bytes(
    config: ModelConfig,
    schedule: Schedule,
    limits: Limits,
    budgets: Mapping[float, Schedule] | None,
    *,
    buffers: int,
    item: int,
) -> int:
    """Maximum bytes of buffers that the runtime keeps, unless a request needed more.

    KV caches, and inputs and outputs of the stage with the largest ones, in blocks that may be
    larger than needed (`SLACK`). Arguments as for `cache_bytes`.
    """
    text, sizes = config.text, Sizes.of(config, schedule, limits, budgets)
    largest = request_limits(config)
    hidden, rows = text.hidden_size * item, limits.max_batch
    cache = cache_bytes(config, schedule, limits, budgets, buffers=buffers, item=item)
    pixels = largest.tile_values * item
    stages = [
        sizes.tiles.max * (pixels + largest.tile_rows * hidden),
        sizes.rows.max * hidden + rows * sizes.tokens[0].max * hidden,
    ]
    for span, (start, stop) in zip(sizes.tokens, schedule.segments(text.num_layers), strict=True):
        new = text.kv_bytes([span.max] * (stop - start), item)
        stages.append(rows * (new + 2 * span.max * hidden))
    return int(SLACK * (cache + max(stages)))


def profiles(bundle: Bundle, target: Target) -> dict[str, list[Profile]]:
    """The profiles of every stage of a bundle, in the order in which engines number them.

    Raises:
        TrioError: the target's limits do not fit the model.
    """
    stages = bundle.manifest.stages
    return stage_profiles(stages, bundle.config, bundle.schedule, target, bundle.budgets)


def stage_profiles(
    stages: Sequence[StageInfo],
    config: ModelConfig,
    schedule: Schedule,
    target: Target,
    budgets: Mapping[float, Schedule] | None = None,
) -> dict[str, list[Profile]]:
    """The profiles of stages, by name.

    Args:
        budgets: the recipe's schedules at the same pruning points.

    Raises:
        TrioError: the target's limits do not fit the model.
    """
    sizes = Sizes.of(config, schedule, target.limits, budgets)
    shared = all(stage.kind != "decode" for stage in stages)
    segment_of = {
        layer: stage.index or 0
        for stage in stages
        if stage.kind == "prefill"
        for layer in stage.layers
    }
    found: dict[str, list[Profile]] = {}
    for stage in stages:
        spans = _spans(stage, sizes, segment_of, target.dialect)
        if shared and stage.kind in ("embed", "prefill"):
            one, none = Span(1, 1, 1), Span(0, 0, 0)
            # One text token per row: no image rows, and the past that it is added to.
            capacity = sizes.capacity[stage.index or 0] if stage.kind == "prefill" else none
            step = {"S": one, "R": none, "C": capacity}
            found[stage.name] = [
                _profile(PREFILL, stage, spans, sizes),
                _profile(DECODE, stage, {**spans, **step}, sizes),
            ]
        else:
            found[stage.name] = [_profile(DEFAULT, stage, spans, sizes)]
    return found


def _spans(
    stage: StageInfo, sizes: Sizes, segment_of: Mapping[int, int], dialect: str
) -> dict[str, Span]:
    """Ranges of a stage's dynamic axes, by their names."""
    spans = {"B": sizes.batch, "T": sizes.tiles, "R": sizes.rows, "S": sizes.tokens[0]}
    if stage.kind == "prefill":
        spans |= {"S": sizes.tokens[stage.index or 0], "C": Span(0, 0, 0)}
    elif stage.kind == "select":
        # It runs where some row prunes: one visual token and one of text at least.
        before = sizes.tokens[(stage.index or 0) - 1]
        spans["S"] = Span.of(2, before.opt, before.max)
    elif stage.kind == "decode":
        for cache in stage.inputs_of("cache"):
            capacity = sizes.capacity[segment_of[cache.layer or 0]]
            if dialect == "onnx":  # KVCacheUpdate takes a cache of one fixed capacity
                capacity = Span(capacity.max, capacity.max, capacity.max)
            spans[str(cache.shape[2])] = capacity
    return spans


def _profile(name: str, stage: StageInfo, spans: Mapping[str, Span], sizes: Sizes) -> Profile:
    def bounds(dims: Dims) -> Bounds:
        return Bounds(
            *(
                tuple(spans[dim][corner] if isinstance(dim, str) else dim for dim in dims)
                for corner in range(3)
            )
        )

    return Profile(
        name,
        {tensor.name: bounds(tensor.shape) for tensor in stage.inputs},
        {
            tensor.name: Bounds(*((size,) for size in sizes.tokens[stage.index or 0]))
            for tensor in stage.inputs_of("width")
        },
    )
