"""A model of the Hugging Face hub: its snapshot in the local cache, completed by a download."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from trio_deploy.checkpoint.folder import has_file, image_settings, read_object, read_template
from trio_deploy.checkpoint.safetensors import INDEX, missing_weights
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder

Part = Literal["weights", "preprocessing", "template"]
"""What not every use of a checkpoint needs: the weights with their tokenizer, the image processor's
settings, and the chat template, the last two of which a recipe or a bundle may have."""

_SMALL_FILES = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]

_UNREACHED = {
    "LocalEntryNotFoundError",
    "IncompleteSnapshotError",
    "RepositoryNotFoundError",
    "OfflineModeIsEnabled",
}


def hub_folder(
    hub_id: str, advice: str, *, unneeded: Collection[Part] = ()
) -> tuple[Path, str | None]:
    """Find a hub id's checkpoint in the local cache, else download it or what the cache lacks.

    Args:
        advice: what to do with a folder that was downloaded elsewhere.
        unneeded: what the checkpoint need not have.

    Returns:
        The folder, and its commit.

    Raises:
        TrioError: neither worked; names the files that are missing, and says how to download them
            elsewhere and pass the folder.
    """
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES + ([] if "weights" in unneeded else _WEIGHTS)
    cached: tuple[Path, list[str]] | None = None
    cause = ""
    for cache_only in (True, False):
        try:
            folder = Path(
                snapshot_download(hub_id, allow_patterns=patterns, local_files_only=cache_only)
            )
        except Exception as error:  # of many kinds, of the hub's client and of what it is built on
            kind = type(error).__name__
            cause = "no network, or no such repository" if kind in _UNREACHED else kind
            if kind == "GatedRepoError":
                cause = (
                    f"it is gated: accept its licence at https://huggingface.co/{hub_id} and log "
                    "in with `hf auth login`, or set HF_TOKEN"
                )
            continue
        missing = missing_files(folder, unneeded)
        if not missing and (not cache_only or not _wanted(folder, unneeded)):
            return folder, folder.name
        cached = cached or (folder, missing)
        cause = f"it gave no {', no '.join(missing)}"
    if cached is not None and not cached[1]:  # without what the repository may not have either
        return cached[0], cached[0].name
    here = f"the folder {hub_id} does not exist; " if is_folder(Path(hub_id).parent) else ""
    copy = "no copy" if cached is None else f"a copy without {', '.join(cached[1])}"
    raise TrioError(
        f"{here}cannot get {hub_id} from the Hugging Face hub (the local cache has {copy}, and the "
        f"download failed: {cause}): run `hf download {hub_id} --local-dir FOLDER` "
        f"on a machine with access and {advice}"
    )


def missing_files(folder: Path, unneeded: Collection[Part] = ()) -> list[str]:
    """Names of the files that an export needs and a folder lacks, or has damaged."""
    missing = [] if _has(folder, "config.json") else ["config.json"]
    if "weights" in unneeded:
        return missing
    try:
        missing += missing_weights(folder)
    except TrioError:
        missing.append(INDEX)
    if not _has(folder, "tokenizer.json"):
        missing.append("tokenizer.json")
    if "preprocessing" not in unneeded:
        try:
            found = bool(image_settings(folder))
        except TrioError:
            found = False
        if not found:
            missing.append("preprocessor_config.json")
    return missing


def _wanted(folder: Path, unneeded: Collection[Part]) -> bool:
    """Whether a cached folder lacks what most repositories have, though not all."""
    if "weights" in unneeded:
        return False
    try:
        without_template = "template" not in unneeded and not read_template(folder)
        return without_template or read_object(folder / "generation_config.json") is None
    except TrioError:
        return True


def _has(folder: Path, name: str) -> bool:
    try:
        return has_file(folder / name)
    except TrioError:  # a link that leads nowhere
        return False
