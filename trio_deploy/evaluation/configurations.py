"""What is compared: schedules with their options, and the bundles that have them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from trio_deploy import __version__
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST, WEIGHTS
from trio_deploy.bundle.weights import dtype_of
from trio_deploy.checkpoint.fingerprint import digest, of_checkpoint, of_files
from trio_deploy.checkpoint.resolve import resolve, source_config
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.recipe import TunedSchedule, is_schedule_file, read_schedule
from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import check_methods, check_positions, request_limits
from trio_deploy.files import is_file, user_path
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.ran_as import require_served, target_name
from trio_deploy.quant.schemes import NO_SCHEME, scheme_of, selections_of
from trio_deploy.runtimes.registry import (
    check_scheme,
    complete_options,
    default_target,
    load_target,
    refuse_uncalibrated,
    require_runnable,
)
from trio_deploy.schedule.budget import for_budget, solve
from trio_deploy.schedule.methods import METHODS
from trio_deploy.schedule.schedule import Schedule

BUNDLES = "bundles"
UNPRUNED = "unpruned"
BLIND = "no picture"
RECIPE = "recipe"
OWN = "own"  # among budgets


@dataclass(frozen=True)
class Configuration:
    """One thing to measure.

    Attributes:
        name: name in tables and charts.
        schedule: pruning points of a bundle to be exported; None: the bundle as it is.
        budget: share of visual tokens that was asked for (1.0: nothing is pruned).
        threshold, probe, positions: options of the selection; None: the model's own.
        seeds: seeds of a random selection; scores are averaged over them.
        blind: ask without the picture.
    """

    name: str
    schedule: Schedule | None
    budget: float
    threshold: float | None = None
    probe: str | None = None
    positions: str | None = None
    seeds: tuple[int, ...] = (0,)
    blind: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "schedule": None if self.schedule is None else self.schedule.to_json(),
            "budget": self.budget,
            "threshold": self.threshold,
            "probe": self.probe,
            "positions": self.positions,
            "seeds": list(self.seeds),
            "blind": self.blind,
        }

    @property
    def key(self) -> str:
        """Checksum of what is measured, independent of its name."""
        what = self.to_json()
        for incidental in ("name", "seeds") + (("budget",) if self.schedule is not None else ()):
            del what[incidental]
        return digest(what)


@dataclass
class Source:
    """A bundle as it is, or a model of which a bundle is exported per schedule.

    Attributes:
        name: the model's name, for reports.
        config: the model's configuration.
        bundle: the bundle, if there is one already.
        dtypes: float types of the checkpoint's weights.
        fingerprint: checksum of the content, independent of its path; answers are stored by it.
        quantize: scheme of the recipe, to quantise by at export; `none` overrides the target's.
        selections: what the recipe says of them.
        stored: scheme that the checkpoint's weights are quantised by already.
    """

    name: str
    config: ModelConfig
    model: str = ""
    bundle: Bundle | None = None
    dtypes: frozenset[str] = frozenset()
    recipe_schedules: dict[str, Schedule] = field(default_factory=dict)
    fingerprint: str = ""
    quantize: str | None = None
    selections: str | None = None
    stored: str | None = None

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> Source:
        """Open a bundle's folder, a recipe, a checkpoint's folder or a hub id.

        Raises:
            TrioError: it is none of them.
        """
        path = Path(model)
        if is_file(path / MANIFEST):
            bundle = Bundle.load(path)
            files = [MANIFEST, *bundle.manifest.files]
            return cls(
                bundle.manifest.model.name,
                bundle.config,
                bundle=bundle,
                fingerprint=of_files(f for name in files if (f := path / name).is_file()),
            )
        from trio_deploy.export.checkpoint import read_checkpoint  # needs onnx-ir, bundles do not

        found = resolve(os.fspath(model), weights_needed=True)
        assert found.folder is not None
        read = read_checkpoint(found.folder)
        return cls(
            found.name,
            replace(read.config, pixels=source_config(found).pixels),
            os.fspath(model),
            dtypes=frozenset(map(dtype_of, read.tensors.values())),
            recipe_schedules=dict(found.recipe.schedules) if found.recipe else {},
            fingerprint=of_checkpoint(found.folder, found.recipe),
            quantize=found.recipe.quantize if found.recipe else None,
            selections=found.recipe.selections if found.recipe else None,
            stored=scheme_of(read.stored).name if read.stored else None,
        )

    @property
    def layers(self) -> int:
        return self.config.text.num_layers

    @property
    def visual(self) -> int:
        """Maximum number of visual tokens of one picture."""
        return request_limits(self.config).visual_tokens


def unpruned(source: Source) -> Configuration:
    """The unpruned model, which everything is compared with."""
    return Configuration(UNPRUNED, None if source.bundle else Schedule(), 1.0)


def used(source: Source, configuration: Configuration) -> Schedule:
    """The schedule in effect: for a bundle as it is, the budget's at the bundle's own layers."""
    if configuration.schedule is not None:
        return configuration.schedule
    if configuration.budget == 1 or source.bundle is None:
        return Schedule()
    return source.bundle.schedule_at(configuration.budget)


def as_exported(source: Source) -> Configuration:
    """A bundle in its own schedule.

    Raises:
        TrioError: the source is no bundle.
    """
    if source.bundle is None:
        raise TrioError(
            "the budget `own` is a bundle's own schedule: pass a bundle, or leave `own` out"
        )
    schedule = source.bundle.schedule
    share = schedule.average(source.visual, source.layers) / source.visual
    return Configuration(_own_name(schedule), schedule, share)


def _own_name(schedule: Schedule) -> str:
    return "+".join(dict.fromkeys(schedule.methods)) or UNPRUNED


def blind(source: Source) -> Configuration:
    """The unpruned model asked without the picture."""
    return Configuration(BLIND, None if source.bundle else Schedule(), 1.0, blind=True)


def grid(
    source: Source,
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    thresholds: Sequence[float | None] = (None,),
    probes: Sequence[str | None] = (None,),
    positions: Sequence[str | None] = (None,),
    seeds: Sequence[int] = (0,),
) -> tuple[list[Configuration], list[str]]:
    """Every method at every budget with every option, and what is not possible.

    Args:
        methods: none for a bundle, which has its own. Else `recipe` (the recipe's schedule for the
            budget) or a selection method: alone in the published schedule's shape, with layers
            (`divprune@0`, `trio@1+5+8`) before those with solved keeps, with `@recipe` in the
            recipe's schedule.
        budgets: average shares of visual tokens per layer.
        seeds: seeds of a random selection.

    Returns:
        The configurations, and a sentence for each that is not possible on the model.

    Raises:
        TrioError: an unknown method, positions that the model does not have, or options and methods
            for a bundle, which has its own.
    """
    options = list(product(thresholds, probes, positions))
    if source.bundle is not None:
        if list(methods) or options != [(None, None, None)]:
            raise TrioError(
                "a bundle has its methods and options already: leave them out, or pass the model "
                "that it was exported from"
            )
        return _at_budgets(source, _own_name(source.bundle.schedule), budgets)
    for position in positions:
        check_positions(source.config, position)
    found: list[Configuration] = []
    refused: list[str] = []
    kinds = {method: _parse(method) for method in methods}
    for method, budget in product(methods, budgets):
        try:
            schedule = _schedule(source, *kinds[method], budget)
        except TrioError as error:
            refused.append(f"{method} at {budget:.1%} is left out: {error}")
            continue
        for threshold, probe, position in options:
            said = [f"τ={threshold:g}"] if threshold is not None and len(thresholds) > 1 else []
            said += [p for p in (probe if len(probes) > 1 else None,
                                 position if len(positions) > 1 else None) if p]  # fmt: skip
            found.append(
                Configuration(
                    " ".join([method, *said]),
                    schedule,
                    budget,
                    threshold,
                    probe,
                    position,
                    tuple(seeds) if _seeded(schedule) else (0,),
                )
            )
    return found, refused


def _seeded(schedule: Schedule) -> bool:
    return any("seed" in METHODS[method].needs for method in schedule.methods)


def _at_budgets(
    source: Source, name: str, budgets: Sequence[float]
) -> tuple[list[Configuration], list[str]]:
    """A bundle at each budget, and a sentence for each budget that it cannot reach."""
    found: list[Configuration] = []
    refused: list[str] = []
    for budget in budgets:
        configuration = Configuration(name, None, budget)
        try:
            used(source, configuration)
        except TrioError as error:
            refused.append(f"{budget:.1%} is left out: {error}")
            continue
        found.append(configuration)
    return found, refused


def named(source: Source, text: str) -> Configuration:
    """Read `NAME=SCHEDULE` or `SCHEDULE`: in the form of `Schedule.parse`, or a schedule file.

    Raises:
        TrioError: the schedule is not possible on this model, or the model is a bundle.
    """
    if source.bundle is not None:
        raise TrioError(
            "a bundle has its schedule already: pass the model that it was exported from"
        )
    name, equals, points = text.partition("=")
    found = schedule_of(points if equals else text)
    schedule = found.schedule
    require_possible(source, found)
    share = schedule.average(source.visual, source.layers) / source.visual
    return Configuration(
        name if equals else str(schedule),
        schedule,
        round(share, 4),
        found.threshold,
        found.probe,
        found.positions,
    )


def require_possible(source: Source, tuned: TunedSchedule) -> None:
    """Raises TrioError if an export of the model would refuse a schedule or its positions."""
    tuned.schedule.validate(source.layers, source.visual)
    check_methods(source.config, tuned.schedule.methods)
    check_positions(source.config, tuned.positions)


def schedule_of(text: str) -> TunedSchedule:
    """Read a schedule, in the form of `Schedule.parse` or from a file.

    Raises:
        TrioError: as `Schedule.parse` and `read_schedule`.
    """
    if is_schedule_file(text):
        return read_schedule(user_path(text))
    return TunedSchedule(Schedule.parse(text))


def _parse(text: str) -> tuple[str, list[int] | str | None]:
    """A method and its layers, `recipe` for those of the recipe, or None if none are named."""
    kind, at, places = text.partition("@")
    if kind != RECIPE and kind not in METHODS:
        raise TrioError(
            f"unknown method {kind!r}: choose from {RECIPE}, {', '.join(METHODS)}; METHOD@LAYER, "
            f"METHOD@LAYER+LAYER or METHOD@{RECIPE} says where it prunes"
        )
    if places == RECIPE:
        return kind, RECIPE
    try:
        return kind, [int(place) for place in places.split("+")] if at else None
    except ValueError:
        raise TrioError(f"{text!r} must be METHOD@LAYER or METHOD@LAYER+LAYER") from None


def _schedule(source: Source, kind: str, layers: list[int] | str | None, budget: float) -> Schedule:
    if kind == RECIPE or isinstance(layers, str):
        schedule = for_budget(budget, source.layers, source.recipe_schedules)
        schedule = schedule if kind == RECIPE else schedule.with_method(kind)
    else:
        schedule = solve(budget, source.layers, layers=layers).with_method(kind)
    require_possible(source, TunedSchedule(schedule))
    return schedule


def _completed(bundle: Bundle, options: RuntimeOptions) -> list[str | None]:
    """What a bundle runs with, whether it was asked for or is the bundle's own."""
    options = complete_options(bundle, options)
    precision = options.precision or bundle.manifest.dtype
    return [options.runtime, target_name(bundle, options), options.provider, precision]


