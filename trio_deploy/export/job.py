"""From a model's name or folder to a bundle: graphs written, weights copied, linked or converted.

Needs config.json and the headers of the .safetensors files to build the graphs, and never holds a
weight in memory: neither torch nor transformers takes part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    ModelInfo,
)
from trio_deploy.bundle.weights import (
    DTYPES,
    SAFETENSORS,
    Layout,
    keep_files,
    kept_places,
    plan_layout,
    write_layout,
)
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.processor_files import checkpoint_assets, planned_assets
from trio_deploy.checkpoint.resolve import (
    Source,
    described,
    resolve,
)
from trio_deploy.checkpoint.safetensors import Checkpoint, TensorEntry
from trio_deploy.config.recipe import Recipe
from trio_deploy.config.target import Target, list_targets
from trio_deploy.errors import TrioError
from trio_deploy.export.graphs import build_graphs, plan_stages, serialised, used_tensors
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.runtimes.registry import load_target, runtime_spec
from trio_deploy.schedule.budget import budgets_for_layers, resolve_schedule
from trio_deploy.schedule.schedule import Schedule

_DEFAULTS: dict[str, Any] = {"probe": "last", "positions": "renumber", "threshold": 0.8}


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: float | None = None,
    schedule: Schedule | str | None = None,
    method: str | None = None,
    dtype: str | None = None,
    dialect: str | None = None,
    target: str | os.PathLike[str] | None = None,
    link_weights: bool = False,
    graphs_only: bool = False,
    force: bool = False,
    positions: str | None = None,
    probe: str | None = None,
    threshold: float | None = None,
    progress: bool = True,
) -> Bundle:
    """Exports a model as a bundle, wholly or not at all.

    Args:
        model: recipe name or file, checkpoint folder, or hub id.
        out: the bundle's folder; must not exist unless `force`.
        budget: average share of visual tokens a layer sees; default 0.111. The recipe's schedule
            for it where the recipe has one, else the solver's.
        schedule: pruning points instead of a budget, as `Schedule.parse` reads them, or the name
            of one of the recipe's schedules.
        method: selection method of every pruning point, or of those that the schedule's text names
            none for; default: trio, or what the recipe says.
        dtype: float32, float16 or bfloat16; default: what the target says.
        dialect: ort, onnx or primitive; default: the target's.
        target: name or file of an engines/ target; default cpu.
        link_weights: hard-link the checkpoint's files, so that no weight byte is written.
        graphs_only: write graphs for a planned layout of weights, which `attach_weights` fills.
        force: replace a bundle that stands at `out`, once the new one is whole.
        positions, probe, threshold: `renumber`/`original`, `last`/`shifted`, cosine τ; default:
            the recipe's, else renumber, last, 0.8.
        progress: show a bar for the weights and remarks on stderr.

    Raises:
        TrioError: any of the inputs is wrong, or the disk too full; nothing is left at `out`.
    """
    if budget is not None and schedule is not None:
        raise TrioError("pass either --budget or --schedule: both say how many tokens are kept")
    if graphs_only and link_weights:
        raise TrioError("--graphs-only writes no weights, so leave out --link-weights")
    BundleWriter(Path(out), force).refuse_existing()  # before anything that takes time
    device = load_target(str(target) if target is not None else "cpu")
    dtype = dtype or device.dtype
    if dtype not in SAFETENSORS:
        raise TrioError(f"unknown dtype {dtype!r}: choose one of {', '.join(SAFETENSORS)}")
    _refuse_unless_it_runs(dtype, device)

    def planned(found: Source, config: ModelConfig) -> Schedule:
        depth, published = config.text.num_layers, found.recipe.schedules if found.recipe else None
        plan = resolve_schedule(depth, budget, schedule, method, published)
        plan.validate(depth, request_limits(config).visual_tokens)
        return plan

    if (ahead := described(os.fspath(model))) is not None:  # before weights are downloaded
        planned(ahead, parse_config(ahead.raw_config))
    found = resolve(os.fspath(model), weights_needed=not graphs_only)
    config = parse_config(found.raw_config)
    plan = planned(found, config)
    published = found.recipe.schedules if found.recipe else {}
    sources: dict[str, TensorEntry] = {}
    if not graphs_only:
        assert found.folder is not None
        sources = Checkpoint.from_path(found.folder).verify(canonical_tensors(config))
    dialect = dialect or device.dialect
    options = _options(found.recipe, device, dialect, dtype, positions, probe, threshold)
    readable = runtime_spec(device.runtime).readable_dialects(device)
    if dialect not in readable:
        raise TrioError(
            f"{device.runtime}{f' {device.tensorrt}' if device.tensorrt else ''}, the runtime of "
            f"the target {device.name}, does not read graphs in the {dialect} dialect: choose "
            f"{' or '.join(readable)}"
        )
    models = build_graphs(config, plan.points, options)
    used = used_tensors(models, canonical_tensors(config))
    sources = {name: sources[name] for name in used} if sources else {}
    same = bool(sources) and all(DTYPES[e.dtype] == dtype for e in sources.values())
    if link_weights and not same:
        has = sorted({DTYPES[e.dtype] for e in sources.values()})
        hint = f"pass --dtype {has[0]} or " if len(has) == 1 else ""
        raise TrioError(
            f"--link-weights cannot make {dtype} out of the checkpoint's {', '.join(has)}: "
            f"{hint}leave --link-weights out"
        )
    # Everything that can be wrong with the small files is found before the weights are copied.
    if graphs_only:
        assets = planned_assets(found, config)
    else:
        assert found.folder is not None
        assets = checkpoint_assets(
            found.folder,
            config,
            found.raw_config,
            preprocessing=found.recipe.preprocessing if found.recipe else None,
            chat_template=found.recipe.chat_template if found.recipe else None,
        )
    layout = None if same else plan_layout(used, dtype)
    places = kept_places(sources) if layout is None else layout.places
    planned_stages = plan_stages(config, plan.points, options.separate_decode)
    stages, contents = serialised(planned_stages, models, places)
    contents |= assets.files
    needed = sum(len(content) for content in contents.values())
    if not (graphs_only or link_weights):
        kept = {entry.file for entry in sources.values()}
        needed += layout.nbytes if layout else sum(file.stat().st_size for file in kept)
    with BundleWriter(Path(out), force=force, needed=needed) as writer:
        for name, content in contents.items():
            writer.write(name, content)
        weights = "copied"
        if graphs_only:
            assert layout is not None
            weights = "planned"
            for shard in layout.shards:
                writer.files[shard.file] = FileInfo(shard.size, None)
        else:
            weights = _write_weights(writer, layout, sources, link_weights, progress)
        manifest = Manifest(
            model=ModelInfo(found.name, found.source, found.revision, found.raw_config),
            dtype=dtype,
            dialect=options.dialect,
            schedule=plan.to_json(),
            probe=options.probe,
            positions=options.positions,
            threshold=options.threshold,
            decode="separate" if options.separate_decode else "shared",
            stages=stages,
            tensors=dict(places),
            generation=assets.generation,
            files=dict(writer.files),
            versions=_versions(),
            weights=weights,
            target=device.name,
            runtime=device.runtime,
            provider=device.provider,
            precision=device.precision,
            budgets={
                str(known): [point.keep for point in other.points]
                for known, other in budgets_for_layers(published, plan, method).items()
            },
        )
        writer.write(MANIFEST, manifest.dump())
    return Bundle.load(out)


def _refuse_unless_it_runs(dtype: str, device: Target) -> None:
    """Raises TrioError where the target's runtime cannot run graphs in this float type."""
    dtypes = runtime_spec(device.runtime).dtypes
    if dtype in dtypes:
        return
    targets = [load_target(name) for name in list_targets()]
    able = [each.name for each in targets if dtype in runtime_spec(each.runtime).dtypes]
    raise TrioError(
        f"{device.runtime}, the runtime of the target {device.name}, cannot run {dtype} graphs: "
        f"choose --dtype {' or '.join(dtypes)}, or a --target that can "
        f"({', '.join(able)})"
    )


