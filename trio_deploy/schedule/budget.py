"""Schedules for a budget: the average share of visual tokens per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real

from trio_deploy.errors import TrioError, shown
from trio_deploy.schedule.schedule import RATIO_DIGITS, SMALLEST_RATIO, PruningPoint, Schedule

_Shapes = list[tuple[float, list[float]]]
"""(budget, keep of each point relative to the first), in rising order of budgets."""

DEFAULT_BUDGET = 0.111
"""Budget if none is given: the smaller of the published ones."""

# The published schedules of the LLaVA family (the authors' code): pruning layers of 32, and visual
# tokens kept of 576 for an average of 64 and of 128.  `solve` generalises these three lines.
_PUBLISHED_DEPTH = 32
_PUBLISHED_LAYERS = (1, 10, 15)
_PUBLISHED_VISUAL = 576
_PUBLISHED_KEEPS = {64: (92, 54, 22), 128: (218, 128, 54)}

_MEANING = "it is the average share of visual tokens per layer, above 0 and at most 1"
_SAME_BUDGET = 1e-6  # budgets this close to each other count as equal


def check_budget(budget: float) -> float:
    """Return a budget that some schedule may have.

    Raises:
        TrioError: it is no number above 0 and at most 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TrioError(f"a budget must be a number, got {shown(budget)}")
    if not 0 < budget <= 1:
        raise _impossible(f"{budget:g}", budget if budget > 1 else 0)
    return budget


def read_budget(text: str) -> float:
    """The budget that a text stands for.

    Raises:
        TrioError: as `check_budget`, or it cannot be read.
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        raise TrioError(
            f"cannot read the budget {shown(text)}: {_MEANING}, such as {DEFAULT_BUDGET:g}"
        ) from None
    if number.endswith("%"):
        raise _impossible(number, value)
    return check_budget(value)


def _impossible(budget: str, percent: float) -> TrioError:
    """The error for a budget; `percent` is what it may have been meant as."""
    meant = f"; did you mean {percent / 100:g}?" if 0 < percent <= 100 else ""
    return TrioError(f"a budget of {budget} is not possible: {_MEANING}{meant}")


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The published pruning layers (1, 10, 15 of 32), scaled to another depth."""
    layers: list[int] = []
    for published in _PUBLISHED_LAYERS:
        scaled = math.floor(published * num_layers / _PUBLISHED_DEPTH + 0.5)
        layer = max(scaled, layers[-1] + 1 if layers else 1)
        if layer < num_layers:
            layers.append(layer)
    return tuple(layers)


def smallest_budget(num_layers: int, layers: Sequence[int]) -> float:
    """The exclusive lower bound of budgets: the share of layers before the first pruning point."""
    return layers[0] / num_layers if layers else 1.0


def solve(
    budget: float,
    num_layers: int,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    like: Mapping[float, Schedule] | None = None,
) -> Schedule:
    """Compute a schedule of the published shape that averages to a budget.

    Keeps have the proportions of the published schedules (interpolated between the two of them,
    and over more or fewer points than three), scaled until the average fits; at large budgets
    those that reach 1 stay there.  A budget of 1 keeps all.

    Args:
        budget: visual tokens per layer on average, as a share of the prompt's visual tokens.
        num_layers: L.
        layers: pruning layers if they are fixed (a bundle's); default: the published ones, scaled.
        methods: method of each pruning layer; default: `trio`.
        like: schedules of the same layers by budget, whose proportions replace the published ones;
            keeps are interpolated linearly between two of them.

    Raises:
        TrioError: the budget is not in (0, 1], or below the share of the first layers.
    """
    check_budget(budget)
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
            f"{layers[0]} of {num_layers} layers run on all visual tokens, so it must be above "
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
    ratios = [min(1.0, max(SMALLEST_RATIO, round(keep, RATIO_DIGITS))) for keep in keeps]
    return _schedule(layers, ratios, methods)


