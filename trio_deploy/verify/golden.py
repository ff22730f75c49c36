"""Store the reference's tensors and answers in the bundle, for checks on devices without torch.

The file `golden/reference.npz` has no pickles: it holds the pictures, every stage's inputs and
outputs (equal arrays once), and JSON text with prompts, tokens and the use of each array.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST, FileInfo
from trio_deploy.errors import TrioError
from trio_deploy.files import parse_json, safe_path, sha256_of, write_together
from trio_deploy.reference.trace import Stage
from trio_deploy.verify.examples import Example

GOLDEN = "golden/reference.npz"
_INDEX = "index"
# What numpy and zipfile raise on files that are no arrays, and Python on an index of another form.
_DAMAGED = (
    KeyError,
    TypeError,
    AttributeError,
    ValueError,
    OSError,
    EOFError,
    NotImplementedError,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Reference:
    """The oracle's tensors and answers for a batch.

    Attributes:
        examples: the requests of the batch.
        stages: tensors by stage.
        tokens: greedy tokens per request, an end token included.
    """

    examples: list[Example]
    stages: dict[str, Stage]
    tokens: list[list[int]]


def store(bundle: Bundle, reference: Reference) -> Bundle:
    """Write the reference into the bundle and its manifest; return the new bundle."""
    arrays: dict[str, NDArray] = {}

    def put(array: NDArray) -> str:
        raw = np.ascontiguousarray(array)
        digest = hashlib.sha256(f"{raw.dtype}{raw.shape}".encode() + raw.tobytes()).hexdigest()
        arrays[digest] = raw
        return digest

    index: dict[str, Any] = {
        "threshold": bundle.manifest.threshold,
        "tokens": reference.tokens,
        "examples": [
            {"prompt": e.prompt, "pictures": [put(np.asarray(p)) for p in e.pictures]}
            for e in reference.examples
        ],
        "stages": {
            name: {
                side: {key: put(value) for key, value in getattr(stage, side).items()}
                for side in ("inputs", "outputs")
            }
            for name, stage in reference.stages.items()
        },
    }
    target = bundle.path / GOLDEN
    target.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez(content, allow_pickle=False, **{_INDEX: text}, **arrays)
    whole = content.getvalue()
    entry = FileInfo(len(whole), hashlib.sha256(whole).hexdigest())
    files = bundle.manifest.files | {GOLDEN: entry}
    manifest = msgspec.structs.replace(bundle.manifest, files=files)
    write_together({target: whole, bundle.path / MANIFEST: manifest.dump()})
    return replace(bundle, manifest=manifest)


def load(bundle: Bundle) -> Reference:
    """Read what `store` wrote.

    Raises:
        TrioError: nothing was recorded, or the file is damaged.
    """
    if GOLDEN not in bundle.manifest.files:
        raise TrioError(
            f"the bundle {bundle.path} has no recorded reference: run `trio check --record` "
            "on a machine with torch first"
        )
    file = safe_path(bundle.path, GOLDEN)
    if sha256_of(file) != bundle.manifest.files[GOLDEN].sha256:
        raise TrioError(f"{file} is damaged: copy it again, or record it again")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            index = parse_json(arrays[_INDEX].tobytes(), str(file), "record it again")
            return Reference(
                examples=[
                    Example(e["prompt"], tuple(Image.fromarray(arrays[p]) for p in e["pictures"]))
                    for e in index["examples"]
                ],
                stages={
                    name: Stage(
                        *(
                            {key: arrays[at] for key, at in sides[side].items()}
                            for side in ("inputs", "outputs")
                        )
                    )
                    for name, sides in index["stages"].items()
                },
                tokens=index["tokens"],
            )
    except _DAMAGED as error:
        raise TrioError(f"{file} is damaged ({error}): record it again") from error
