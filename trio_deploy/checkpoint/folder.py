"""The files of a checkpoint folder: whether one is there, and the JSON objects in them."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import read_json


def has_file(file: Path) -> bool:
    """Whether a checkpoint has a file; a link that leads nowhere is not the same as none.

    Raises:
        TrioError: it is a link to what does not exist, a link in a circle, or no regular file.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if file.is_symlink():
            raise TrioError(
                f"{file} is a link to {file.readlink()}, which does not exist: download the "
                "checkpoint again"
            ) from None
        return False
    except OSError as error:
        raise TrioError(
            f"{file} cannot be read ({error.strerror}): download the checkpoint again"
        ) from error
    if not stat.S_ISREG(mode):
        raise TrioError(f"{file} is not a file: download the checkpoint again")
    return True


def read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None where there is no file.

    Raises:
        TrioError: it is not a JSON object, or as `has_file`.
    """
    if not has_file(file):
        return None
    raw = read_json(file, "download it again")
    if not isinstance(raw, dict):
        raise TrioError(f"{file} does not hold a JSON object: download it again")
    return raw


def image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings of a checkpoint folder, empty where there are none.

    transformers 5 keeps them inside processor_config.json and looks there first; before, they had
    a file of their own.

    Raises:
        TrioError: one of the files is not a JSON object.
    """
    inside = (read_object(folder / "processor_config.json") or {}).get("image_processor")
    if isinstance(inside, dict):
        return inside
    return read_object(folder / "preprocessor_config.json") or {}