class Bundles:
    """Bundles of one model for many schedules, exported on first use.

    They stay under `folder` for the next run and share one copy of the weights: hard links to the
    checkpoint if the float type is the same, else to the first bundle's.

    Attributes:
        scheme: by which their weights are quantised; None: they are float.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        options: RuntimeOptions | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        selections: str | None = None,
    ) -> None:
        """Check that the source can be run so.

        Args:
            options: how bundles are run.
            dtype: float type of exported bundles; None: the target's.
            quantize: scheme of exported bundles; None: the recipe's, else the target's.
            selections: what their selections compute with, as of `ExportOptions`.

        Raises:
            TrioError: there is no such target, it is of another runtime than the one named, this
                machine cannot run it, it does not take the scheme, or that needs a calibration, or
                a bundle that exists cannot serve it.
        """
        options = options or RuntimeOptions()
        self._source = source
        self._folder = folder
        self._options = options
        self._dtype = dtype
        self._quantize, self._selections = quantize, selections
        if isinstance(options.target, Target):
            raise TrioError("an evaluation exports for a target's name or file: pass one of them")
        self._target_name = options.target or ""
        if source.bundle is None:
            self._target_name = options.target or default_target(options.runtime)
            # The contents of a target's file, not its path.
            target = load_target(self._target_name)
            require_runnable(options, target if dtype is None else replace(target, dtype=dtype))
            usual = source.quantize or target.quantize
            chosen = check_scheme(target, quantize or usual)
            self.scheme = source.stored or chosen
            if source.stored is None:
                refuse_uncalibrated(chosen, target)
            # What is exported anyway is not named: its answers are those of a run without a name.
            self._quantize = None if (chosen or NO_SCHEME) == (usual or NO_SCHEME) else quantize
            said = (source.selections, target.selections)
            rounded = source.stored is not None
            kind = selections_of(selections, said, self.scheme, rounded)
            own = selections_of(None, said, self.scheme, rounded)
            self._selections = None if kind == own else kind
            content = json.dumps(asdict(target), default=str)
            asked = [content, dtype, options.runtime, options.provider]
            self._run = asked + [each for each in (options.precision, *self._stored_as()) if each]
        else:
            quantization = source.bundle.manifest.quantization
            self.scheme = quantization.scheme if quantization else None
            if quantize not in (None, self.scheme or NO_SCHEME):
                raise TrioError(
                    f"{source.bundle.path} has weights in {self.scheme or 'floats'}: leave "
                    "--quantize out, or pass the model that it was exported from"
                )
            if selections not in (None, quantization and quantization.selections):
                raise TrioError(
                    f"{source.bundle.path} has "
                    + (f"selections in {quantization.selections}" if quantization else "floats")
                    + ": leave --selections out, or pass the model that it was exported from"
                )
            require_served(source.bundle, options, dtype)
            self._run = _completed(source.bundle, options)
        self._open: tuple[str, Pipeline] | None = None
        self._shapes: dict[str, Configuration] = {}

    def pipeline(self, configuration: Configuration) -> Pipeline:
        """Open the pipeline of a configuration; the previous one is closed.

        Raises:
            TrioError: what exporting or opening raises.
        """
        key = self._key(configuration)
        if self._open is None or self._open[0] != key:
            self._open = None
            options = self._options
            if self._source.bundle is None:  # it was exported for the target
                options = replace(options, target=None)
            self._open = (key, Pipeline.open(self.bundle(configuration), options))
        return self._open[1]

    def close(self) -> None:
        """Close the pipeline that is open, before another model is opened."""
        self._open = None

    def identity(self, configuration: Configuration) -> str:
        """Checksum of what answers: model content, options, configuration, package version."""
        return digest([self._source.fingerprint, *self._run, configuration.key, __version__])

    def shape(self, configuration: Configuration) -> str:
        """Checksum of what the bundle's graphs depend on: everything except the numbers kept."""
        assert configuration.schedule is not None
        points = configuration.schedule.points
        places = [(point.layer, point.method) for point in points]
        chosen = (configuration.threshold, configuration.probe, configuration.positions)
        return digest([places, *chosen])

    def shaped(self, configuration: Configuration) -> Pipeline:
        """A pipeline that answers for the configuration if requests pass `keep`."""
        like = self._shapes.setdefault(self.shape(configuration), configuration)
        return self.pipeline(like)

    def _key(self, configuration: Configuration) -> str:
        what = configuration.to_json()
        for incidental in ("name", "seeds", "budget", "blind"):
            del what[incidental]
        run = self._run[:2]
        return digest([self._source.fingerprint, run, *self._stored_as(), what, __version__])

    def _stored_as(self) -> list[str]:
        """How weights are stored where that is not what the recipe and the target say."""
        selections = f"selections {self._selections}" if self._selections else None
        return [each for each in (self._quantize, selections) if each]

    def bundle(self, configuration: Configuration) -> Bundle:
        """The configuration's bundle, exported if it does not exist yet."""
        if self._source.bundle is not None:
            return self._source.bundle
        out = self._folder / self._key(configuration)
        if (out / MANIFEST).is_file():
            return Bundle.load(out)
        from trio_deploy.export.job import export_model  # needs the extra `export`

        bundle = export_model(
            self._source.model,
            out,
            schedule=configuration.schedule,
            threshold=configuration.threshold,
            probe=configuration.probe,
            positions=configuration.positions,
            target=self._target_name,
            dtype=self._dtype,
            quantize=self._quantize,
            selections=self._selections,
            link_weights=self._linkable(),
            progress=False,
        )
        self._share(bundle)
        return bundle

    def _linkable(self) -> bool:
        dtype = self._dtype or load_target(self._target_name).dtype
        return self.scheme is None and self._source.dtypes == {dtype}

    def _share(self, bundle: Bundle) -> None:
        """Replace weights that another bundle here has too by hard links to those."""
        others = [p for p in sorted(self._folder.iterdir()) if (p / MANIFEST).is_file()]
        for other in (p for p in others if p != bundle.path):
            known = Bundle.load(other).manifest.files
            for name, info in bundle.manifest.files.items():
                same = known.get(name)
                if not name.startswith(f"{WEIGHTS}/") or info.sha256 is None or same != info:
                    continue
                spare = bundle.path / f"{name}.linked"
                with suppress(OSError):  # without hard links the copy stays
                    os.link(other / name, spare)
                    spare.replace(bundle.path / name)
            return
