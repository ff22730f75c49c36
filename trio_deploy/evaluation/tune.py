"""Search for the schedule and options under which a model's answers change least, without labels.

The loss is the probability that sampling gives another answer than the unpruned model's greedy one,
averaged over calibration questions: 1 − Π p(token), each token's probability after the ones before
it. It covers the whole answer and lies between 0 and 1, so neither a first token nor one hard
question dominates; if the probabilities are extreme it is the share of answers that change.

The first candidates are coarse: one, two or three pruning points, at the start of the language
model and across its depth, by each of the methods, keeps in a few proportions and with a last keep
of a few hundredths, where the choice of the last method counts most. All are asked a few
questions (64 or more: with fewer, one hard question decides). The better third, joined by
neighbours of the best (a point moved, the proportions changed, a method, τ or the probe exchanged),
is asked three times as many, and so on (successive halving, Jamieson and Talwalkar 2016); the last
third is asked every question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from trio_deploy.config.options import DEFAULT_THRESHOLD
from trio_deploy.config.recipe import TunedSchedule
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.ask import AnswerLog, AskOptions, Line, batches, checksums, same
from trio_deploy.evaluation.configurations import (
    BUNDLES,
    Bundles,
    Configuration,
    Source,
    unpruned,
)
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.statistics import Bootstrap, Estimate
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import check_methods, check_positions
from trio_deploy.files import write_atomically
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.pipeline.request import Request
from trio_deploy.schedule.budget import check_budget, default_layers, solve
from trio_deploy.schedule.methods import METHODS
from trio_deploy.schedule.schedule import RATIO_DIGITS, PruningPoint, Schedule

BEST = "schedule.yaml"
_LOG = "tuning.jsonl"
_REFERENCE = "unpruned.jsonl"

_REDUCTION = 3  # one in three candidates survives a round and is asked three times as much
_MIN_SURVIVORS = 4
_PARENTS = 3  # candidates whose neighbours join
_FIRST = 64  # minimum number of questions of the first round: with fewer, chance decides
_DEPTHS = (0.2, 0.35, 0.5, 0.65, 0.8)  # places of a later point, as shares of the layers
_FALLS = (0.65, 0.45, 0.3)  # shares that a later point keeps of the one before
_TIGHT = (0.01, 0.02, 0.04)  # shares of the visual tokens that the last of two points keeps
_TIGHT_FALL = 0.15  # share that the last of three points keeps of the one before
_STEP = 1.25  # factor between the keeps of neighbours
_TAU_STEP = 0.1


class LossLine(Line, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's loss on a question; `candidate`: checksum of what answered."""

    candidate: str
    loss: float
    agrees: bool


class TokensLine(Line, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The unpruned model's answer; `candidate`: checksum of what answered."""

    candidate: str
    tokens: list[int]


@dataclass(frozen=True)
class Space:
    """What a search chooses from.

    Attributes:
        methods: selection methods of the pruning points.
        thresholds: cosine thresholds τ to begin with; neighbours move in steps of 0.1.
        probes, positions: values to try; None: the model's own.
        points: maximum number of pruning points.
        last: methods of the last pruning point; none: `methods`.
    """

    methods: tuple[str, ...] = ("trio", "divprune")
    thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,)
    probes: tuple[str | None, ...] = (None,)
    positions: tuple[str | None, ...] = (None,)
    points: int = 3
    last: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for method in (*self.methods, *self.last):
            if method not in METHODS:
                raise TrioError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        if not self.methods or not 1 <= self.points <= 3:
            raise TrioError("a search needs a method, and 1 to 3 pruning points")

    def require_possible(self, config: ModelConfig) -> None:
        """Raises TrioError where an export of the model would refuse a method or positions."""
        check_methods(config, (*self.methods, *self.last))
        for positions in self.positions:
            check_positions(config, positions)

    def has(self, methods: Sequence[str]) -> bool:
        """Whether pruning points of these methods, in this order, lie inside the space."""
        *others, last = methods
        return set(others) <= set(self.methods) and last in (self.last or self.methods)


