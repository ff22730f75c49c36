"""Bundles and checkpoints that many tests read, each made once for the whole run.

Workers of pytest-xdist share them: whoever comes first makes one under a lock of the file system,
and the others wait for it. What is handed out is not to be changed; a test that changes files
copies the folder first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trio_deploy import Bundle, export_model


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this run share, and no other run."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder to come."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return the folder, which `make` makes wholly unless another worker has."""
    with locked(folder):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


class Bundles:
    """Exported bundles by model and options."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, model: str | Path, **options: Any) -> Path:
        """Return the folder of a bundle as `export_model(model, …, **options)` makes it."""
        words = [str(model), *(f"{key}={value!s}" for key, value in sorted(options.items()))]
        key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
        folder = self._folder / f"{Path(model).name}-{key}"
        return made_once(folder, lambda out: export_model(model, out, progress=False, **options))

    def copy(self, to: Path, model: str | Path, **options: Any) -> Path:
        """Return a copy at `to`, which a test may change."""
        return Path(shutil.copytree(self.path(model, **options), to))


def make_speechless(folder: Path) -> Bundle:
    """Change a copied bundle's sampling options so that they leave no token to choose.

    What answers from it does not ask for the checkpoint's options.
    """
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["generation"]["sampling"] = {"suppress_tokens": list(range(10_000))}
    path.write_text(json.dumps(raw))
    return Bundle.load(folder)
