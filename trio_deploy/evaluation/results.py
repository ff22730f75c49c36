"""Results of an evaluation: statistics, results.json and the tables of results.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.ask import Measured
from trio_deploy.evaluation.configurations import BLIND, UNPRUNED, Configuration, Source, used
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.scheme import SchemeForm, SchemeResults, table_of
from trio_deploy.evaluation.scorers import pope_summary, yes_or_no
from trio_deploy.evaluation.statistics import Bootstrap, Estimate, EstimateForm, points_text
from trio_deploy.files import convert, read_json, sha256_of, write_together
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.schedule.schedule import Schedule

SCHEMA = 2
RESULTS = "results.json"
TABLE = "results.md"
SAME_BUDGET = 0.005  # configurations nearer than this are compared with one another


@dataclass(frozen=True)
class KindResult:
    """Results on the questions of one kind.

    Accuracy and retention cover the questions that have a reference, and are None if none has;
    retention also if the unpruned model is never right.
    """

    questions: int
    agreement: float
    kl: float
    accuracy: Estimate | None
    retention: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "agreement": self.agreement,
            "kl": self.kl,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "retention": self.retention.to_json() if self.retention else None,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> KindResult:
        accuracy, retention = (
            Estimate.from_json(raw[key]) if raw[key] else None for key in ("accuracy", "retention")
        )
        return cls(raw["questions"], raw["agreement"], raw["kl"], accuracy, retention)


@dataclass(frozen=True)
class Result:
    """Results of one configuration.

    Attributes:
        budget: share that was asked for; `share`: the actual average share per layer.
        agreement: share of answers equal to the unpruned model's, with its interval.
        kl: mean divergence of the first token's distribution, in nats.
        behind: retention of the run's first configuration at about this budget minus this one's;
            `against`: the name of that configuration.
        extra: further figures of a benchmark, by category.
        ran_as: how the engines ran that answered; None in files of earlier versions.
    """

    name: str
    budget: float
    share: float
    schedule: Schedule | None
    options: dict[str, Any]
    overall: KindResult
    agreement: Estimate
    kinds: dict[str, KindResult]
    behind: Estimate | None
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    against: str | None = None
    ran_as: RanAs | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "budget": self.budget,
            "share": self.share,
            "schedule": None if self.schedule is None else self.schedule.to_json(),
            "options": self.options,
            **self.overall.to_json(),
            "agreement": self.agreement.to_json(),
            "kinds": {kind: result.to_json() for kind, result in self.kinds.items()},
            "behind": self.behind.to_json() if self.behind else None,
            "against": self.against,
            "extra": self.extra,
            "ran_as": self.ran_as and self.ran_as.to_json(),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Result:
        """From what `to_json` returns, checked before."""
        agreement = Estimate.from_json(raw["agreement"])
        return cls(
            raw["name"],
            raw["budget"],
            raw["share"],
            None if raw["schedule"] is None else Schedule.from_json(raw["schedule"]),
            raw["options"],
            KindResult.from_json({**raw, "agreement": agreement.value}),
            agreement,
            {kind: KindResult.from_json(one) for kind, one in raw["kinds"].items()},
            Estimate.from_json(raw["behind"]) if raw["behind"] else None,
            raw["extra"],
            raw["against"],
            convert(raw["ran_as"], RanAs) if raw.get("ran_as") else None,
        )


@dataclass(frozen=True)
class Results:
    """Results of one evaluation.

    Attributes:
        model: its name; `data`: description of the questions; `machine`: where (JSON).
        questions, pictures: their numbers; `scored`: questions that have a reference.
        results: the unpruned model first.
        bundle: checksum of the measured bundle's manifest; empty if bundles were exported from a
            model, and in files of earlier versions.
        scheme: what quantised weights cost; None: they are float, or were compared with no floats.
    """

    model: str
    data: str
    scorer: str
    machine: dict[str, Any]
    questions: int
    pictures: int
    results: list[Result]
    scored: int
    bundle: str = ""
    scheme: SchemeResults | None = None

    @property
    def passed(self) -> bool:
        """Whether quantised weights meet the bars of their scheme, where it was judged."""
        return self.scheme is None or self.scheme.passed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            "scorer": self.scorer,
            "machine": self.machine,
            "questions": self.questions,
            "pictures": self.pictures,
            "scored": self.scored,
            "bundle": self.bundle,
            "results": [result.to_json() for result in self.results],
            "scheme": self.scheme and self.scheme.to_json(),
        }

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            TrioError: it cannot be read, is damaged, or is of another version.
        """
        remedy = f"pass the {RESULTS} that trio eval wrote"
        try:
            raw = read_json(file, remedy)
        except FileNotFoundError:
            raise TrioError(f"there are no results of trio eval at {file}: {remedy}") from None
        if not isinstance(raw, dict) or "results" not in raw or "schema" not in raw:
            raise TrioError(
                f"{file} holds no results of trio eval (it is something else): {remedy}"
            )
        try:
            if raw["schema"] == 1:
                raw = _from_first(raw)
            if raw["schema"] != SCHEMA:
                raise TrioError("it is of another version of trio eval")
            _check_alike(convert(raw, _ResultsFile).results)
            results = [Result.from_json(entry) for entry in raw["results"]]
        except TrioError as error:
            raise TrioError(
                f"{file} holds no results of trio eval that can be read: {error}; {remedy}, or "
                "measure again"
            ) from None
        del raw["schema"]
        scheme = SchemeResults.from_json(raw["scheme"]) if raw.get("scheme") else None
        return cls(**{**raw, "results": results, "scheme": scheme})

    def save(self, folder: Path) -> None:
        """Write results.json and results.md."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_together({folder / RESULTS: text.encode(), folder / TABLE: self.to_text().encode()})

    def to_text(self) -> str:
        """Tables in Markdown."""
        lines = [
            f"{self.model}: {self.questions} questions about {self.pictures} pictures "
            f"({self.data}), {self._scored_text()}.",
            "",
            "| configuration | schedule (layer:keep:method) | tokens | accuracy | retention | "
            "first − this | agreement | KL |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for result in self.results:
            one = result.overall
            lines.append(
                f"| {result.name} | {_schedule_text(result)} | {result.share:.1%} | "
                f"{_percent(one.accuracy)} | {range_text(one.retention)} | "
                f"{points_text(result.behind)} | "
                f"{result.agreement.value:.1%} | {one.kl:.4f} |"
            )
        kinds = list(self.results[0].kinds) if self.results else []
        if len(kinds) > 1:
            lines += [
                "",
                "Accuracy by kind of question:"
                if self.results[0].overall.accuracy
                else "Agreement by kind of question:",
                "",
                "| configuration | tokens | " + " | ".join(kinds) + " |",
                "|---|---|" + "---|" * len(kinds),
                "| questions |  | "
                + " | ".join(str(self.results[0].kinds[kind].questions) for kind in kinds)
                + " |",
            ]
            scored = self.results[0].overall.accuracy is not None
            for result in self.results:
                cells = [
                    _percent(r.accuracy) or "–" if scored else f"{r.agreement:.1%}"
                    for r in (result.kinds[kind] for kind in kinds)
                ]
                lines.append(f"| {result.name} | {result.share:.1%} | " + " | ".join(cells) + " |")
        extras = [result for result in self.results if result.extra]
        if extras:
            names = list(next(iter(extras[0].extra.values())))
            lines += ["", "| configuration | tokens | category | " + " | ".join(names) + " |",
                      "|---|---|---|" + "---|" * len(names)]  # fmt: skip
            for result in extras:
                for category, figures in result.extra.items():
                    cells = [category, *(f"{figures[name]:.1%}" for name in names)]
                    lines.append(
                        f"| {result.name} | {result.share:.1%} | " + " | ".join(cells) + " |"
                    )
        lines += [
            "",
            "Tokens: average share of the visual tokens per layer. In brackets 95 %",
            "intervals over pictures (docs/evaluation.md), none (–) with fewer than 10. First −",
            "this: retention of the first configuration, at its budget nearest to this one's (at",
            "most half a point away), minus this one's, in points. KL: of the first token's",
            "distribution from the unpruned model's, in nats.",
            "",
        ]
        if self.scheme is not None:
            lines += [*table_of(self.scheme), ""]
        lines += [line for said in self.ran_text() for line in (said, "")]
        return "\n".join(lines)

    def ran_text(self) -> list[str]:
        """A sentence per way in which the engines ran; several name their configurations."""
        ways: dict[RanAs, list[str]] = {}
        for result in self.results:
            if result.ran_as is not None:
                ways.setdefault(result.ran_as, []).append(result.name)
        several = len(ways) > 1
        return [
            f"Ran as {ran}" + (f": {', '.join(dict.fromkeys(names))}." if several else ".")
            for ran, names in ways.items()
        ]

    def _scored_text(self) -> str:
        if not self.scored:
            return "none of which has a known answer"
        few = "" if self.scored == self.questions else f"{self.scored} of them with an answer and "
        return f"{few}scored by `{self.scorer}`"


class _Kind(msgspec.Struct):
    """The form of a `KindResult` in results.json."""

    questions: int
    agreement: float
    kl: float
    accuracy: EstimateForm | None
    retention: EstimateForm | None


class _Point(msgspec.Struct):
    """The form of a pruning point."""

    layer: int
    keep: float
    method: str


class _Result(msgspec.Struct):
    """The form of a `Result` in results.json: that of all questions, and more."""

    name: str
    budget: float
    share: float
    schedule: list[_Point] | None
    options: dict[str, float | str]
    questions: int
    agreement: EstimateForm
    kl: float
    accuracy: EstimateForm | None
    retention: EstimateForm | None
    kinds: dict[str, _Kind]
    behind: EstimateForm | None
    against: str | None
    extra: dict[str, dict[str, float]]
    ran_as: RanAs | None = None


class _ResultsFile(msgspec.Struct):
    """The form of results.json."""

    schema: int
    model: str
    data: str
    scorer: str
    machine: dict[str, Any]
    questions: int
    pictures: int
    scored: int
    results: list[_Result]
    bundle: str = ""
    scheme: SchemeForm | None = None


def _check_alike(results: Sequence[_Result]) -> None:
    """Raises TrioError where results are not about the same kinds of questions and figures."""
    if len({tuple(sorted(one.kinds)) for one in results}) > 1:
        raise TrioError("its results are about other kinds of questions each")
    if len({tuple(figures) for one in results for figures in one.extra.values()}) > 1:
        raise TrioError("its results have other figures of a benchmark each")


def _from_first(raw: dict[str, Any]) -> dict[str, Any]:
    """Results of schema 1 in the present form, without intervals: near 100 % they were wrong.

    Raises:
        TrioError: it is not of the form of schema 1.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"value", "low", "high"}:
            return {"value": value["value"], "low": None, "high": None}
        return {key: plain(entry) for key, entry in value.items()}

    try:
        results = [
            {**plain(one), "against": None, "extra": {"all": one["extra"]} if one["extra"] else {}}
            for one in raw["results"]
        ]
        scored = raw["questions"] if results[0]["accuracy"] else 0
    except (LookupError, TypeError):
        raise TrioError("its results are not those of schema 1") from None
    return {**raw, "schema": SCHEMA, "scored": scored, "results": results}


