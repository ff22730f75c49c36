"""The small files of a checkpoint: values that make no sense are refused by their keys."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import EOS
from trio_deploy import TrioError
from trio_deploy.checkpoint.processor_files import Assets, checkpoint_assets
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.families.registry import parse_config


@pytest.fixture
def folder(llava_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint's small files, to change."""
    small = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(llava_checkpoint, tmp_path / "c", ignore=small))


def _edit(file: Path, *path: str, value: Any) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    section = raw
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    file.write_text(json.dumps(raw))


def _read(folder: Path) -> Assets:
    raw = from_folder(folder).raw_config
    return checkpoint_assets(folder, parse_config(raw), raw, preprocessing=None, chat_template=None)


PLACES = (("generation_config.json",), ("config.json",), ("config.json", "text_config"))


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("place", PLACES, ids=":".join)
def test_a_token_id_that_is_none_is_refused_by_its_key(folder, place, key):
    for _, *section in PLACES:  # whatever would be asked first
        _edit(folder / "config.json", *section, key, value=None)
    _edit(folder / "generation_config.json", key, value=None)
    for value in ("x", "2", -2, 1.0, True, {}, [2, "x"], [[2]], 10**12, [2] * 257, math.nan):
        _edit(folder / place[0], *place[1:], key, value=value)
        with pytest.raises(TrioError, match=rf"{place[0]}.*{key}"):
            _read(folder)
    _edit(folder / place[0], *place[1:], key, value=-1)  # some configurations' word for none
    _read(folder)


def test_several_tokens_may_end_an_answer(folder):
    assert _read(folder).generation.eos_token_ids == (EOS,)
    _edit(folder / "generation_config.json", "eos_token_id", value=[2, 7, -1])
    assert _read(folder).generation.eos_token_ids == (2, 7)
