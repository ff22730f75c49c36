"""What --model means: a recipe, a checkpoint folder, or a hub id found in the local cache."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trio_deploy.checkpoint.folder import image_settings, read_object, refuse_adapter
from trio_deploy.checkpoint.hub import Part, hub_folder
from trio_deploy.config.recipe import Recipe, list_recipes, read_recipe, recipe_name
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.preprocessing import Preprocessor, with_max_pixels
from trio_deploy.families.registry import check_positions, parse_config
from trio_deploy.files import exists, is_folder, user_path

#: What a bundle has and a checkpoint has not.
MANIFEST = "manifest.json"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# What to do without reaching the hub: a recipe's graphs can be had, other models need config.json.
_RECIPE = (
    "pass the folder as --model FOLDER, or pass --graphs-only, which needs no weights, and "
    "`trio attach-weights` later"
)
_NO_RECIPE = "pass the folder as --model FOLDER, or a recipe's name as --model"


@dataclass(frozen=True)
class Source:
    """A resolved --model: its configuration, and the checkpoint folder where there is one."""

    name: str
    source: str
    revision: str | None
    raw_config: dict[str, Any]
    folder: Path | None
    recipe: Recipe | None


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by its name or from a file, completed from its checkpoint where it names one.

    Raises:
        TrioError: no such recipe, a key or value that is wrong, or schedules or preprocessing
            that do not fit the architecture.
    """
    recipe = read_recipe(name_or_path)
    if recipe.checkpoint is not None:
        architecture = recipe.architecture or read_object(recipe.checkpoint / "config.json")
        preprocessing = recipe.preprocessing or image_settings(recipe.checkpoint)
        if architecture is None:
            raise TrioError(f"{recipe.file}: `architecture` and `preprocessing` must be mappings")
        recipe = replace(recipe, architecture=architecture, preprocessing=preprocessing)
    try:
        config = parse_config(recipe.architecture)
        settings = with_max_pixels(recipe.preprocessing, config, recipe.max_pixels)
        Preprocessor(settings, config)
        check_positions(config, recipe.positions)
        for schedule in recipe.schedules.values():
            schedule.validate(config.text.num_layers)
    except TrioError as error:
        raise TrioError(f"{recipe.file}: {error}") from None
    return recipe


def source_config(source: Source, max_pixels: int | None = None) -> ModelConfig:
    """The model's dimensions, with the sizes that preprocessing settings at hand give pictures.

    Args:
        max_pixels: as of `settings_of`.

    Raises:
        TrioError: config.json or the settings make no sense.
    """
    config = parse_config(source.raw_config)
    own = image_settings(source.folder) if source.folder is not None else None
    settings = settings_of(source, own, config, max_pixels)
    if config.pixels is None or not settings:
        return config
    return Preprocessor(settings, config).config


def settings_of(
    source: Source, own: Mapping[str, Any] | None, config: ModelConfig, max_pixels: int | None
) -> dict[str, Any]:
    """Image preprocessing settings: the checkpoint's own, else the recipe's; empty: unknown.

    Args:
        own: of the checkpoint, where there is one.
        max_pixels: most pixels that a picture is resized to; None: as the recipe or, if it says
            nothing, the settings say.

    Raises:
        TrioError: pictures of this model do not keep their sizes.
    """
    recipe = source.recipe
    raw = own or (recipe.preprocessing if recipe else {})
    if max_pixels is None and recipe is not None:
        max_pixels = recipe.max_pixels
    return with_max_pixels(raw, config, max_pixels)


def recipe_for(hub_id: str) -> Recipe | None:
    """The shipped recipe of a model on the hub, None where there is none."""
    name = recipe_name(hub_id)
    return load_recipe(name) if name else None


