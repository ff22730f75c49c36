"""Recipes (export/*.yaml): what export needs to know about a model apart from its weights.

They are data that users copy, edit and pass by path. Every key is checked here; whether a recipe
fits the architecture it names is checked in checkpoint/resolve.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trio_deploy.config.options import DEFAULT_THRESHOLD, ExportOptions, SelectionOptions
from trio_deploy.config.target import SELECTIONS
from trio_deploy.config.yaml_files import (
    PACKAGE,
    choice,
    find_file,
    names_in,
    read_keys,
    shipped_folder,
    text_of,
)
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder, user_path
from trio_deploy.schedule.budget import is_budget, read_budget
from trio_deploy.schedule.schedule import Schedule

#: `checkpoint: package:data/tiny` in a recipe is a folder inside the installed package.
_IN_PACKAGE = "package:"

PROBES = ("last", "shifted")
POSITIONS = ("renumber", "original")

_TUNED_KEYS = ("schedules", "threshold", "probe", "positions")
_RECIPE_KEYS = (
    "description",
    "hub_id",
    "checkpoint",
    "architecture",
    "preprocessing",
    "max_pixels",
    "schedules",
    "probe",
    "positions",
    "threshold",
    "chat_template",
    "quantize",
    "selections",
)


@dataclass(frozen=True)
class Recipe:
    """What export needs to know about a model, apart from its weights.

    Attributes:
        name: name of the file without its ending.
        file: path of the recipe.
        hub_id: id of the checkpoint on the Hugging Face hub; None if it is not there.
        checkpoint: local checkpoint folder; None if the recipe names none.
        architecture: a config.json with every size written out; empty if the checkpoint's own is
            used. `preprocessing` may be left to the checkpoint in the same way.
        schedules: budget, as written in the recipe ("0.111"), or name → schedule.
        probe: position of the probe tokens, `last` or `shifted`.
        positions: position ids after pruning, `renumber` or `original`; None: the family's.
        threshold: cosine similarity at which a kept token suppresses another, in (0, 1].
        preprocessing: a preprocessor_config.json.
        max_pixels: most pixels that a picture is resized to, whatever the checkpoint's own
            preprocessor_config.json says; None: as it says.
        chat_template: Jinja template for checkpoints without one.
        quantize: scheme to quantise by, as of `ExportOptions`.
        selections: what selections compute with beside quantised weights, as of `ExportOptions`.
    """

    name: str
    file: Path
    hub_id: str | None
    architecture: dict[str, Any]
    schedules: dict[str, Schedule]
    probe: str = "last"
    positions: str | None = None
    threshold: float = DEFAULT_THRESHOLD
    preprocessing: dict[str, Any] = field(default_factory=dict)
    max_pixels: int | None = None
    chat_template: str | None = None
    checkpoint: Path | None = None
    description: str = ""
    quantize: str | None = None
    selections: str | None = None


@dataclass(frozen=True)
class TunedSchedule:
    """A schedule file, as `trio tune` writes it: a schedule, and what it was found with.

    Attributes:
        threshold, probe, positions: as of `Recipe`; None: the model's own.
    """

    schedule: Schedule
    threshold: float | None = None
    probe: str | None = None
    positions: str | None = None


def is_schedule_file(text: str) -> bool:
    """Whether a schedule's text is the name of a file."""
    return Path(text).suffix in (".yaml", ".yml")


def read_schedule(file: Path) -> TunedSchedule:
    """Read a schedule file.

    Raises:
        TrioError: there is no such file, an unknown key, a wrong value, or not one schedule in it.
    """
    raw = read_keys(file, _TUNED_KEYS)
    schedules = _schedules(file, raw.get("schedules", {}))
    if len(schedules) != 1:
        raise TrioError(f"{file} has {len(schedules)} schedules: a schedule file has one")
    return TunedSchedule(
        next(iter(schedules.values())),
        _threshold(file, raw["threshold"]) if "threshold" in raw else None,
        choice(file, raw, "probe", PROBES) if "probe" in raw else None,
        choice(file, raw, "positions", POSITIONS) if "positions" in raw else None,
    )


def with_schedule_file(options: ExportOptions) -> ExportOptions:
    """The options with what the schedule file holds that they name, if they name one.

    Options of selections that are given stay as they are.

    Raises:
        TrioError: as `read_schedule`.
    """
    if not isinstance(options.schedule, str) or not is_schedule_file(options.schedule):
        return options
    found = read_schedule(user_path(options.schedule))
    given = options.selection
    selection = SelectionOptions(
        probe=given.probe or found.probe,
        positions=given.positions or found.positions,
        threshold=found.threshold if given.threshold is None else given.threshold,
    )
    return replace(options, schedule=found.schedule, selection=selection)


