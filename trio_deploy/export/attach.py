"""Completing a bundle of graphs with a checkpoint's weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

import msgspec

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST, WEIGHTS, Quantization, TensorPlace
from trio_deploy.bundle.weights import (
    link_file,
    plan_layout,
)
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.fit import first_difference
from trio_deploy.checkpoint.hub import Part, hub_folder
from trio_deploy.checkpoint.processor_files import (
    PREPROCESSOR,
    checkpoint_assets,
    read_chosen_template,
)
from trio_deploy.checkpoint.resolve import HUB_ID, from_folder
from trio_deploy.errors import TrioError
from trio_deploy.export.checkpoint import ReadCheckpoint, read_checkpoint
from trio_deploy.export.job import print_note, quantization_of, sources_by_part, write_weights
from trio_deploy.files import is_folder, user_path
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.quant.stored_weight import parts_of


def attach_weights(
    bundle: Bundle | str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    chat_template: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Bundle:
    """Add weights to a bundle that was exported with --graphs-only, completely or not at all.

    Args:
        bundle: the bundle or its folder.
        checkpoint: a checkpoint folder, or a hub id that is in the local cache or can be reached.
        chat_template: as in `ExportOptions`.

    Raises:
        TrioError: the bundle has weights already, the checkpoint is of another model, or what
            `export` raises about checkpoints and disks.
    """
    old = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if old.manifest.weights != "planned":
        raise TrioError(f"the bundle {old.path} has its weights already")
    chosen = read_chosen_template(chat_template)
    name = os.fspath(checkpoint)
    revision = None
    folder = user_path(name)
    if not is_folder(folder):
        if not HUB_ID.fullmatch(name):
            raise TrioError(f"{name} is not a folder: pass the checkpoint's folder or its hub id")
        given: list[Part] = ["preprocessing"] if PREPROCESSOR in old.manifest.files else []
        if old.chat_template or chosen is not None:
            given.append("template")
        advice = "pass the folder as the checkpoint"
        folder, revision = hub_folder(name, advice, unneeded=given)
    found = from_folder(folder)
    read = read_checkpoint(folder)
    config = read.config
    if difference := first_difference(old.config, config):
        raise TrioError(
            f"{folder} is not a checkpoint of {old.manifest.model.name}, for which the graphs were "
            f"made ({difference}): pass that model's folder, or export this one"
        )
    graphs = _graph_options(old, read)
    used = [
        weight
        for weight in graphs.stored_weights(config)
        if any(part.name in old.manifest.tensors for part in weight.parts)
    ]
    layout = plan_layout(parts_of(used))
    _check_layout_matches(old, layout.places)
    planned = old.preprocessor if PREPROCESSOR in old.manifest.files else None
    assets = checkpoint_assets(
        folder,
        config,
        found.raw_config,
        preprocessing=planned,
        # The graphs were planned for pictures of that size, whatever the checkpoint says.
        max_pixels=old.config.pixels[1] if planned and old.config.pixels else None,
        chat_template=old.chat_template,
        chosen_template=chosen,
    )
    files = assets.files
    needed = layout.nbytes + sum(len(content) for content in files.values())
    with BundleWriter(old.path, force=True, needed=needed) as writer:
        _copy_other_files(old, writer, skip={MANIFEST, *files})
        for relative, content in files.items():
            writer.write(relative, content)
        sources = sources_by_part(used, read.tensors)
        write_weights(writer, layout, sources, False, progress)
        manifest = msgspec.structs.replace(
            old.manifest,
            model=msgspec.structs.replace(
                old.manifest.model,
                config=found.raw_config,
                revision=revision or old.manifest.model.revision,
            ),
            weights="copied",
            quantization=_as_rounded_here(old.manifest.quantization, graphs),
            generation=assets.generation,
            files=dict(writer.files),
            checkpoint=read.info,
        )
        writer.write(MANIFEST, manifest.dump())
    for note in (*read.notes, *assets.notes):
        print_note(progress, note)
    return Bundle.load(old.path)


def _graph_options(bundle: Bundle, read: ReadCheckpoint) -> GraphOptions:
    """The options of a bundle's graphs that say how weights are stored.

    Raises:
        TrioError: the graphs were made for a checkpoint that is quantised otherwise.
    """
    manifest, quantised = bundle.manifest, bundle.manifest.quantization
    source = "rtn" if quantised is None else quantised.source
    if source != (read.form or "rtn"):
        kinds = {"rtn": "float"}
        raise TrioError(
            f"the graphs of {bundle.path} were made for a checkpoint in {kinds.get(source, source)}"
            f", not in {read.form or 'float'}: pass that one, or export this one"
        )
    return GraphOptions(
        dialect=manifest.dialect,
        dtype=manifest.dtype,  # type: ignore[arg-type]  # of a loaded bundle
        quantize=None if quantised is None else quantised.scheme,
        selections="int8" if quantised is None else quantised.selections,  # type: ignore[arg-type]
        stored=read.stored,
    )


def _as_rounded_here(said: Quantization | None, graphs: GraphOptions) -> Quantization | None:
    """What a planned bundle says of its codes, which this version makes, not the one it is of."""
    made = None if said is None else quantization_of(graphs, said.source)
    if said is None or made is None:
        return None
    return msgspec.structs.replace(said, revision=made.revision)


def _check_layout_matches(bundle: Bundle, places: Mapping[str, TensorPlace]) -> None:
    if bundle.manifest.tensors != dict(places):
        raise TrioError(
            f"the graphs of {bundle.path} expect their weights laid out otherwise than this "
            "version of trio-deploy would: export the graphs again with this version"
        )


def _copy_other_files(old: Bundle, writer: BundleWriter, skip: set[str]) -> None:
    """Copy the old bundle's other files, such as built engines and recorded outputs."""
    for source in sorted(old.path.rglob("*")):
        relative = source.relative_to(old.path).as_posix()
        if not source.is_file() or relative in skip or relative.startswith(WEIGHTS + "/"):
            continue
        if not link_file(source, writer.path(relative)):
            shutil.copyfile(source, writer.path(relative))
        if relative in old.manifest.files:
            writer.record(relative, old.manifest.files[relative].sha256)
