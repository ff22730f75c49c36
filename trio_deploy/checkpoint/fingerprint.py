"""Checksums of what a bundle is made from, by which answers and exports are stored and found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trio_deploy.checkpoint.safetensors import read_header
from trio_deploy.config.recipe import Recipe
from trio_deploy.files import sha256_of

#: Largest weight file that is read as a whole, in bytes: a second or less.
READ_WHOLE = 2**28

_EXPORTED = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what an export may read
_READ = 4096


def digest(what: Any) -> str:
    """Checksum of plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def exported_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that an export may read."""
    return sorted(f for f in folder.iterdir() if f.suffix in _EXPORTED and f.is_file())


def of_files(files: Iterable[Path]) -> str:
    """Checksum of names and contents of files, independent of their folder.

    Of weight files beyond `READ_WHOLE`, which would take minutes, only the header and the first,
    middle and last bytes of every tensor are read.
    """
    checksum = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        checksum.update(json.dumps([file.name, size]).encode())
        if size <= READ_WHOLE or file.suffix != ".safetensors":
            checksum.update(sha256_of(file).encode())
            continue
        tensors = sorted(read_header(file).values(), key=lambda tensor: tensor.offset)
        with file.open("rb") as stream:
            checksum.update(stream.read(tensors[0].offset if tensors else _READ))
            for tensor in tensors:
                last = max(0, tensor.nbytes - _READ)
                for place in (0, last // 2, last):
                    stream.seek(tensor.offset + place)
                    checksum.update(stream.read(min(_READ, tensor.nbytes)))
    return checksum.hexdigest()[:16]


def of_checkpoint(folder: Path, recipe: Recipe | None) -> str:
    """Checksum of an export's inputs: weights, configuration, tokenizer, the recipe's settings."""
    settings = {} if recipe is None else {**asdict(recipe), "checkpoint": None, "description": ""}
    settings.pop("file", None)
    return digest(
        [of_files(exported_files(folder)), json.dumps(settings, sort_keys=True, default=str)]
    )
