"""A recorded reference that is damaged is one error, also where its checksum is right."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.support.bundles import Bundles
from trio_deploy import TrioError
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import FileInfo
from trio_deploy.verify.golden import GOLDEN, load

WHOLE = {"examples": [], "stages": {}, "tokens": []}


def npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def index(text: str) -> bytes:
    return npz(index=np.frombuffer(text.encode(), np.uint8))


def recorded(folder: Path, content: bytes) -> Bundle:
    """The bundle in a folder, with the reference and its checksum in the manifest."""
    bundle = Bundle.load(folder)
    (folder / GOLDEN).parent.mkdir(exist_ok=True)
    (folder / GOLDEN).write_bytes(content)
    entry = FileInfo(len(content), hashlib.sha256(content).hexdigest())
    manifest = msgspec.structs.replace(bundle.manifest, files={GOLDEN: entry})
    return replace(bundle, manifest=manifest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Path:
    path = tmp_path_factory.mktemp("golden") / "tiny"
    bundles.copy(path, "tiny")
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (index("[" * 100_000), "not valid JSON"),
        (index('{"tokens": 1%s}' % ("0" * 5000)), "not valid JSON"),
        (index("[]"), "damaged"),
        (index(json.dumps(WHOLE | {"stages": []})), "damaged"),
        (index(json.dumps(WHOLE | {"examples": [1]})), "damaged"),
        (index(json.dumps(WHOLE | {"examples": [{"prompt": "a", "pictures": [{}]}]})), "damaged"),
        (npz(other=np.zeros(3)), "damaged"),
        (b"no archive", "damaged"),
        (b"", "damaged"),
        (index(json.dumps(WHOLE))[:-40], "damaged"),
    ],
)
def test_a_reference_of_another_form_is_one_error(
    folder: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(TrioError, match=f"{GOLDEN}.*{reason}.*record it again"):
        load(recorded(folder, content))


def test_a_reference_of_its_form_is_read(folder: Path) -> None:
    assert load(recorded(folder, index(json.dumps(WHOLE)))).examples == []
