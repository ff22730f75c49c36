"""Optimisation profiles: the shapes an engine is built for, from the schedule and the limits.

A profile covers exactly the shapes reachable within the target's limits: after a pruning point
there are at most as many tokens as the largest allowed budget keeps, and a KV cache has room for
its segment's tokens and the generated ones. Larger requests are rejected.

B rows, S tokens, T tiles, R image rows per batch, C capacity of a KV cache, W width after pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.config.target import Limits, Target
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.runtimes.tensorrt.allocator import SLACK
from trio_deploy.schedule.budget import smallest_budget, solve
from trio_deploy.schedule.schedule import Schedule

PREFILL, DECODE, DEFAULT = "prefill", "decode", "default"

Shape = tuple[int, ...]
Dims = Sequence[int | str]
"""An input's sizes; a name for a dynamic one."""


class Bounds(NamedTuple):
    """Minimum, typical and maximum shape (or values) of an input."""

    min: Shape
    opt: Shape
    max: Shape


class Span(NamedTuple):
    """Minimum, typical and maximum size of a dimension."""

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, least: int, typical: int, largest: int) -> Span:
        """Clamp the typical size to the range."""
        largest = max(least, largest)
        return cls(least, min(max(least, typical), largest), largest)


@dataclass(frozen=True)
class Profile:
    """Ranges of one optimisation profile of an engine.

    Attributes:
        name: `prefill` or `decode` for one use of an engine that does both, else `default`.
        shapes: input → its shapes, in the graph's order.
        values: input whose values determine shapes (`width` of a selection) → its values.
        uses: the parts of the ranges that requests bring about, if they are not all of them.
    """

    name: str
    shapes: dict[str, Bounds]
    values: dict[str, Bounds] = field(default_factory=dict)
    uses: tuple[Profile, ...] = ()

    @property
    def parts(self) -> tuple[Profile, ...]:
        """The ranges that requests bring about: of each use, or its own."""
        return self.uses or (self,)

    def to_json(self) -> dict[str, Any]:
        """JSON values, which `from_json` reads."""

        def plain(bounds: Mapping[str, Bounds]) -> dict[str, Any]:
            return {name: [list(shape) for shape in each] for name, each in bounds.items()}

        raw = {"name": self.name, "shapes": plain(self.shapes), "values": plain(self.values)}
        return raw | ({"uses": [use.to_json() for use in self.uses]} if self.uses else {})

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Profile:
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""

        def bounds(entries: Mapping[str, Any]) -> dict[str, Bounds]:
            return {
                name: Bounds(*(tuple(int(size) for size in shape) for shape in each))
                for name, each in entries.items()
            }

        uses = tuple(cls.from_json(use) for use in raw.get("uses", ()))
        return cls(str(raw["name"]), bounds(raw["shapes"]), bounds(raw["values"]), uses)


