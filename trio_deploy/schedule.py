"""Where visual tokens are pruned, how many are kept, and what that costs.

Notation (docs/architecture.md): L layers, N visual tokens at the start, hidden size d, MLP size m,
H query heads and G key/value heads of size D, vocabulary V, P probe positions.  A *pruning point*
(l, k) means: before decoder layer l runs (0-based), keep k visual tokens.

Operations are counted as multiply-adds, one each, as the paper's formula does; a product of dense
matrices counts in full, the masked half of causal attention included.  Norms, activations, softmax
and RoPE are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.methods import METHODS, PIVOTS
from trio_deploy.models.config import ModelConfig, TextConfig

DEFAULT_BUDGET = 0.111
"""Where none is given: the smaller of the published ones."""

SUPPRESSION_BLOCK = 256
"""M, the ranks that suppression works through at a time."""

# The published schedules of the LLaVA family (the authors' code): layers of 32, and what is kept
# of 576 visual tokens for an average of 64 and of 128.  `solve` generalises these three lines.
_PUBLISHED_DEPTH = 32
_PUBLISHED_LAYERS = (1, 10, 15)
_PUBLISHED_VISUAL = 576
_PUBLISHED_KEEPS = {64: (92, 54, 22), 128: (218, 128, 54)}

_SAME_BUDGET = 1e-6  # budgets this near to each other are one

_RATIO_DIGITS = 6  # a stored ratio is exact to one token in half a million
_SMALLEST_RATIO = 10.0**-_RATIO_DIGITS


@dataclass(frozen=True)
class PruningPoint:
    """Before `layer` runs, keep `keep` visual tokens: a ratio of N (float) or a count (int)."""

    layer: int
    keep: float | int
    method: str = "trio"


@dataclass(frozen=True)
class Schedule:
    """Pruning points in layer order; without points nothing is pruned."""

    points: tuple[PruningPoint, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(point.layer for point in self.points)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(point.method for point in self.points)

    def with_method(self, method: str) -> Schedule:
        """The same layers and keeps, every point by `method`."""
        return Schedule(tuple(replace(point, method=method) for point in self.points))

    def with_keeps(self, keeps: Sequence[float | int]) -> Schedule:
        """The same layers and methods with other keeps, one a point."""
        points = zip(self.points, keeps, strict=True)
        return Schedule(tuple(replace(point, keep=keep) for point, keep in points))

    def segments(self, num_layers: int) -> list[tuple[int, int]]:
        """Layer ranges [start, stop) between pruning points; entry i is what `prefill_i` runs.

        A pruning point before layer 0 leaves an empty first range, for which no graph is written.
        """
        return list(pairwise((0, *self.layers, num_layers)))

    def resolve(self, visual: int) -> tuple[int, ...]:
        """Visual tokens kept at each point, out of `visual` at the start; never increasing.

        A ratio r becomes max(1, floor(r N + 1/2)), a count is capped at N, and of nothing nothing
        is kept.
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

    def visual_per_layer(self, visual: int, num_layers: int) -> list[int]:
        """Visual tokens that each layer sees, [L]."""
        counts = (visual, *self.resolve(visual))
        return [
            count
            for count, (start, stop) in zip(counts, self.segments(num_layers), strict=True)
            for _ in range(start, stop)
        ]

    def average(self, visual: int, num_layers: int) -> float:
        """Visual tokens a layer sees, averaged over the layers: the paper's token budget."""
        return sum(self.visual_per_layer(visual, num_layers)) / num_layers

    def validate(self, num_layers: int, visual: int | None = None) -> None:
        """Check against a model of `num_layers` and, where known, its number of visual tokens.

        Raises:
            TrioError: layers outside the model or not increasing; keeps that increase, exceed
                what there is, or mix ratios with counts; an unknown method.
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
        """From a list of {"layer", "keep", "method"} (method optional), as recipes store it.

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

        A point may name its method, `0:96:divprune,16:32`.

        Args:
            method: of the points that name none.

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


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The published pruning layers (1, 10, 15 of 32) at another depth."""
    layers: list[int] = []
    for published in _PUBLISHED_LAYERS:
        scaled = math.floor(published * num_layers / _PUBLISHED_DEPTH + 0.5)
        layer = max(scaled, layers[-1] + 1 if layers else 1)
        if layer < num_layers:
            layers.append(layer)
    return tuple(layers)


def smallest_budget(num_layers: int, layers: Sequence[int]) -> float:
    """What the layers before the first pruning point alone cost: budgets lie above this."""
    return layers[0] / num_layers if layers else 1.0


def solve(
    budget: float,
    num_layers: int,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    like: Mapping[float, Schedule] | None = None,
) -> Schedule:
    """A schedule of the published shape whose average is `budget` times the visual tokens.

    The keeps fall in the proportions that the published schedules have (interpolated between the
    two of them, and over more or fewer points than three), scaled until the average fits; at large
    budgets those that reach 1 stay there.  `budget` 1 keeps all.

    Args:
        budget: average visual tokens a layer, as a share of the visual tokens at the start.
        num_layers: L.
        layers: pruning layers, where they are fixed (a bundle's); else the published ones, scaled.
        methods: of each of the pruning layers; default: `trio`.
        like: budget → schedule of the same layers, whose proportions replace the published ones;
            between two of them keeps change evenly.

    Raises:
        TrioError: the budget is not in (0, 1], or below what the first layers cost.
    """
    if not 0 < budget <= 1:
        raise TrioError(
            f"a budget of {budget:g} is not possible: it is the average share of visual tokens "
            "that a layer sees, above 0 and at most 1"
        )
    layers = default_layers(num_layers) if layers is None else tuple(layers)
    methods = ("trio",) * len(layers) if methods is None else tuple(methods)
    if budget == 1:
        return _schedule(layers, [1.0] * len(layers), methods)
    floor = smallest_budget(num_layers, layers)
    if budget <= floor:
        if not layers:
            raise TrioError("this bundle or model has no pruning point: only a budget of 1 fits")
        raise TrioError(
            f"a budget of {budget:g} cannot be reached: before the first pruning point, "
            f"{layers[0]} of {num_layers} layers see every visual token, so it must be above "
            f"{floor:.4g}"
        )
    sizes = [stop - start for start, stop in pairwise((*layers, num_layers))]
    shapes = [
        (known, _water_fill(_shape(schedule), sizes, known * num_layers - layers[0]))
        for known, schedule in sorted((like or {}).items())
        if known > floor
    ]
    shares = _shares(budget, shapes or _published_shapes(len(layers)))
    keeps = _water_fill(shares, sizes, budget * num_layers - layers[0])
    ratios = [min(1.0, max(_SMALLEST_RATIO, round(keep, _RATIO_DIGITS))) for keep in keeps]
    return _schedule(layers, ratios, methods)


def _schedule(layers: Sequence[int], keeps: Sequence[float], methods: Sequence[str]) -> Schedule:
    points = zip(layers, keeps, methods, strict=True)
    return Schedule(tuple(PruningPoint(*point) for point in points))


def for_budget(
    budget: float | None, num_layers: int, published: Mapping[str, Schedule] | None = None
) -> Schedule:
    """The schedule that a recipe has for this budget ("0.111" → schedule), else the solver's.

    For a budget that the recipe does not list, the one listed that is nearest gives layers and
    methods, so that a model's own finding holds between its budgets as well.

    Args:
        budget: as `solve` takes it; None is `DEFAULT_BUDGET`.

    Raises:
        TrioError: as `solve`; where it was the default, the message says so.
    """
    wanted = DEFAULT_BUDGET if budget is None else budget
    published = published or {}
    listed = {float(key): published[key] for key in published if is_budget(key) and float(key) < 1}
    try:
        if not listed or wanted <= 0:
            return solve(wanted, num_layers)
        nearest = listed[min(listed, key=lambda known: abs(math.log(known / wanted)))]
        return for_points(wanted, num_layers, nearest, at_points(published, nearest))
    except TrioError as error:
        if budget is not None:
            raise
        raise TrioError(f"{error} ({wanted:g} is the default: pass another as --budget)") from None


def for_points(
    budget: float, num_layers: int, own: Schedule, budgets: Mapping[float, Schedule]
) -> Schedule:
    """What a bundle's pruning points keep at a budget.

    The recipe's schedule where `budgets` has one, else the solver's in the proportions of those
    that are nearest, or in the published ones where there are none.

    Args:
        budget: as `solve` takes it.
        own: the pruning points, of which layers and methods count.
        budgets: the recipe's schedules at the same points, as `at_points` finds them.

    Raises:
        TrioError: as `solve`.
    """
    for known, schedule in budgets.items():
        if _same_budget(known, budget):
            return schedule
    return solve(budget, num_layers, own.layers, own.methods, budgets)


def at_points(
    published: Mapping[str, Schedule], own: Schedule, method: str | None = None
) -> dict[float, Schedule]:
    """A recipe's schedules for budgets that the graphs of `own` can run, smallest budget first.

    Those are the ones with the same layers and the same methods in the same order.  A budget of 1
    is none of them: it keeps all, whatever a recipe says.

    Args:
        method: of every pruning point, where the caller of `choose` gave one.
    """
    found = {}
    for key, schedule in published.items():
        same = schedule if method is None else schedule.with_method(method)
        fits = (same.layers, same.methods) == (own.layers, own.methods)
        if own.points and fits and is_budget(key) and float(key) < 1:
            found[float(key)] = same
    return dict(sorted(found.items()))


def choose(
    num_layers: int,
    budget: float | None = None,
    schedule: Schedule | str | None = None,
    method: str | None = None,
    published: Mapping[str, Schedule] | None = None,
) -> Schedule:
    """What a caller asked for.

    Args:
        budget: see `for_budget`; it counts where there is no schedule.
        schedule: itself, the name of one in `published`, or what `Schedule.parse` reads.
        method: of every pruning point; in a schedule's text, of those that name none.
        published: a recipe's schedules.

    Raises:
        TrioError: as `for_budget` and `Schedule.parse`.
    """
    if isinstance(schedule, str) and schedule not in (published or {}):
        if schedule[:1].isalpha():
            names = ", ".join(key for key in published or {} if not is_budget(key)) or "none"
            raise TrioError(
                f"there is no schedule called '{schedule}': this model's recipe has {names}; "
                "or write layer:keep, for example 1:0.16,10:0.094"
            )
        return Schedule.parse(schedule, method or "trio")
    if isinstance(schedule, str):
        schedule = (published or {})[schedule]
    if schedule is None:
        schedule = for_budget(budget, num_layers, published)
    return schedule if method is None else schedule.with_method(method)


def is_budget(key: str) -> bool:
    """Whether a recipe's schedule is called by its budget rather than by a name."""
    return not key[:1].isalpha()


def _same_budget(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0, abs_tol=_SAME_BUDGET)


_Shapes = list[tuple[float, list[float]]]
"""Budgets, rising, and what the points keep at each, in proportion to each other."""


def _shape(schedule: Schedule) -> list[float]:
    """How the keeps of a schedule relate to the first one, which may be a count of none."""
    first = schedule.points[0].keep
    return [max(_SMALLEST_RATIO, point.keep / (first or 1)) for point in schedule.points]


def _published_shapes(count: int) -> _Shapes:
    """Those of the published schedules, over `count` points."""
    shapes = []
    for kept, keeps in sorted(_PUBLISHED_KEEPS.items()):
        places = [i * (len(keeps) - 1) / max(1, count - 1) for i in range(count)]
        lefts = [min(int(place), len(keeps) - 2) for place in places]
        stretched = [
            keeps[left] + (place - left) * (keeps[left + 1] - keeps[left])
            for place, left in zip(places, lefts, strict=True)
        ]
        shapes.append((kept / _PUBLISHED_VISUAL, [keep / keeps[0] for keep in stretched]))
    return shapes


def _shares(budget: float, shapes: _Shapes) -> list[float]:
    """How keeps relate to each other at this budget: between the shapes of its neighbours."""
    low, few = max((s for s in shapes if s[0] <= budget), default=shapes[0])
    high, many = min((s for s in shapes if s[0] >= budget), default=shapes[-1])
    weight = (budget - low) / (high - low) if high > low else 0.0
    return [(1 - weight) * a + weight * b for a, b in zip(few, many, strict=True)]


def _water_fill(shares: Sequence[float], sizes: Sequence[int], total: float) -> list[float]:
    """Keeps min(1, c·share) with Σ keep·size = total; shares fall, so they reach 1 in order."""
    full = 0
    while full < len(shares):
        rest = total - sum(sizes[:full])
        scale = rest / sum(s * n for s, n in zip(shares[full:], sizes[full:], strict=True))
        if scale * shares[full] <= 1:
            return [1.0] * full + [scale * share for share in shares[full:]]
        full += 1
    return [1.0] * full


# --- What it costs -------------------------------------------------------------------------------


def paper_layer_flops(n: int, d: int, m: int) -> int:
    """The paper's formula for one layer over n tokens: 4nd² + 2n²d + 2ndm.

    It takes H·D = G·D = d and counts two of the three matrices of a gated MLP.
    """
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def layer_flops(n: int, text: TextConfig) -> int:
    """Multiply-adds of one layer over n tokens, grouped heads and all three MLP matrices counted.

    q and o: 2·n·d·HD; k and v: 2·n·d·GD; scores and their product with V: 2·n²·HD; MLP: 3·n·d·m.
    """
    d, q, kv = _widths(text)
    return n * d * (2 * q + 2 * kv) + 2 * n * n * q + 3 * n * d * text.intermediate_size


def saliency_flops(n: int, text: TextConfig, probes: int) -> int:
    """Multiply-adds of `graphs/saliency.py` over n tokens with P probe rows.

    Over all rows: keys, and their gradient back through W_k, 2·n·d·GD; q·kᵀ and dSᵀ·q, 2·P·n·HD;
    A·n, U·nᵀ and Aᵀ·U, 3·H·P·n·d.  For the probe rows: queries, P·d·HD; W_v, W_o, the MLP and
    lm_head, there and back, 2·P·(2·HD·d + 3dm + dV).
    """
    d, q, kv = _widths(text)
    all_rows = n * (2 * d * kv + 2 * probes * q + 3 * text.num_heads * probes * d)
    there = 2 * q * d + 3 * d * text.intermediate_size + d * text.vocab_size
    return all_rows + probes * (d * q + 2 * there)


def similarity_flops(visual: int, keep: int, block: int, d: int) -> int:
    """Multiply-adds of suppression at worst: N·(k + M) cosine similarities in blocks of M ranks."""
    return visual * min(visual, keep + block) * d


def method_flops(
    point: PruningPoint,
    before: int,
    after: int,
    text_tokens: int,
    text: TextConfig,
    probes: int,
    block: int,
) -> tuple[int, int]:
    """Multiply-adds of a pruning point of `before` visual tokens: of its scores, of comparisons.

    n tokens in all.  `fastv`: keys of all rows and one query, n·d·GD + d·HD + n·HD.  `dart`: keys,
    unless before layer 0, and the cosines of eight pivots, 8·n·d.  `divprune`: all cosines, n²·d.
    `vscan`: cosines of all tokens with those that stay, and their means, 2·n·(text + after)·d.
    `random` and `cls-attention` compute next to nothing here.
    """
    n = before + text_tokens
    d, q, kv = _widths(text)
    if point.method == "trio":
        return saliency_flops(n, text, probes), similarity_flops(before, after, block, d)
    if point.method == "topk-gradient":
        return saliency_flops(n, text, probes), 0
    if point.method == "fastv":
        return n * d * kv + d * q + n * q, 0
    if point.method == "dart":
        return (n * d * kv if point.layer else 0), 2 * PIVOTS * n * d
    if point.method == "divprune":
        return 0, n * n * d
    if point.method == "vscan":
        return 0, 2 * n * (text_tokens + after) * d
    return 0, 0


def lm_head_flops(text: TextConfig) -> int:
    """Multiply-adds of the one row of logits that a prefill ends in."""
    return text.hidden_size * text.vocab_size


def max_tiles(config: ModelConfig) -> int:
    """Tiles that the largest image is cut into: the overview, and the largest canvas's tiles."""
    tile = config.vision.image_size**2
    return 1 + max((h * w // tile for h, w in config.grid_pinpoints), default=0)


def max_visual_tokens(config: ModelConfig) -> int:
    """Visual tokens of the image that has most, one newline a row of a tiled one included."""
    patch = config.vision.patch_size
    tiled = (h // patch * (w // patch + 1) for h, w in config.grid_pinpoints)
    return config.vision.rows_per_tile + max(tiled, default=0)


def vision_flops(config: ModelConfig, tiles: int) -> int:
    """Multiply-adds of the CLIP tower up to the feature layer and of the projector, per picture."""
    vision = config.vision
    d, m = vision.hidden_size, vision.intermediate_size
    patches = vision.side * vision.side
    n = patches + 1  # the class token
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    embedding = patches * 3 * vision.patch_size**2 * d
    width = config.text.hidden_size
    projector = vision.rows_per_tile * (d * len(vision.feature_layers) * width + width * width)
    return tiles * (embedding + max(vision.feature_layers) * layer + projector)


def kv_bytes(lengths: Sequence[int], text: TextConfig, item_bytes: int) -> int:
    """Bytes of keys and values when layer i holds lengths[i] tokens: 2·G·D·bytes·Σ lengths."""
    return 2 * text.num_kv_heads * text.head_dim * item_bytes * sum(lengths)


def _widths(text: TextConfig) -> tuple[int, int, int]:
    """(d, H·D, G·D)."""
    return (
        text.hidden_size,
        text.num_heads * text.head_dim,
        text.num_kv_heads * text.head_dim,
    )


@dataclass(frozen=True)
class Cost:
    """What one prefill costs; multiply-adds, and bytes at the end of it.

    Attributes:
        ranges: (start, stop, visual tokens, all tokens) of each layer range.
        average: visual tokens a layer, averaged over the layers.
        paper: the paper's formula over visual tokens alone, selection free of charge.
        layers: all layers over all tokens, text included.
        saliency: the scores of all pruning points that prune: TRIO's probes, others' attention.
        similarity: their comparisons of tokens: TRIO's suppression, at worst; others' cosines.
        lm_head: the last row's logits.
    """

    ranges: tuple[tuple[int, int, int, int], ...]
    average: float
    paper: int
    layers: int
    saliency: int
    similarity: int
    lm_head: int
    kv_bytes: int

    @property
    def selection(self) -> int:
        return self.saliency + self.similarity

    @property
    def honest(self) -> int:
        """Everything the language model's prefill computes."""
        return self.layers + self.selection + self.lm_head


def account(
    text: TextConfig,
    schedule: Schedule,
    visual: int,
    text_tokens: int,
    *,
    item_bytes: int,
    probes: int,
    block: int = SUPPRESSION_BLOCK,
) -> Cost:
    """Cost of a prefill of `visual` + `text_tokens` tokens under `schedule`.

    Args:
        item_bytes: bytes of one number in the KV cache.
        probes: P, probe positions a pruning point.
        block: M, ranks that suppression works through at a time.
    """
    per_layer = schedule.visual_per_layer(visual, text.num_layers)
    counts = (visual, *schedule.resolve(visual))
    saliency = similarity = 0
    for point, (before, after) in zip(schedule.points, pairwise(counts), strict=True):
        if after < before:
            scores, comparisons = method_flops(
                point, before, after, text_tokens, text, probes, block
            )
            saliency, similarity = saliency + scores, similarity + comparisons
    return Cost(
        ranges=tuple(
            (start, stop, count, count + text_tokens)
            for count, (start, stop) in zip(counts, schedule.segments(text.num_layers), strict=True)
            if stop > start
        ),
        average=sum(per_layer) / text.num_layers,
        paper=sum(
            paper_layer_flops(n, text.hidden_size, text.intermediate_size) for n in per_layer
        ),
        layers=sum(layer_flops(n + text_tokens, text) for n in per_layer),
        saliency=saliency,
        similarity=similarity,
        lm_head=lm_head_flops(text),
        kv_bytes=kv_bytes([n + text_tokens for n in per_layer], text, item_bytes),
    )
