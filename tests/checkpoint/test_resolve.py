"""A --model that cannot be found: the error says what to do, as fits the command."""

from __future__ import annotations

import pytest

from trio_deploy import TrioError, export_model, plan
from trio_deploy.checkpoint.resolve import resolve
from trio_deploy.export.attach import attach_weights


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_graphs_only_is_not_advised_where_it_does_not_help(tmp_path):
    for call in (
        lambda: plan("nobody/none"),
        lambda: export_model("nobody/none", tmp_path / "b", graphs_only=True, progress=False),
    ):
        with pytest.raises(TrioError, match=r"hf download nobody/none .*--model FOLDER") as caught:
            call()
        assert "--graphs-only" not in str(caught.value)


def test_attach_weights_names_its_own_argument(tmp_path):
    export_model("tiny", tmp_path / "b", budget=0.5, graphs_only=True, progress=False)
    with pytest.raises(TrioError, match="pass the folder as the checkpoint") as caught:
        attach_weights(tmp_path / "b", "nobody/none", progress=False)
    assert "--" not in str(caught.value).replace("--local-dir", "")


@pytest.mark.parametrize("model", ["a/b/c", "./none", "none/"])
def test_a_path_that_is_not_there_is_called_a_folder(model):
    with pytest.raises(TrioError, match=f"the folder {model} does not exist"):
        resolve(model, weights_needed=True)


def test_what_may_be_a_folder_or_a_hub_id_is_said_to_be_neither(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(TrioError, match=r"the folder out/none does not exist; cannot get out/none"):
        resolve("out/none", weights_needed=True)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TrioError, match=r"model\.safetensors is a file"):
        resolve("model.safetensors", weights_needed=True)


def test_an_unknown_name_is_two_sentences():
    with pytest.raises(TrioError, match=r"nor a recipe\. The recipes are .*tiny"):
        resolve("zzz", weights_needed=True)


def test_what_a_model_on_the_hub_lacks_is_named(tmp_path, monkeypatch):
    """A download without weights is not called a failure of the network."""
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")

    def download(hub_id: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise FileNotFoundError(hub_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(TrioError, match=r"it gave no model\.safetensors, no tokenizer\.json"):
        resolve("org/name", weights_needed=True)