def _schedule(layers: Sequence[int], keeps: Sequence[float], methods: Sequence[str]) -> Schedule:
    points = zip(layers, keeps, methods, strict=True)
    return Schedule(tuple(PruningPoint(*point) for point in points))


def for_budget(
    budget: float | None, num_layers: int, published: Mapping[str, Schedule] | None = None
) -> Schedule:
    """The recipe's schedule for a budget if it lists one, else the solver's.

    For a budget that the recipe does not list, layers and methods are those of the nearest one
    listed, so that what was found for the model also holds between its budgets.

    Args:
        budget: as of `solve`; None is `DEFAULT_BUDGET`.
        published: the recipe's schedules by budget ("0.111") or name.

    Raises:
        TrioError: as `solve`; the message says if the budget was the default.
    """
    wanted = DEFAULT_BUDGET if budget is None else budget
    published = published or {}
    listed = {float(key): published[key] for key in published if is_budget(key) and float(key) < 1}
    try:
        check_budget(wanted)
        if not listed:
            return solve(wanted, num_layers)
        nearest = listed[min(listed, key=lambda known: abs(math.log(known / wanted)))]
        return schedule_at_budget(
            wanted, num_layers, nearest, budgets_for_layers(published, nearest)
        )
    except TrioError as error:
        if budget is not None:
            raise
        raise TrioError(f"{error} ({wanted:g} is the default: pass another as --budget)") from None


def schedule_at_budget(
    budget: float, num_layers: int, own: Schedule, budgets: Mapping[float, Schedule]
) -> Schedule:
    """A schedule for a budget at given pruning points.

    The one in `budgets` for this budget, else the solver's in the proportions of the nearest ones,
    or in the published proportions if `budgets` is empty.

    Args:
        budget: as of `solve`.
        own: the pruning points; only layers and methods are read.
        budgets: the recipe's schedules at the same points, from `budgets_for_layers`.

    Raises:
        TrioError: as `solve`.
    """
    for known, schedule in budgets.items():
        if _same_budget(known, budget):
            return schedule
    return solve(budget, num_layers, own.layers, own.methods, budgets)


def budgets_for_layers(
    published: Mapping[str, Schedule], own: Schedule, method: str | None = None
) -> dict[float, Schedule]:
    """The recipe's schedules that the graphs of `own` can run, by budget in rising order.

    These have the same layers and the same methods in the same order.  A budget of 1 is left out:
    it keeps all, whatever a recipe says.

    Args:
        method: replaces the method of every pruning point, as in `resolve_schedule`.
    """
    found = {}
    for key, schedule in published.items():
        same = schedule if method is None else schedule.with_method(method)
        fits = (same.layers, same.methods) == (own.layers, own.methods)
        if own.points and fits and is_budget(key) and float(key) < 1:
            found[float(key)] = same
    return dict(sorted(found.items()))


def resolve_schedule(
    num_layers: int,
    budget: float | None = None,
    schedule: Schedule | str | None = None,
    method: str | None = None,
    published: Mapping[str, Schedule] | None = None,
) -> Schedule:
    """The schedule that a caller's options stand for.

    Args:
        budget: as of `for_budget`; ignored if there is a schedule.
        schedule: itself, the name of one in `published`, or text for `Schedule.parse`.
        method: method of every pruning point; in a schedule's text, of points that name none.
        published: the recipe's schedules by budget or name.

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
    """Whether the key of a recipe's schedule is a budget rather than a name."""
    return not key[:1].isalpha()


def _same_budget(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0, abs_tol=_SAME_BUDGET)


def _shape(schedule: Schedule) -> list[float]:
    """Keeps of a schedule relative to the first one, which may be a count of 0."""
    first = schedule.points[0].keep
    return [max(SMALLEST_RATIO, point.keep / (first or 1)) for point in schedule.points]


def _published_shapes(count: int) -> _Shapes:
    """Shapes of the published schedules, stretched to `count` points."""
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
    """Relative keeps at a budget, interpolated between the two neighbouring shapes."""
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
