"""Small YAML files, such as recipes and targets: find, read and check them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import is_file, read_yaml, user_path

PACKAGE = Path(__file__).parents[1]
DTYPES = ("float32", "float16", "bfloat16")


def shipped_folder(installed: str, checkout: str) -> Path:
    """Folder of shipped files: in the installed package, or beside it in a checkout."""
    inside = PACKAGE / installed
    return inside if inside.is_dir() else PACKAGE.parent / checkout


def names_in(folder: Path) -> list[str]:
    """Names of the YAML files in a folder, without their ending."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find_file(name_or_path: str | Path, folder: Path, kind: str) -> Path:
    """File of a name in `folder`, or a path as it is.

    Args:
        kind: what the file is, for messages: `recipe` or `target`.

    Raises:
        TrioError: there is no such file.
    """
    text, path = str(name_or_path), user_path(name_or_path)
    names = names_in(folder)
    if text in names:
        return folder / f"{text}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if is_file(path):
            return path
        raise TrioError(f"there is no {kind} file at {path}: correct the path")
    raise TrioError(
        f"there is no {kind} called {text!r}{nearest(text, names)}; known are {', '.join(names)}; "
        f"pass a {kind} of your own as the path of its .yaml file"
    )


def nearest(text: str, known: Collection[str]) -> str:
    """Suggest known names with all words of `text`, else the most similar one; "" if none."""
    words = set(re.split(r"[-_. ]+", text.lower())) - {""}
    near = [name for name in known if words and words <= set(re.split(r"[-_. ]+", name.lower()))]
    if not 1 <= len(near) <= 3:
        near = difflib.get_close_matches(text, list(known), n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def read_keys(file: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read a YAML mapping with no other keys than `keys`.

    Raises:
        TrioError: the file is missing, is not a mapping, or has an unknown key.
    """
    try:
        raw = read_yaml(file, "correct the file")
    except FileNotFoundError:
        raise TrioError(f"there is no file {file}: name one that exists") from None
    if not isinstance(raw, dict):
        raise TrioError(f"{file} is not a mapping: write keys and values")
    for key in raw:
        if key not in keys:
            raise TrioError(
                f"{file}: unknown key {key!r}{nearest(str(key), keys)}; known are {', '.join(keys)}"
            )
    return raw


def choice(
    file: Path, raw: Mapping[str, Any], key: str, choices: Collection[str], default: str = ""
) -> str:
    """Value of a key, one of `choices`; `default` if the key is missing.

    Raises:
        TrioError: another value, or a missing key without a default.
    """
    value = raw.get(key) or default
    if not value:
        raise TrioError(f"{file}: the key {key!r} is missing: choose one of {', '.join(choices)}")
    if value not in choices:
        raise TrioError(
            f"{file}: {key} cannot be {value!r}{nearest(str(value), choices)}: choose one of "
            f"{', '.join(choices)}"
        )
    return str(value)


def text_of(file: Path, raw: Mapping[str, Any], key: str) -> str | None:
    """Text of a key; None if it is missing.

    Raises:
        TrioError: the value is not text.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise TrioError(f"{file}: {key} must be text, not {value!r}")
    return value