@dataclass(frozen=True)
class Candidate:
    """The shape of a schedule; the budget determines the keeps.

    Attributes:
        points: (layer, weight, method); keeps are proportional to the weights.
    """

    points: tuple[tuple[int, float, str], ...]
    threshold: float
    probe: str | None
    positions: str | None


@dataclass
class Ranked:
    """A candidate with its mean `loss` and `agreement` over the first `asked` questions."""

    configuration: Configuration
    loss: float
    agreement: float
    asked: int
    candidate: Candidate


@dataclass
class Tuned:
    """The result of a search.

    Attributes:
        ranking: finalists, best first, all of them asked every question.
        loss: of the best, on the questions that it was chosen by.
        rounds: (schedules, questions that each of them was asked or more), fewest questions first.
        behind: for each of the ranking, its loss minus that of the best, paired.
        text: the best in the form of a recipe.
        ran_as: how the engines ran that answered.
    """

    budget: float
    ranking: list[Ranked]
    loss: Estimate
    rounds: list[tuple[int, int]]
    behind: list[Estimate]
    text: str = field(repr=False, default="")
    ran_as: RanAs | None = None

    @property
    def tried(self) -> int:
        """Number of schedules that were asked anything."""
        return self.rounds[0][0]

    @property
    def best(self) -> Configuration:
        return self.ranking[0].configuration

    @property
    def level(self) -> list[Ranked]:
        """Other finalists that do not differ from the best beyond the interval."""
        pairs = zip(self.ranking[1:], self.behind[1:], strict=True)
        return [one for one, more in pairs if level(more)]


def level(more: Estimate) -> bool:
    """Whether a difference may be 0: its interval includes 0, or there is no interval."""
    return not more.known or more.low <= 0 <= more.high


def realise(candidate: Candidate, budget: float, layers: int, visual: int) -> Configuration | None:
    """The candidate's schedule with an average at or just below the budget; None if impossible.

    Keeps are whole tokens of `visual`, stored as ratios.
    """
    starts = [layer for layer, _, _ in candidate.points]
    sizes = [stop - start for start, stop in pairwise((*starts, layers))]
    total = math.floor(budget * layers * visual + 1e-9) - starts[0] * visual
    weights = [weight for _, weight, _ in candidate.points]

    def counts(scale: float) -> list[int]:
        return [min(visual, max(1, math.floor(scale * weight))) for weight in weights]

    def cost(keeps: Sequence[int]) -> int:
        return sum(keep * size for keep, size in zip(keeps, sizes, strict=True))

    if cost(counts(0)) > total:
        return None
    low, high = 0.0, float(visual) / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts(middle)) <= total else (low, middle)
    keeps = counts(low)
    for place in range(len(keeps)):  # what rounding left over
        most = visual if place == 0 else keeps[place - 1]
        while keeps[place] < most and cost(keeps) + sizes[place] <= total:
            keeps[place] += 1
    points = tuple(
        PruningPoint(layer, round(keep / visual, RATIO_DIGITS), method)
        for keep, (layer, _, method) in zip(keeps, candidate.points, strict=True)
    )
    if any(after >= before for before, after in pairwise((visual, *keeps))):
        return None  # a point that prunes nothing
    schedule = Schedule(points)
    # Drop options that no point uses, so equivalent schedules share a key.
    used = {need for method in schedule.methods for need in METHODS[method].needs}
    return Configuration(
        str(schedule),
        schedule,
        budget,
        candidate.threshold if "threshold" in used else None,
        candidate.probe if "gradient" in used else None,
        candidate.positions,
    )


def coarse(space: Space, budget: float, layers: int) -> list[Candidate]:
    """The first candidates of a search."""
    found = []
    for shape in _shapes(space, budget, layers):
        for early, late in product(space.methods, space.last or space.methods):
            # The last point's method holds for all points after layer 0 that may have it.
            middle = late if late in space.methods else early
            methods = [early if layer == 0 else middle for layer, _ in shape[:-1]] + [late]
            points = tuple((*point, one) for point, one in zip(shape, methods, strict=True))
            found += [
                Candidate(points, *options)
                for options in product(space.thresholds, space.probes, space.positions)
            ]
    return list(dict.fromkeys(found))


