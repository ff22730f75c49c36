"""Names of tensors in a checkpoint to canonical names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Family


def map_checkpoint_names(
    family: Family, names: Iterable[str], wanted: Collection[str]
) -> dict[str, str]:
    """Map canonical names to the names in a checkpoint, for all of `wanted` and in their order.

    Other tensors (position buffers, unused layers) are ignored.

    Args:
        family: of the checkpoint.
        names: of all its tensors, in any layout that the family's prefixes undo.
        wanted: canonical names that the graphs use.

    Raises:
        TrioError: a tensor is missing or there twice, or the weights hold unmerged adapters.
    """
    found: dict[str, str] = {}
    for name in names:
        if ".lora_" in name or ".base_layer." in name:
            raise TrioError(
                f"the checkpoint holds an unmerged LoRA adapter (tensor {name!r}): merge it "
                "first, e.g. with PEFT's merge_and_unload(), and save the result"
            )
        canonical = canonical_name(family, name)
        if canonical not in wanted:
            continue
        if canonical in found:
            raise TrioError(
                f"the checkpoint has {canonical!r} twice: as {found[canonical]!r} and {name!r}"
            )
        found[canonical] = name
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TrioError(
            f"the checkpoint lacks tensor {missing[0]!r}{more}: config.json and the weights do "
            "not belong together, or the download is incomplete"
        )
    return {name: found[name] for name in wanted}


def canonical_name(family: Family, name: str) -> str:
    """Undo the layout of a checkpoint by the family's prefixes."""
    for prefix, replacement in family.prefixes:
        if name.startswith(prefix):
            name = replacement + name[len(prefix) :]
    return name
