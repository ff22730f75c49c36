"""Names of tensors in a checkpoint to canonical names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Family

#: Canonical names of the table of embeddings and of the output head, either of which may stand for
#: the other.
EMBEDDINGS = "language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
#: What canonical names of the decoder layers' tensors begin with.
LAYERS = "language_model.layers."


def map_checkpoint_names(
    family: Family, names: Iterable[str], wanted: Collection[str]
) -> dict[str, str]:
    """Map canonical names to the names in a checkpoint, for all of `wanted` and in their order.

    Other tensors (position buffers, unused layers) are ignored. A head without embeddings stands
    for both where the graphs use one table for both, as in transformers 5.

    Args:
        family: of the checkpoint.
        names: of all its tensors, in any layout that the family's prefixes undo.
        wanted: canonical names that the graphs use.

    Raises:
        TrioError: a tensor is missing or there twice.
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(family, name)
        if canonical not in wanted and canonical != HEAD:
            continue
        if canonical in found:
            raise TrioError(
                f"the checkpoint has {canonical!r} twice: as {found[canonical]!r} and {name!r}"
            )
        found[canonical] = name
    if HEAD in found and HEAD not in wanted:
        found.setdefault(EMBEDDINGS, found[HEAD])
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TrioError(
            f"the checkpoint lacks tensor {missing[0]!r}{more}: config.json and the weights do "
            "not belong together, or the download is incomplete"
        )
    return {name: found[name] for name in wanted}


def refuse_adapters(names: Iterable[str]) -> None:
    """Raises TrioError where tensors belong to a LoRA adapter that was not merged."""
    for name in names:
        if ".lora_" in name or ".base_layer." in name:
            raise TrioError(
                f"the checkpoint holds an unmerged LoRA adapter (tensor {name!r}): merge it "
                "first, e.g. with PEFT's merge_and_unload(), and save the result"
            )


def canonical_name(family: Family, name: str) -> str:
    """Undo the layout of a checkpoint by the family's prefixes."""
    for prefix, replacement in family.prefixes:
        if name.startswith(prefix):
            name = replacement + name[len(prefix) :]
    return name
