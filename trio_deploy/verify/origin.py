"""A bundle against the files of the checkpoint that it is said to be made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.fit import first_difference, fit_config, header_digests
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import parse_config
from trio_deploy.verify.compare import ParityRow


def compare_origin(bundle: Bundle, folder: Path) -> list[ParityRow]:
    """Compare config.json, the headers of the weights, and where the output head comes from.

    Raises:
        TrioError: the folder is no whole checkpoint, or one of a model of other sizes.
    """
    from_folder(folder)  # says what is wrong with a path that is no checkpoint
    checkpoint = Checkpoint.from_path(folder)
    config = fit_config(checkpoint, parse_config(checkpoint.config))
    tied = bundle.config.text.tie_word_embeddings
    if difference := first_difference(bundle.config, config.with_tied_head(tied)):
        raise TrioError(
            f"{folder} is not a checkpoint of {bundle.manifest.model.name} ({difference}): pass "
            "the folder that the bundle was made from"
        )
    made_from, rows = bundle.manifest.checkpoint, []
    if made_from is None:  # an older bundle, which has config.json alone
        same = checkpoint.config == bundle.manifest.model.config
    else:
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        same = digest == made_from.config or checkpoint.config == bundle.manifest.model.config
    rows.append(ParityRow("config.json", problem="" if same else "other than at export"))
    if made_from is not None:
        found = header_digests(checkpoint)
        files = {*found, *made_from.headers}
        other = sorted(name for name in files if found.get(name) != made_from.headers.get(name))
        problem = f"other than at export: {', '.join(other)}" if other else ""
        rows.append(ParityRow("headers of weights", problem=problem))
    head = first_difference(bundle.config, config)
    rows.append(ParityRow("output head", problem=head or ""))
    return rows
