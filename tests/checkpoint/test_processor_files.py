"""The small files of a checkpoint: values that make no sense are refused by their keys."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tests.support.chat_templates import KNOWN
from tests.support.checkpoints import EOS
from trio_deploy import TrioError
from trio_deploy.checkpoint.processor_files import (
    Assets,
    checkpoint_assets,
    planned_assets,
    read_chosen_template,
)
from trio_deploy.checkpoint.resolve import Source, from_folder, load_recipe
from trio_deploy.families.registry import parse_config

RECIPE = "of the recipe {{ messages }}"


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


def _template(folder: Path, chosen: str | None, recipe: str | None = None) -> bytes | None:
    raw = from_folder(folder).raw_config
    assets = checkpoint_assets(
        folder,
        parse_config(raw),
        raw,
        preprocessing=None,
        chat_template=recipe,
        chosen_template=chosen,
    )
    return assets.files.get("chat_template.jinja")


def test_a_checkpoint_without_a_chat_template_is_refused_unless_one_is_given(folder, tmp_path):
    own = _template(folder, None)
    assert own and _template(folder, None, RECIPE) == own
    (folder / "chat_template.jinja").unlink()
    assert _template(folder, None, RECIPE) == RECIPE.encode()
    with pytest.raises(TrioError, match="pass --chat-template FILE .* --chat-template none for a"):
        _template(folder, None)
    assert _template(folder, read_chosen_template("none"), RECIPE) is None
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    for given in (file, str(file)):
        assert _template(folder, read_chosen_template(given), "other") == b"{{ messages }}"
    assert read_chosen_template(None) is None


def test_a_chat_template_that_is_none_is_refused_at_export(folder, tmp_path):
    with pytest.raises(TrioError, match="there is no file .*missing.jinja: pass a jinja2 file"):
        read_chosen_template(tmp_path / "missing.jinja")
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(TrioError, match=r"empty\.jinja is empty"):
        read_chosen_template(tmp_path / "empty.jinja")
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TrioError, match="the chat template does not parse"):
        _template(folder, None)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("nowhere")
    with pytest.raises(TrioError, match="is a link to nowhere"):
        _template(folder, None)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_chat_template_with_nothing_in_it_is_refused_at_export(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(TrioError, match="has no chat template .* pass --chat-template FILE"):
        _template(folder, None)
    assert _template(folder, None, RECIPE) == RECIPE.encode()


@pytest.mark.parametrize(
    "template",
    [
        "USER: <image> ASSISTANT:",
        "{{ messages[0].text }}",
        "{% for m in messages %}{{ m.role }}: {{ m.contents }}{% endfor %}",
        "{% if 'image' in messages | string %}<image>{% else %}{{ messages }}{% endif %}",
    ],
)
def test_a_chat_template_that_leaves_out_questions_is_refused_at_export(folder, template):
    what = "leaves out the text of a question about a picture,"
    with pytest.raises(TrioError, match=f"{what} .*--chat-template FILE"):
        _template(folder, template)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(TrioError, match=f"{what} .*--chat-template none"):
        _template(folder, None)


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipes_template_is_checked_before_there_is_a_tokenizer(name):
    """Templates write tokens that only the tokenizer's files name."""
    recipe = load_recipe("llava-1.5-7b")
    raw = recipe.architecture
    recipe = replace(recipe, chat_template=KNOWN[name].source)
    assets = planned_assets(Source("x", "x", None, raw, None, recipe), parse_config(raw))
    assert assets.notes == ()
    assert assets.files["chat_template.jinja"] == KNOWN[name].source.encode()
    recipe = replace(recipe, chat_template="{{ bos_token + pad_token + unk_token + image_token }}")
    with pytest.raises(TrioError, match="leaves out the text of a question about a picture"):
        planned_assets(Source("x", "x", None, raw, None, recipe), parse_config(raw))


def test_a_chat_template_that_refuses_questions_is_named_at_export(folder):
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(wants + "{{ messages }}")
    (note,) = _read(folder).notes
    assert "a question alone cannot be asked, since the chat template refused" in note
    assert "no system" in note


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


def test_without_generation_config_json_settings_are_those_of_config_json(folder):
    """A null at the top hides nothing of text_config, as in transformers."""
    (folder / "generation_config.json").unlink()
    config = folder / "config.json"
    _edit(config, "repetition_penalty", value=None)
    _edit(config, "text_config", "repetition_penalty", value=1.2)
    _edit(config, "top_k", value=7)
    _edit(config, "text_config", "top_k", value=9)
    _edit(config, "text_config", "num_beams", value=4)
    theirs = GenerationConfig.from_model_config(json.loads(config.read_text()))
    assets = _read(folder)
    wanted = {"repetition_penalty": theirs.repetition_penalty, "top_k": theirs.top_k}
    assert assets.generation.sampling == wanted == {"repetition_penalty": 1.2, "top_k": 7}
    (note,) = assets.notes
    assert note.startswith("config.json asks for num_beams 4")
    _edit(config, "text_config", "repetition_penalty", value=0)
    with pytest.raises(TrioError, match=r"^config\.json: "):
        _read(folder)
