"""A model of the hub: what a snapshot in the cache lacks is downloaded, or named."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import make_llava
from trio_deploy import TrioError
from trio_deploy.checkpoint.hub import hub_folder, missing_files
from trio_deploy.checkpoint.processor_files import checkpoint_assets
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.families.registry import parse_config

WEIGHTS_ALONE = ("config.json", "generation_config.json", "*.safetensors*")


class Hub:
    """A repository on the hub, and the cache of this machine; counts downloads."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.online, self.downloads = repository, cache, True, 0
        cache.mkdir()

    def hold(self, *patterns: str) -> None:
        """Put files of the repository into the cache."""
        for file in self.repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copy(file, self.cache / file.name)

    def snapshot_download(
        self, hub_id: str, *, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        if local_files_only:
            if not any(self.cache.iterdir()):
                raise FileNotFoundError(hub_id)
            return str(self.cache)
        if not self.online:
            raise ConnectionError("no network")
        self.downloads += 1
        self.hold(*allow_patterns)
        return str(self.cache)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("c") / "c", layout="hub", layers=1, hidden=32)


@pytest.fixture
def hub(whole, tmp_path, monkeypatch) -> Hub:
    repository = Path(shutil.copytree(whole, tmp_path / "repository"))
    hub = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def _find(unneeded=()) -> Path:
    return hub_folder("org/name", "pass the folder", unneeded=unneeded)[0]


def test_a_whole_snapshot_is_taken_as_it_is(hub):
    hub.hold("*")
    assert _find() == hub.cache
    assert hub.downloads == 0


@pytest.mark.parametrize(
    "lacks",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ],
)
def test_what_a_snapshot_lacks_is_downloaded(hub, lacks):
    hub.hold("*")
    (hub.cache / lacks).unlink()
    assert (_find() / lacks).is_file()
    assert hub.downloads == 1


def test_a_snapshot_of_weights_alone_is_completed(hub):
    """As transformers' model class leaves it, which asks for no tokenizer."""
    hub.hold(*WEIGHTS_ALONE)
    folder = _find()
    raw = from_folder(folder).raw_config
    assets = checkpoint_assets(
        folder, parse_config(raw), raw, preprocessing=None, chat_template=None
    )
    assert "chat_template.jinja" in assets.files


def test_a_snapshot_of_weights_alone_without_a_network_names_what_is_missing(hub):
    hub.hold(*WEIGHTS_ALONE)
    hub.online = False
    with pytest.raises(
        TrioError,
        match=r"a copy without tokenizer\.json, preprocessor_config\.json, and the download "
        r"failed: ConnectionError\): run `hf download org/name --local-dir FOLDER`",
    ):
        _find()


def test_a_gated_model_names_its_licence_and_the_token(hub, monkeypatch):
    """The hub's client raises an error of this name where the licence was not accepted."""

    class GatedRepoError(Exception):
        pass

    def refuse(*_args, **options):
        raise FileNotFoundError if options["local_files_only"] else GatedRepoError

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(TrioError, match=r"gated: .* https://huggingface\.co/org/name .*HF_TOKEN"):
        _find()


def test_shards_that_are_missing_are_named(hub):
    hub.hold("*")
    hub.online = False
    (hub.cache / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (hub.cache / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub.cache / "model-2-of-2.safetensors").touch()
    with pytest.raises(TrioError, match=r"a copy without model-1-of-2\.safetensors, and"):
        _find()


def test_a_repository_that_lacks_a_file_is_not_called_unreachable(hub):
    (hub.repository / "tokenizer.json").unlink()
    with pytest.raises(TrioError, match=r"cache has .*: it gave no tokenizer\.json\)"):
        _find()


def test_what_not_every_repository_has_is_asked_for_once_and_then_done_without(hub):
    (hub.repository / "chat_template.jinja").unlink()
    hub.hold("*")
    assert _find() == hub.cache
    hub.online = False
    assert _find() == hub.cache, "and without a network"


def test_a_model_of_other_use_needs_less(hub):
    assert missing_files(_find(["weights"]), ["weights"]) == []
    assert not (hub.cache / "model.safetensors").exists(), "no weights for a plan"
    hub.hold("*")
    (hub.cache / "preprocessor_config.json").unlink()
    downloads = hub.downloads
    _find(["preprocessing"])
    assert hub.downloads == downloads


def test_a_link_without_its_file_is_missing(hub):
    hub.hold("*")
    hub.online = False
    (hub.cache / "tokenizer.json").unlink()
    (hub.cache / "tokenizer.json").symlink_to("../blobs/none")
    with pytest.raises(TrioError, match=r"a copy without tokenizer\.json"):
        _find()


def test_advice_on_a_tokenizer_is_such_that_works(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "c"))
    (folder / "tokenizer.json").unlink()
    raw = from_folder(folder).raw_config

    def read() -> None:
        checkpoint_assets(folder, parse_config(raw), raw, preprocessing=None, chat_template=None)

    with pytest.raises(TrioError, match="copy it from the model's repository"):
        read()
    (folder / "tokenizer.model").touch()
    with pytest.raises(TrioError, match=r"AutoTokenizer.*save_pretrained"):
        read()