@dataclass(frozen=True)
class Sizes:
    """Sizes that a model's prompts can have within the limits.

    Attributes:
        batch, tiles: B; T per call of the vision tower.
        rows: R, image rows per batch.
        tower: the other axes of the vision tower's inputs, by name.
        tokens: S before the first pruning point and after each.
        capacity: C per segment of layers, entry i after i pruning points.
    """

    batch: Span
    tiles: Span
    rows: Span
    tokens: tuple[Span, ...]
    capacity: tuple[Span, ...]
    tower: Mapping[str, Span]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        schedule: Schedule,
        limits: Limits,
        budgets: Mapping[float, Schedule] | None = None,
    ) -> Sizes:
        """Sizes for a schedule's pruning points and the budgets that the limits allow.

        Args:
            budgets: the recipe's schedules at the same pruning points.

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
        kept = partial(_max_kept, config, schedule, limits.max_budget, budgets)
        # Text is never dropped: the longest prompt has all of the text, then visual tokens.
        prompt = limits.max_text_tokens
        longest = [prompt + count for count in kept(min(visual, context - prompt))]
        others, seen = _longest_row(config, limits)
        fullest = [others + count for count in kept(seen)]
        tokens, capacity = [], []
        for largest_size, room, typical in zip(longest, fullest, usual_kept, strict=True):
            typical += limits.typical_text_tokens
            tokens.append(Span.of(1, typical, largest_size))
            capacity.append(Span.of(2, typical + limits.typical_new_tokens, room))
        tiles = largest.tiles
        images = limits.max_batch * limits.max_images
        usual_tiles = min(tiles, math.ceil(usual / largest.tile_rows))
        together = max(tiles, min(largest.tiles_at_once, images * tiles))
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
            tower={name: Span(*sizes) for name, sizes in largest.axes.items()},
        )


def _visual(config: ModelConfig, limits: Limits) -> int:
    """Maximum number of visual tokens per row."""
    return min(limits.max_visual_tokens, limits.max_images * request_limits(config).visual_tokens)


def _longest_row(config: ModelConfig, limits: Limits) -> tuple[int, int]:
    """Text and new tokens, and visual tokens before any pruning, of the longest row at its end.

    They fit into the model's context. Text and new tokens are never dropped, so the row has the
    maximum of them, and visual tokens in the rest.
    """
    context = config.text.max_positions
    others = min(limits.max_text_tokens + limits.max_new_tokens, context)
    return others, min(_visual(config, limits), context - others)


def _max_kept(
    config: ModelConfig,
    schedule: Schedule,
    budget: float,
    budgets: Mapping[float, Schedule] | None,
    visual: int,
) -> tuple[int, ...]:
    """Maximum visual tokens before the first point and after each, of `visual` at the start.

    The maximum is over budgets up to `budget` and the schedule itself. Between the recipe's budgets
    keeps are interpolated, so none exceeds both of its neighbours'.
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
    # A recipe's keeps are rounded, so they may exceed those solved for its budgets.
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
        others, visual = _longest_row(config, limits)
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

    KV caches, and inputs and outputs of the stage with the largest ones, in blocks that may exceed
    what is needed (`SLACK`). Arguments as for `cache_bytes`.
    """
    text, sizes = config.text, Sizes.of(config, schedule, limits, budgets)
    largest = request_limits(config)
    hidden, rows = text.hidden_size * item, limits.max_batch
    cache = cache_bytes(config, schedule, limits, budgets, buffers=buffers, item=item)
    pixels = largest.tile_values * item
    deep = config.deepstack * sizes.rows.max * hidden  # kept for the segments behind
    stages = [
        sizes.tiles.max * (pixels + (1 + config.deepstack) * largest.tile_rows * hidden),
        sizes.rows.max * hidden + rows * sizes.tokens[0].max * hidden + deep,
    ]
    for span, (start, stop) in zip(sizes.tokens, schedule.segments(text.num_layers), strict=True):
        new = text.kv_bytes([span.max] * (stop - start), item)
        stages.append(rows * (new + 2 * span.max * hidden) + deep)
    return int(SLACK * (cache + max(stages)))


def profiles(bundle: Bundle, target: Target) -> dict[str, list[Profile]]:
    """The profiles of every stage of a bundle, in the engines' order.

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
            found[stage.name] = [_shared_profile(stage, spans, sizes)]
        else:
            found[stage.name] = [_profile(DEFAULT, stage, spans, sizes)]
    return found


def _shared_profile(stage: StageInfo, spans: Mapping[str, Span], sizes: Sizes) -> Profile:
    """One profile for prefill and decode: with two, the compiler stores matrices once for each.

    Prefill has no past (C = 0), decode one token per row (S = 1) and no image rows. Between them
    are sizes that no request has. Each corner must be a valid step of the graph, which at the
    largest sizes is one with as many new tokens as the past has slots.
    """
    one, none = Span(1, 1, 1), Span(0, 0, 0)
    if stage.kind == "embed":
        uses = {PREFILL: spans, DECODE: {**spans, "S": one, "R": none}}
        whole = dict(spans)
    else:
        capacity = sizes.capacity[stage.index or 0]
        uses = {PREFILL: spans, DECODE: {**spans, "S": one, "R": none, "C": capacity}}
        most = max(capacity.max, spans["S"].max)
        whole = {**spans, "S": Span(1, spans["S"].opt, most), "C": Span(0, 0, most)}
    parts = tuple(_profile(name, stage, each, sizes) for name, each in uses.items())
    return replace(_profile(DEFAULT, stage, whole, sizes), uses=parts)


def _spans(
    stage: StageInfo, sizes: Sizes, segment_of: Mapping[int, int], dialect: str
) -> dict[str, Span]:
    """Ranges of a stage's dynamic axes, by their names."""
    spans = {"B": sizes.batch, "T": sizes.tiles, "R": sizes.rows, "S": sizes.tokens[0]}
    spans |= sizes.tower
    if stage.kind == "prefill":
        spans |= {"S": sizes.tokens[stage.index or 0], "C": Span(0, 0, 0)}
    elif stage.kind == "select":
        # It runs only if a row prunes, so there are at least one visual and one text token.
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