def _shapes(space: Space, budget: float, layers: int) -> list[list[tuple[int, float]]]:
    """(layer, weight) of the points of the first candidates."""
    first = default_layers(layers)[0]
    depths = sorted({max(1, math.floor(share * layers + 0.5)) for share in _DEPTHS})
    singles = sorted({0, first, first + max(1, layers // 32), *depths})
    shapes = [[(layer, 1.0)] for layer in singles if layer < layers]
    if space.points >= 2:
        shapes += [[(0, 1.0), (depth, fall)] for depth, fall in product(depths, _FALLS)]
        for depth, keep in product(depths, _TIGHT):
            start = (budget * layers - keep * (layers - depth)) / depth  # what is left for layer 0
            if keep < min(start, 1) * _FALLS[-1]:
                shapes.append([(0, 1.0), (depth, keep / min(start, 1))])
    if space.points >= 3:
        for one, other in pairwise(depths):
            shapes += [[(0, 1.0), (one, fall), (other, fall * fall)] for fall in _FALLS[:2]]
            shapes.append([(0, 1.0), (one, _FALLS[1]), (other, _FALLS[1] * _TIGHT_FALL)])
        if budget * layers > first:
            published = solve(budget, layers).points
            shapes.append([(point.layer, float(point.keep)) for point in published])
    return shapes


def neighbours(candidate: Candidate, space: Space, layers: int) -> Iterator[Candidate]:
    """Candidates of the space that differ in one property."""
    for near in _neighbours(candidate, space, layers):
        if space.has([method for _, _, method in near.points]):
            yield near


def _neighbours(candidate: Candidate, space: Space, layers: int) -> Iterator[Candidate]:
    points = candidate.points
    step = max(1, layers // 32)
    for place, (layer, weight, method) in enumerate(points):

        def with_point(*new: tuple[int, float, str], at: int = place) -> Candidate:
            return replace(candidate, points=points[:at] + new + points[at + 1 :])

        before = points[place - 1][0] if place else -1
        after = points[place + 1][0] if place + 1 < len(points) else layers
        for moved in (layer - step, layer + step):
            if before < moved < after and layer > 0:
                yield with_point((moved, weight, method))
        if len(points) > 1:
            yield with_point((layer, weight * _STEP, method))
            yield with_point((layer, weight / _STEP, method))
        for other in dict.fromkeys((*space.methods, *space.last)):
            if other != method:
                yield with_point((layer, weight, other))
        if len(points) < space.points and after - layer > 1:
            middle = (layer + after) // 2
            one = method if method in space.methods else space.methods[0]
            yield with_point((layer, weight, one), (middle, weight * _FALLS[0], method))
    used = {need for _, _, method in points for need in METHODS[method].needs}
    if "threshold" in used:
        for tau in (candidate.threshold - _TAU_STEP, candidate.threshold + _TAU_STEP):
            if 0 < tau < 1:
                yield replace(candidate, threshold=round(tau, 3))
    if "gradient" in used:
        for probe in space.probes:
            yield replace(candidate, probe=probe)
    for positions in space.positions:
        yield replace(candidate, positions=positions)


class Tuner:
    """Ask candidates calibration questions, each once.

    Attributes:
        ran_as: how the engines run, of the unpruned model and of all candidates.
    """

    def __init__(
        self,
        source: Source,
        questions: Sequence[Question],
        out: Path,
        options: AskOptions | None = None,
    ) -> None:
        """Arguments as in `tune`."""
        options = options or AskOptions()
        if source.bundle is not None:
            raise TrioError(
                "a bundle's schedule is settled: pass the model that it was exported from"
            )
        self._source = source
        # Shuffled, so that the first few questions are about many pictures.
        order = np.random.default_rng(0).permutation(len(questions))
        self.questions = [questions[place] for place in order]
        self._asked = checksums(self.questions)
        self._bundles = Bundles(
            source,
            out / BUNDLES,
            options.runtime,
            options.dtype,
            options.quantize,
            options.selections,
        )
        self._batch = options.batch
        self._limit = options.max_new_tokens
        self._progress = options.progress
        self._out = out
        self.ran_as: RanAs | None = None
        self._answers = self._reference(AnswerLog(out / _REFERENCE, TokensLine))
        self._log = AnswerLog(out / _LOG, LossLine)
        # By checksums of what answers (model, target, schedule …) and what is asked.
        self._losses: dict[tuple[str, str], tuple[float, bool]] = {
            (entry.candidate, entry.id): (entry.loss, entry.agrees)
            for entry in self._log.entries
            if entry.ran == self.ran_as and same(entry, self._asked, self._limit)
        }

    def _reference(self, log: AnswerLog[TokensLine]) -> dict[str, list[int]]:
        """Tokens of the unpruned model's answers by question id; sets `ran_as`."""
        whole = self._bundles.identity(unpruned(self._source))
        stored = [
            entry
            for entry in log.entries
            if entry.candidate == whole
            and entry.ran is not None  # else the candidates' engines could not be told to be alike
            and same(entry, self._asked, self._limit)
        ]
        self.ran_as = stored[-1].ran if stored else None
        known = {entry.id: entry.tokens for entry in stored if entry.ran == self.ran_as}
        if len(known) < len(self.questions):
            pipeline = self._bundles.pipeline(unpruned(self._source))
            self.ran_as = pipeline.ran_as
            known = {entry.id: entry.tokens for entry in stored if entry.ran == self.ran_as}
            missing = [q for q in self.questions if q.id not in known]
            with log, self._bar("unpruned", len(missing)) as bar:
                for group in batches(missing, self._batch):
                    requests = [
                        Request(
                            q.prompt,
                            list(q.images),
                            max_new_tokens=self._limit,
                            bundle_sampling=False,
                        )
                        for q in group
                    ]
                    for question, given in zip(
                        group, pipeline.generate_batch(requests), strict=True
                    ):
                        known[question.id] = given.token_ids
                        log.add(
                            TokensLine(
                                id=question.id,
                                asked=self._asked[question.id],
                                limit=self._limit,
                                ran=self.ran_as,
                                candidate=whole,
                                tokens=given.token_ids,
                            )
                        )
                    bar.update(len(group))
        return known

    def rank(
        self, candidates: dict[str, tuple[Configuration, Candidate]], asked: int
    ) -> list[Ranked]:
        """Ask each candidate the first `asked` questions; ranked, best first."""
        questions = self.questions[:asked]
        ranked = []
        # Candidates that differ only in keeps share a bundle: ask them one after the other.
        order = sorted(candidates.values(), key=lambda one: self._bundles.shape(one[0]))
        missing = sum(
            (self._bundles.identity(configuration), q.id) not in self._losses
            for configuration, _ in candidates.values()
            for q in questions
        )
        with self._log, self._bar(f"{len(candidates)} schedules", missing) as bar:
            for configuration, candidate in order:
                losses = self._ask(configuration, questions, bar)
                ranked.append(
                    Ranked(
                        configuration,
                        float(np.mean([loss for loss, _ in losses])),
                        float(np.mean([agrees for _, agrees in losses])),
                        len(questions),
                        candidate,
                    )
                )
        return sorted(ranked, key=lambda one: one.loss)

    def losses(self, configuration: Configuration) -> np.ndarray:
        """Losses on all questions, float64 [n]; they must have been asked."""
        key = self._bundles.identity(configuration)
        return np.array([self._losses[(key, q.id)][0] for q in self.questions])

    def _ask(
        self, configuration: Configuration, questions: Sequence[Question], bar: Any
    ) -> list[tuple[float, bool]]:
        key = self._bundles.identity(configuration)
        missing = [q for q in questions if (key, q.id) not in self._losses]
        if missing:
            assert configuration.schedule is not None
            pipeline = self._bundles.shaped(configuration)
            if pipeline.ran_as != self.ran_as:
                raise TrioError(
                    f"{self._out} was begun as {self.ran_as}, and now runs as {pipeline.ran_as}: "
                    "search in another folder"
                )
            keep = tuple(point.keep for point in configuration.schedule.points)
            for group in batches(missing, self._batch):
                for question, (loss, agrees) in zip(
                    group, self._loss(pipeline, keep, group), strict=True
                ):
                    self._losses[(key, question.id)] = loss, agrees
                    self._log.add(
                        LossLine(
                            id=question.id,
                            asked=self._asked[question.id],
                            limit=self._limit,
                            ran=self.ran_as,
                            candidate=key,
                            loss=loss,
                            agrees=agrees,
                        )
                    )
                bar.update(len(group))
        return [self._losses[(key, q.id)] for q in questions]

    def _loss(
        self, pipeline: Pipeline, keep: tuple[float | int, ...], questions: Sequence[Question]
    ) -> list[tuple[float, bool]]:
        generations = pipeline.generate_batch(
            [
                Request(q.prompt, list(q.images), keep=keep, forced=self._answers[q.id])
                for q in questions
            ]
        )
        return [(-math.expm1(sum(g.logprobs)), all(g.greedy)) for g in generations]

    def _bar(self, label: str, total: int) -> Any:
        return tqdm(total=total, desc=label, unit="q", disable=None if self._progress else True)


class Search:
    """Successive halving over candidates: each round asks fewer schedules more questions.

    Attributes:
        ranked: candidates of the last round, best first.
    """

    def __init__(self, tuner: Tuner, space: Space, budget: float, source: Source) -> None:
        self._tuner, self._space, self._budget = tuner, space, budget
        self._layers, self._visual = source.layers, source.visual
        self._known: dict[str, tuple[Configuration, Candidate]] = {}
        self._asked: dict[int, set[str]] = {}
        self.ranked: list[Ranked] = []

    def begin(self, limit: int | None, start: Sequence[TunedSchedule]) -> list[str]:
        """Keys of the first candidates: coarse ones, `limit` of them evenly taken, and `start`."""
        found = self._add(coarse(self._space, self._budget, self._layers))
        if limit is not None and limit < len(found):
            places = np.linspace(0, len(found) - 1, limit).round().astype(int)
            found = [found[place] for place in places]
        space = self._space
        found += self._add(
            Candidate(
                tuple((p.layer, float(p.keep), p.method) for p in given.schedule.points),
                given.threshold if given.threshold is not None else space.thresholds[0],
                given.probe or space.probes[0],
                given.positions or space.positions[0],
            )
            for given in start
        )
        return list(dict.fromkeys(found))

    def run(self, keys: Sequence[str]) -> None:
        """Ask in rounds; the last one asks every question."""
        total = len(self._tuner.questions)
        for number, asked in enumerate(_rungs(total)):
            if self.ranked:
                keys = self._survivors(joined=asked < total or number == 1)
            self.ranked = self._tuner.rank({key: self._known[key] for key in keys}, asked)
            self._asked.setdefault(asked, set()).update(keys)

    def rounds(self) -> list[tuple[int, int]]:
        """(schedules, questions that each was asked or more), fewest questions first."""
        for fewer, more in reversed(list(pairwise(self._asked))):
            self._asked[fewer] |= self._asked[more]
        return [(len(keys), asked) for asked, keys in self._asked.items()]

    def _survivors(self, *, joined: bool) -> list[str]:
        """Keys of the better third, `joined` by neighbours of the best."""
        survivors = self.ranked[: max(_MIN_SURVIVORS, len(self.ranked) // _REDUCTION)]
        keys = [one.configuration.key for one in survivors]
        if joined:
            parents = [one.candidate for one in survivors[:_PARENTS]]
            keys += self._add(
                near for one in parents for near in neighbours(one, self._space, self._layers)
            )
        return list(dict.fromkeys(keys))

    def _add(self, candidates: Iterable[Candidate]) -> list[str]:
        """Keys of the candidates that the budget can have, each once."""
        keys = []
        for candidate in candidates:
            configuration = realise(candidate, self._budget, self._layers, self._visual)
            if configuration is not None:
                self._known.setdefault(configuration.key, (configuration, candidate))
                keys.append(configuration.key)
        return list(dict.fromkeys(keys))


def _rungs(total: int) -> list[int]:
    """Questions of each round; two rounds ask the first number, neighbours join in between."""
    rungs = [total]
    while rungs[0] > _REDUCTION * _FIRST:
        rungs.insert(0, math.ceil(rungs[0] / _REDUCTION))
    return [rungs[0], *rungs]


def tune(
    source: Source,
    questions: Sequence[Question],
    budget: float,
    out: Path,
    options: AskOptions | None = None,
    *,
    space: Space | None = None,
    limit: int | None = None,
    start: Sequence[TunedSchedule] = (),
) -> Tuned:
    """Search for the schedule of a budget; the same call after an interrupt goes on.

    Args:
        questions: questions for calibration; references are not used.
        budget: average share of visual tokens per layer.
        out: folder for bundles, what was asked, and the result in the form of a recipe,
            `schedule.yaml`.
        limit: maximum number of candidates to begin with, evenly taken.
        start: schedules to begin with as well, scaled to the budget; τ, probe and positions that
            one does not say are the first of the space.

    Raises:
        TrioError: the budget cannot be reached, or what exporting and running raises; before
            anything is asked, a method or positions that the model does not have.
    """
    space = space or Space()
    check_budget(budget)
    if limit is not None and limit < 1:
        raise TrioError(f"a search begins with 1 candidate or more, not {limit}")
    space.require_possible(source.config)
    for each in start:
        check_methods(source.config, each.schedule.methods)
        check_positions(source.config, each.positions)
    tuner = Tuner(source, questions, out, options)
    search = Search(tuner, space, budget, source)
    first = search.begin(limit, start)
    if not first:
        raise TrioError(
            f"no schedule of this model reaches a budget of {budget:g}: pass a larger one, or a "
            "method that may prune before layer 0"
        )
    search.run(first)
    losses = [tuner.losses(one.configuration) for one in search.ranked]
    bootstrap = Bootstrap([q.picture for q in tuner.questions])
    tuned = Tuned(
        budget,
        search.ranked,
        bootstrap.mean(losses[0]),
        search.rounds(),
        [bootstrap.difference(one, losses[0], np.ones(len(losses[0]))) for one in losses],
        ran_as=tuner.ran_as,
    )
    tuned.text = recipe_text(tuned)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / BEST, tuned.text.encode())
    return tuned


def described(configuration: Configuration) -> str:
    """A schedule, and its τ where a method reads it."""
    tau = configuration.threshold
    return configuration.name + ("" if tau is None else f"  τ={tau:g}")


def recipe_text(tuned: Tuned) -> str:
    """The best schedule in the form of a recipe."""
    best = tuned.best
    assert best.schedule is not None
    loss = tuned.loss
    lines = [
        f"# trio tune: {_rounds_text(tuned.rounds)}.",
        "# The chance of another answer than unpruned is",
        f"# {loss.value:.4f}"
        + (f" ({loss.low:.4f} to {loss.high:.4f})" if loss.known else "")
        + f", and the same answer came {tuned.ranking[0].agreement:.1%} of the time:",
        "# on the questions that it was chosen by. On others it will be worse: see trio eval.",
    ]
    lines += [f"# Ran as {tuned.ran_as}."] if tuned.ran_as else []
    others = len(tuned.ranking) - 1
    if others and not loss.known:
        lines.append("# The questions are about too few pictures to tell the finalists apart.")
    elif others:
        lines.append(
            f"# Level with it (the paired 95 % interval of the difference includes 0): "
            f"{len(tuned.level)} of the {others} other finalists."
        )
        lines += [f"#   {described(one.configuration)}" for one in tuned.level]
    lines += [
        "schedules:",
        f'  "{tuned.budget:g}":',
    ]
    lines += [
        f"    - {yaml.safe_dump(point, default_flow_style=True, sort_keys=False).strip()}"
        for point in best.schedule.to_json()
    ]
    lines += [] if best.threshold is None else [f"threshold: {best.threshold:g}"]
    lines += [f"probe: {best.probe}"] if best.probe else []
    lines += [f"positions: {best.positions}"] if best.positions else []
    return "\n".join(lines) + "\n"


def _rounds_text(rounds: Sequence[tuple[int, int]]) -> str:
    (schedules, questions), *later = rounds
    if not later:
        return f"{schedules} schedules were asked all {questions} questions"
    texts = [f"{schedules} schedules were asked {questions} questions or more"]
    texts += [f"{some} of them {asked} or more" for some, asked in later[:-1]]
    return ", ".join([*texts, f"{later[-1][0]} of them all {later[-1][1]}"])