def described(model: str) -> Source | None:
    """What a recipe says of a model without its checkpoint; None where only that knows.

    Raises:
        TrioError: the recipe cannot be read.
    """
    if model in list_recipes() or Path(model).suffix in (".yaml", ".yml"):
        recipe = load_recipe(model)
    elif HUB_ID.fullmatch(model) is None or exists(Path(model)):
        return None
    elif (known := recipe_for(model)) is not None:
        recipe = known
    else:
        return None
    return None if recipe.checkpoint is not None else _from_recipe(recipe, weights_needed=False)


def name_of(model: str) -> str:
    """`Source.name` of what `resolve` finds, without its checkpoint.

    Raises:
        TrioError: a recipe's file cannot be read.
    """
    path = user_path(model)
    if model in list_recipes() or path.suffix in (".yaml", ".yml"):
        return read_recipe(model).name
    if is_folder(path):
        return path.resolve().name
    known = recipe_name(model) if HUB_ID.fullmatch(model) else None
    return known or model


def resolve(model: str, weights_needed: bool) -> Source:
    """Finds what --model means: a recipe's name or file, a checkpoint folder, a hub id."""
    text = str(model)
    path = user_path(text)
    recipes = list_recipes()
    if text in recipes or path.suffix in (".yaml", ".yml"):
        return _from_recipe(load_recipe(text), weights_needed)
    if is_folder(path):
        return from_folder(path)
    if HUB_ID.fullmatch(text) and not exists(path):
        if (known := recipe_for(text)) is not None:
            return _from_recipe(known, weights_needed)
        unneeded: list[Part] = [] if weights_needed else ["weights"]
        folder, revision = hub_folder(text, _NO_RECIPE, unneeded=unneeded)
        return replace(from_folder(folder), name=text, source=text, revision=revision)
    if exists(path):
        raise TrioError(f"{text} is a file: pass a checkpoint's folder, a hub id or a recipe")
    if "/" in text or os.sep in text:
        raise TrioError(
            f"the folder {text} does not exist: pass a checkpoint's folder, a hub id (org/name) "
            f"or one of the recipes {', '.join(recipes)}"
        )
    near = difflib.get_close_matches(text, recipes, n=1)
    raise TrioError(
        f"unknown model {text!r}: it is neither a folder nor a hub id (org/name) nor a recipe"
        + (f"; did you mean {near[0]}?" if near else ".")
        + f" The recipes are {', '.join(recipes)}"
    )


def _from_recipe(recipe: Recipe, weights_needed: bool) -> Source:
    if recipe.checkpoint is not None:
        found = from_folder(recipe.checkpoint)
        return replace(found, name=recipe.name, source=recipe.name, recipe=recipe)
    source = recipe.hub_id or recipe.name
    if not weights_needed:
        return Source(recipe.name, source, None, dict(recipe.architecture), None, recipe)
    if not recipe.hub_id:
        raise TrioError(
            f"the recipe {recipe.name} names no checkpoint: pass the checkpoint's folder as "
            "--model, or --graphs-only"
        )
    unneeded: list[Part] = ["preprocessing"] if recipe.preprocessing else []
    if recipe.chat_template:
        unneeded.append("template")
    folder, revision = hub_folder(recipe.hub_id, _RECIPE, unneeded=unneeded)
    found = from_folder(folder)
    return replace(found, name=recipe.name, source=source, revision=revision, recipe=recipe)


def from_folder(folder: Path) -> Source:
    """A checkpoint folder's configuration.

    Raises:
        TrioError: there is no folder, it is no checkpoint, or its config.json cannot be read.
    """
    raw = read_object(folder / "config.json")
    if raw is None:
        if not is_folder(folder):
            raise TrioError(f"there is no folder {folder}: pass a checkpoint's folder")
        if (folder / MANIFEST).is_file():
            raise TrioError(
                f"{folder} is a bundle, which has been exported already: pass the checkpoint that "
                "it was made from"
            )
        refuse_adapter(folder)
        raise TrioError(
            f"{folder} has no config.json, so it is not a checkpoint: pass a folder that "
            "transformers' save_pretrained wrote"
        )
    name = folder.resolve().name
    return Source(name, name, None, raw, folder, None)
