"""The files of a checkpoint folder: whether one is there, JSON objects, and what they hold."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import brief, read_json, read_text

_ADAPTER = "adapter_config.json"  # PEFT's
_TEMPLATES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


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
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        name = file if len(file.name) < 256 else file.with_name(f"{file.name[:80]}…")
        reason = getattr(error, "strerror", error)
        raise TrioError(
            f"{name} cannot be read ({reason}): download the checkpoint again"
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


def refuse_adapter(folder: Path) -> None:
    """Raises TrioError where a folder has an adapter, which transformers would add to a model."""
    if has_file(folder / _ADAPTER):
        raise TrioError(
            f"{folder} holds an adapter that was not merged ({_ADAPTER}): merge it first, e.g. "
            "with PEFT's merge_and_unload(), save the result and export that; if the weights have "
            f"it in them already, remove {_ADAPTER}"
        )


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


def read_template(folder: Path) -> str | None:
    """The chat template, None where there is none or nothing is in it.

    The places are those of transformers' releases, in the order in which the processors of
    transformers 5 take them; tokenizer_config.json, which only tokenizers read, comes last.

    Raises:
        TrioError: one of the files is damaged, or what it calls a chat template is none.
    """
    for name in _TEMPLATES:
        file = folder / name
        if file.suffix == ".jinja":
            template = read_text(file, "download it again") if has_file(file) else None
        else:
            template = _template_inside(file)
        if template and not template.isspace():
            return template
    return None


def _template_inside(file: Path) -> str | None:
    """The chat template inside a JSON file; of named ones the default."""
    template = (read_object(file) or {}).get("chat_template")
    if isinstance(template, list) and all(isinstance(item, dict) for item in template):
        named = {str(item.get("name")): item.get("template") for item in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TrioError(
            f"{file}: chat_template must be text or a list of named texts, not {brief(template)}"
        )
    return template