def collect(
    source: Source,
    questions: Sequence[Question],
    measured: Sequence[Measured],
    *,
    data: str,
    scorer: str,
    machine: dict[str, Any],
) -> Results:
    """Statistics of the answers; the unpruned model comes first in `measured`."""
    bootstrap = Bootstrap([question.picture for question in questions])
    known = np.array([question.reference is not None for question in questions])
    kinds = {
        kind: np.array([question.kind == kind for question in questions])
        for kind in sorted({question.kind for question in questions})
    }
    reference = measured[0].scores()
    results = []
    pruned = [one for one in measured if one.configuration.name not in (UNPRUNED, BLIND)]
    for one in measured:
        configuration, scores, agreement = one.configuration, one.scores(), one.agreement()
        itself = one is measured[0]
        is_pruned = configuration.name not in (UNPRUNED, BLIND)
        ours = _compared_with(one, pruned) if is_pruned else None

        def result(chosen: np.ndarray, one: Measured = one, itself: bool = itself) -> KindResult:
            scores, marked = one.scores(), chosen & known
            kept = bootstrap.retention(scores, reference, marked)
            return KindResult(
                int(chosen.sum()),
                float(one.agreement()[chosen].mean()),
                float(one.divergence()[chosen].mean()),
                _defined(bootstrap.mean(scores, marked)),
                _defined(_by_definition(kept) if itself else kept),
            )

        results.append(
            Result(
                configuration.name,
                configuration.budget,
                _share(source, configuration),
                used(source, configuration),
                {
                    key: value
                    for key, value in configuration.to_json().items()
                    if key in ("threshold", "probe", "positions") and value is not None
                },
                result(np.ones(len(questions), bool)),
                _by_definition(bootstrap.mean(agreement)) if itself else bootstrap.mean(agreement),
                {kind: result(chosen) for kind, chosen in kinds.items()},
                _defined(bootstrap.difference(ours.scores(), scores, reference, known))
                if ours
                else None,
                _extra(scorer, questions, one),
                ours.configuration.name if ours else None,
                one.ran_as,
            )
        )
    return Results(
        source.name,
        data,
        scorer,
        machine,
        len(questions),
        len({question.picture for question in questions}),
        results,
        int(known.sum()),
        sha256_of(source.bundle.path / MANIFEST) if source.bundle else "",
    )


