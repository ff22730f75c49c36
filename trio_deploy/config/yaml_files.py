"""What recipes and targets share: finding, reading and checking a small YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import read_yaml

_PACKAGE = Path(__file__).parents[1]
DTYPES = ("float32", "float16", "bfloat16")


def _shipped(installed: str, checkout: str) -> Path:
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / checkout


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _find(name_or_path: str | Path, folder: Path, kind: str) -> Path:
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    names = _names(folder)
    if text in names:
        return folder / f"{text}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise TrioError(f"There is no {kind} file at {path}.")
    raise TrioError(
        f"There is no {kind} called {text!r}.{_nearest(text, names)} Known are {', '.join(names)}; "
        f"a {kind} of your own is passed as the path of its .yaml file."
    )


def _nearest(text: str, known: Collection[str]) -> str:
    """What may have been meant: names that have all of its words, else the one most like it."""
    words = set(re.split(r"[-_. ]+", text.lower())) - {""}
    near = [name for name in known if words and words <= set(re.split(r"[-_. ]+", name.lower()))]
    if not 1 <= len(near) <= 3:
        near = difflib.get_close_matches(text, list(known), n=1, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _read(file: Path, keys: Collection[str]) -> dict[str, Any]:
    try:
        raw = read_yaml(file, "correct the file")
    except FileNotFoundError:
        raise TrioError(f"there is no file {file}: name one that exists") from None
    if not isinstance(raw, dict):
        raise TrioError(f"{file} must hold keys and values.")
    for key in raw:
        if key not in keys:
            raise TrioError(
                f"{file}: unknown key {key!r}.{_nearest(str(key), keys)} "
                f"Known are {', '.join(keys)}."
            )
    return raw


def _choice(
    file: Path, raw: Mapping[str, Any], key: str, choices: Collection[str], default: str = ""
) -> str:
    value = raw.get(key) or default
    if not value:
        raise TrioError(f"{file}: the key {key!r} is missing; one of {', '.join(choices)}.")
    if value not in choices:
        raise TrioError(
            f"{file}: {key} {value!r} is not possible here.{_nearest(str(value), choices)} "
            f"Choose from {', '.join(choices)}."
        )
    return str(value)


def _text(file: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise TrioError(f"{file}: {key} must be text, not {value!r}.")
    return value