def _options(
    recipe: Recipe | None,
    device: Target,
    dialect: str,
    dtype: str,
    positions: str | None,
    probe: str | None,
    threshold: float | None,
) -> GraphOptions:
    given = {"positions": positions, "probe": probe, "threshold": threshold}
    values = dict(_DEFAULTS)
    for key, value in given.items():
        if value is not None:
            values[key] = value
        elif recipe is not None:
            values[key] = getattr(recipe, key)
    if not 0 < values["threshold"] <= 1:
        raise TrioError(f"the threshold is {values['threshold']}, but cosines lie in (0, 1]")
    return GraphOptions(
        dialect=dialect,
        dtype=dtype,  # type: ignore[arg-type]
        separate_decode=device.decode_layout == "separate",
        **values,
    )


def _write_weights(
    writer: BundleWriter,
    layout: Layout | None,
    sources: Mapping[str, TensorEntry],
    link: bool,
    progress: bool,
) -> str:
    files = {entry.file for entry in sources.values()}
    if layout is not None:
        total = sum(ref.nbytes for ref in layout.places.values())
    else:
        total = sum(file.stat().st_size for file in files)
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="weights",
        disable=None if progress else True,
    )
    with bar:
        if layout is not None:
            write_layout(writer, layout, sources, bar.update)
            return "copied"
        kept = keep_files(writer, files, link, bar.update)
    if link and kept.linked:
        _remark(
            progress,
            "weights are hard links, no weight byte was written: ONNX Runtime takes them, "
            "onnx.load and onnx.checker refuse hard-linked data (load_external_data=False)",
        )
    if link and kept.linked < len(files):
        _remark(progress, "the file system refused hard links here, so weights were copied")
    return "linked" if kept.linked else "copied"


def _remark(show: bool, text: str) -> None:
    if show:
        print(f"trio: {text}", file=sys.stderr)


def _versions() -> dict[str, str]:
    return {
        name: metadata.version(name) for name in ("trio-deploy", "onnx", "onnx-ir", "onnxscript")
    }