def _defined(estimate: Estimate) -> Estimate | None:
    return None if math.isnan(estimate.value) else estimate


def _by_definition(estimate: Estimate) -> Estimate:
    """An estimate that is exact, such as the unpruned model's retention of itself."""
    return Estimate(estimate.value, estimate.value, estimate.value)


def _compared_with(one: Measured, pruned: Sequence[Measured]) -> Measured | None:
    """The configuration that one is compared with; None if it is itself the one for its budget.

    Of those within half a point of budget: the one of the first configuration's name that is
    nearest, else the first.
    """

    def apart(other: Measured) -> float:
        return abs(other.configuration.budget - one.configuration.budget)

    near = [other for other in pruned if apart(other) <= SAME_BUDGET + 1e-9]
    leading = [each for each in near if each.configuration.name == pruned[0].configuration.name]
    chosen = min(leading, key=apart) if leading else near[0]
    return None if chosen is one else chosen


def _extra(
    scorer: str, questions: Sequence[Question], one: Measured
) -> dict[str, dict[str, float]]:
    """Further figures of a benchmark by category, and their mean."""
    categories = sorted({q.kind for q in questions if q.reference is not None})
    if scorer != "pope" or not categories:
        return {}

    def summary(category: str) -> dict[str, float]:
        places = [
            place
            for place, question in enumerate(questions)
            if question.kind == category and question.reference is not None
        ]
        labels = [str(questions[place].reference).strip().lower() for place in places]
        return _mean(
            [pope_summary([yes_or_no(run[n].text) for n in places], labels) for run in one.answers]
        )

    found = {category: summary(category) for category in categories}
    return found | ({"mean": _mean(list(found.values()))} if len(found) > 1 else {})


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}


def _share(source: Source, configuration: Configuration) -> float:
    if configuration.blind:
        return 0.0
    visual = source.visual
    return used(source, configuration).average(visual, source.layers) / visual


def _schedule_text(result: Result) -> str:
    options = " ".join(f"{key} {value}" for key, value in result.options.items())
    text = "" if result.schedule is None else str(result.schedule)
    return " ".join(filter(None, [text, f"({options})" if options else ""]))


def _percent(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.value):
        return ""
    return f"{estimate.value:.1%}"


def range_text(estimate: Estimate | None) -> str:
    """A share and its interval, a dash if there is no interval; empty if there is no share."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    if not estimate.known:
        return f"{estimate.value:.1%} (–)"
    if estimate.low == estimate.high:
        return f"{estimate.value:.1%}"
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"
