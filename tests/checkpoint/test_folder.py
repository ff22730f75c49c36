"""The files of a checkpoint folder: a broken one is an error, whichever it is, and never absent."""

from __future__ import annotations

import json
import os
import shutil
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoProcessor

from tests.support.checkpoints import make_llava
from trio_deploy import TrioError, export_model
from trio_deploy.checkpoint.folder import has_file, read_object, read_template

OPTIONAL = ("chat_template.json", "chat_template.jinja", "special_tokens_map.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint with every file that is read, in the hub's layout."""
    folder = make_llava(tmp_path_factory.mktemp("c") / "c", layout="hub", layers=1, hidden=32)
    for name in OPTIONAL:
        if not (folder / name).exists():
            (folder / name).write_text("{}" if name.endswith("json") else "{{ messages }}")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ],
)
def test_a_dangling_link_is_an_error_whichever_file_it_is(whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "c"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/none")
    with pytest.raises(TrioError, match=rf"{name} is a link to .*none, which does not exist"):
        export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("budget", [None, 0.5, 0.001])
@pytest.mark.parametrize("damage", ["a shard is missing", "only .bin"])
def test_a_checkpoint_without_its_weights_is_refused_whatever_the_budget(
    whole, tmp_path, damage, budget
):
    folder = Path(shutil.copytree(whole, tmp_path / "c"))
    if damage == "only .bin":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        says = r"no weights.*: convert pytorch_model\.bin"
    else:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        says = r"shard model-00001-of-00002\.safetensors is missing"
    with pytest.raises(TrioError, match=says):
        export_model(folder, tmp_path / "b", budget=budget, progress=False)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_beside_a_model_or_alone_is_to_be_merged_first(whole, tmp_path, alone):
    folder = Path(shutil.copytree(whole, tmp_path / "c"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(TrioError, match=r"not merged \(adapter_config\.json\): merge it first"):
        export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    assert not (tmp_path / "b").exists()


def test_a_link_in_a_circle_and_a_folder_are_no_files(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(TrioError, match=r"a cannot be read \(.*links"):
        has_file(tmp_path / "a")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TrioError, match=r"tokenizer\.json is not a file"):
        has_file(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "config.json")  # opening it would wait for ever
    with pytest.raises(TrioError, match=r"config\.json is not a file"):
        read_object(tmp_path / "config.json")


def test_a_file_that_is_not_there_is_absent(tmp_path):
    assert not has_file(tmp_path / "none")
    (tmp_path / "file").touch()
    assert not has_file(tmp_path / "file" / "below")
    assert has_file(tmp_path / "file")
    assert read_object(tmp_path / "none.json") is None


TEMPLATES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


def _put_template(file: Path, template: str) -> None:
    """Write a chat template where a file of this name has it; what else is in the file stays."""
    if file.suffix == ".jinja":
        file.write_text(template)
        return
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**raw, "chat_template": template}))


@pytest.fixture(scope="module")
def untold(tmp_path_factory) -> Path:
    """A checkpoint's small files without any chat template."""
    folder = make_llava(tmp_path_factory.mktemp("u") / "c", layers=1, hidden=32)
    for name in ("chat_template.json", "chat_template.jinja", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    assert read_template(folder) is None
    return folder


@pytest.mark.parametrize("names", list(combinations(TEMPLATES, 2)), ids=" ".join)
def test_of_two_chat_templates_the_one_of_transformers_is_taken(untold, tmp_path, names):
    folder = Path(shutil.copytree(untold, tmp_path / "c"))
    for name in names:
        _put_template(folder / name, f"from {name}")
    theirs = AutoProcessor.from_pretrained(folder, backend="pil").chat_template
    assert read_template(folder) == theirs == f"from {names[0]}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_of_white_space_is_none(untold, tmp_path, name):
    folder = Path(shutil.copytree(untold, tmp_path / "c"))
    for text in ("", " \n\t"):
        _put_template(folder / name, text)
        assert read_template(folder) is None
    other = "tokenizer_config.json" if name != "tokenizer_config.json" else "chat_template.jinja"
    _put_template(folder / other, "a real one")
    assert read_template(folder) == "a real one"