def recipe_folder() -> Path:
    """Folder of the shipped recipes: in an installed package, or export/ of a checkout."""
    return shipped_folder("recipes", "export")


def list_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return names_in(recipe_folder())


def read_recipe(name_or_path: str | Path) -> Recipe:
    """Parse a recipe, by name or from a file.

    Raises:
        TrioError: no such recipe, an unknown or missing key, or a wrong value.
    """
    file = find_file(name_or_path, recipe_folder(), "recipe")
    raw = _with_schedule_files(file, read_keys(file, _RECIPE_KEYS))
    checkpoint = _checkpoint(file, raw)
    architecture, preprocessing = raw.get("architecture"), raw.get("preprocessing", {})
    if checkpoint is not None:
        architecture, preprocessing = architecture or {}, preprocessing or {}
    if not isinstance(architecture, dict) or not isinstance(preprocessing, dict):
        raise TrioError(
            f"{file}: `architecture` and `preprocessing` are not mappings: write keys and values"
        )
    return Recipe(
        name=file.stem,
        file=file,
        hub_id=text_of(file, raw, "hub_id"),
        architecture=architecture,
        schedules=_schedules(file, raw.get("schedules", {})),
        probe=choice(file, raw, "probe", PROBES, "last"),
        positions=choice(file, raw, "positions", POSITIONS) if "positions" in raw else None,
        threshold=_threshold(file, raw.get("threshold", DEFAULT_THRESHOLD)),
        preprocessing=preprocessing,
        max_pixels=_max_pixels(file, raw),
        chat_template=text_of(file, raw, "chat_template"),
        checkpoint=checkpoint,
        description=text_of(file, raw, "description") or "",
        quantize=text_of(file, raw, "quantize"),
        selections=choice(file, raw, "selections", SELECTIONS) if "selections" in raw else None,
    )


def recipe_name(hub_id: str) -> str | None:
    """Name of the shipped recipe of a model on the hub; None if there is none."""
    for name in list_recipes():
        if read_keys(recipe_folder() / f"{name}.yaml", _RECIPE_KEYS).get("hub_id") == hub_id:
            return name
    return None


def _with_schedule_files(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys with schedules in place of the names of their files, and their options.

    Raises:
        TrioError: as `read_schedule`, or options that differ from the recipe's or another file's.
    """
    schedules = raw.get("schedules", {})
    if not isinstance(schedules, dict):
        return raw
    raw = {**raw, "schedules": dict(schedules)}
    for budget, name in schedules.items():
        if not isinstance(name, str):
            continue
        found = read_schedule(file.parent / user_path(name))
        raw["schedules"][budget] = found.schedule.to_json()
        for key in ("threshold", "probe", "positions"):
            value = getattr(found, key)
            if value is not None and raw.setdefault(key, value) != value:
                raise TrioError(
                    f"{file}: the schedule {budget} was found with {key} {value} ({name}), and a "
                    f"recipe has one {key} for all, here {raw[key]}: tune again with it"
                )
    return raw


def _threshold(file: Path, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise TrioError(
            f"{file}: threshold must be a cosine similarity above 0 and at most 1, not {value!r}"
        )
    return float(value)


def _max_pixels(file: Path, raw: Mapping[str, Any]) -> int | None:
    value = raw.get("max_pixels")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise TrioError(f"{file}: max_pixels must be a whole number of pixels, not {value!r}")
    return value


def _schedules(file: Path, raw: Any) -> dict[str, Schedule]:
    if not isinstance(raw, dict):
        raise TrioError(
            f"{file}: `schedules` is not a mapping: write budgets with lists of pruning points"
        )
    schedules = {}
    for budget, points in raw.items():
        try:
            if is_budget(str(budget)):
                read_budget(str(budget))
        except TrioError as error:
            raise TrioError(f"{file}, budget {budget!r} in `schedules`: {error}") from None
        try:
            schedules[str(budget)] = Schedule.from_json(points)
        except TrioError as error:
            raise TrioError(f"{file}, schedule {budget}: {error}") from None
    return schedules


def _checkpoint(file: Path, raw: Mapping[str, Any]) -> Path | None:
    value = text_of(file, raw, "checkpoint")
    if value is None:
        return None
    if value.startswith(_IN_PACKAGE):
        folder = PACKAGE / value.removeprefix(_IN_PACKAGE)
    else:
        folder = file.parent / user_path(value)
    if not is_folder(folder):
        raise TrioError(f"{file}: there is no checkpoint folder at {folder}: correct `checkpoint`")
    return folder
