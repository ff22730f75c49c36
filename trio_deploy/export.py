"""From a model's name or folder to a bundle: graphs written, weights copied, linked or converted.

Needs config.json and the headers of the .safetensors files to build the graphs, and never holds a
weight in memory: neither torch nor transformers takes part.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tqdm import tqdm

from trio_deploy.assets import checkpoint_assets, planned_assets
from trio_deploy.bundle import (
    MANIFEST,
    PREPROCESSOR,
    WEIGHTS,
    Bundle,
    BundleWriter,
    FileInfo,
    GraphInfo,
    Manifest,
    ModelInfo,
    TensorInfo,
    format_bytes,
)
from trio_deploy.checkpoint import Checkpoint, TensorEntry
from trio_deploy.errors import TrioError
from trio_deploy.graphs import GraphOptions, build_graphs
from trio_deploy.models import canonical_tensors, parse_config
from trio_deploy.models.config import ModelConfig
from trio_deploy.recipe import (
    DIALECTS,
    GRAPH_DTYPES,
    Recipe,
    Target,
    list_targets,
    load_target,
    tensorrt_dialects,
)
from trio_deploy.schedule import PruningPoint, Schedule, at_points, choose, max_visual_tokens
from trio_deploy.source import HUB_ID, Source, described, from_folder, hub_folder, resolve
from trio_deploy.weights import (
    DTYPES,
    SAFETENSORS,
    Layout,
    WeightRef,
    keep_files,
    kept_layout,
    link_file,
    plan_layout,
    write_layout,
)

_DEFAULTS: dict[str, Any] = {"probe": "last", "positions": "renumber", "threshold": 0.8}


def export(
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
        plan = choose(depth, budget, schedule, method, published)
        plan.validate(depth, max_visual_tokens(config))
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
        sources = Checkpoint.from_path(found.folder).verify(config)
    dialect = dialect or device.dialect
    options = _options(found.recipe, device, dialect, dtype, positions, probe, threshold)
    readable = DIALECTS[device.runtime]
    if device.tensorrt is not None:
        readable = tensorrt_dialects(device.tensorrt)
    if dialect not in readable:
        raise TrioError(
            f"{device.runtime}{f' {device.tensorrt}' if device.tensorrt else ''}, the runtime of "
            f"the target {device.name}, does not read graphs in the {dialect} dialect: choose "
            f"{' or '.join(readable)}"
        )
    models = build_graphs(config, plan.points, options)
    used = _used_tensors(models, canonical_tensors(config))
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
    refs = kept_layout(sources) if layout is None else layout.refs
    graphs, contents = _serialised(models, refs)
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
            graphs=graphs,
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
                for known, other in at_points(published, plan, method).items()
            },
        )
        writer.write(MANIFEST, manifest.dump())
    return Bundle.load(out)


def planned_graphs(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> dict[str, bytes]:
    """The graphs of a model by stage, as --graphs-only writes them: weights have places, no data.

    Raises:
        TrioError: pruning points that do not suit the model.
    """
    models = build_graphs(config, points, options)
    layout = plan_layout(_used_tensors(models, canonical_tensors(config)), options.dtype)
    infos, contents = _serialised(models, layout.refs)
    return {stage: contents[info.file] for stage, info in infos.items()}


def _refuse_unless_it_runs(dtype: str, device: Target) -> None:
    """Raises TrioError where the target's runtime cannot run graphs in this float type."""
    if dtype in GRAPH_DTYPES[device.runtime]:
        return
    able = [name for name in list_targets() if dtype in GRAPH_DTYPES[load_target(name).runtime]]
    raise TrioError(
        f"{device.runtime}, the runtime of the target {device.name}, cannot run {dtype} graphs: "
        f"choose --dtype {' or '.join(GRAPH_DTYPES[device.runtime])}, or a --target that can "
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
        dialect=dialect,  # type: ignore[arg-type]  # checked there, unknown ones are named
        dtype=dtype,  # type: ignore[arg-type]
        separate_decode=dialect == "onnx" or device.decode_layout == "separate",
        **values,
    )


def _used_tensors(
    models: Mapping[str, ir.Model], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Canonical tensors that some graph refers to, in canonical order, with their shapes."""
    names: set[str] = set()
    for stage, model in models.items():
        for value in _open_initializers(model):
            name = str(value.name)
            if name not in shapes:
                raise TrioError(f"the graph {stage} asks for a tensor {name}, which no model has")
            dims = value.shape
            if dims is not None and tuple(dims) != tuple(shapes[name]):
                raise TrioError(
                    f"the graph {stage} takes {name} as {list(dims)}, but the model has it as "
                    f"{list(shapes[name])}"
                )
            names.add(name)
    return {name: tuple(shape) for name, shape in shapes.items() if name in names}


def _open_initializers(model: ir.Model) -> list[ir.Value]:
    """Initializers without data: those that stand for a tensor of the checkpoint."""
    return [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is None
    ]


def _serialised(
    models: Mapping[str, ir.Model], refs: Mapping[str, WeightRef]
) -> tuple[dict[str, GraphInfo], dict[str, bytes]]:
    """What the manifest says of each graph by its stage, and the graphs' files."""
    infos: dict[str, GraphInfo] = {}
    contents: dict[str, bytes] = {}
    for stage, model in models.items():
        for value in _open_initializers(model):
            ref = refs[str(value.name)]
            value.const_value = ir.ExternalTensor(
                ref.file,
                ref.offset,
                ref.nbytes,
                _ir_dtype(ref.dtype),
                shape=ir.Shape(ref.shape),
                name=str(value.name),
            )
        file = f"{stage}.onnx"
        contents[file] = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        infos[stage] = GraphInfo(
            file,
            tuple(_tensor_info(value) for value in model.graph.inputs),
            tuple(_tensor_info(value) for value in model.graph.outputs),
        )
    return infos, contents


def _ir_dtype(dtype: str) -> ir.DataType:
    return {
        "float32": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
    }[dtype]


def _tensor_info(value: ir.Value) -> TensorInfo:
    dtype = value.dtype
    name = {"FLOAT": "float32"}.get(dtype.name, dtype.name.lower()) if dtype else "unknown"
    shape: list[int | str] = []
    for dim in value.shape or ():
        shape.append(dim if isinstance(dim, int) else str(dim.value or "?"))
    return TensorInfo(str(value.name), name, tuple(shape))


def _write_weights(
    writer: BundleWriter,
    layout: Layout | None,
    sources: Mapping[str, TensorEntry],
    link: bool,
    progress: bool,
) -> str:
    files = {entry.file for entry in sources.values()}
    if layout is not None:
        total = sum(ref.nbytes for ref in layout.refs.values())
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


def attach_weights(
    bundle: Bundle | str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Bundle:
    """Completes a bundle that was exported with --graphs-only; it changes wholly or not at all.

    Args:
        bundle: the bundle or its folder.
        checkpoint: a checkpoint folder, or a hub id that is in the local cache or can be reached.

    Raises:
        TrioError: the bundle has weights already, the checkpoint is of another model, or what
            `export` raises about checkpoints and disks.
    """
    old = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if old.manifest.weights != "planned":
        raise TrioError(f"the bundle {old.path} has its weights already")
    name = os.fspath(checkpoint)
    revision = None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name):
            raise TrioError(f"{name} is not a folder: pass the checkpoint's folder or its hub id")
        folder, revision = hub_folder(name, "pass the folder as the checkpoint")
    found = from_folder(folder)
    config = parse_config(found.raw_config)
    if difference := _difference(old.config, config):
        raise TrioError(
            f"{folder} is not a checkpoint of {old.manifest.model.name}, for which the graphs were "
            f"made: {difference}"
        )
    sources = Checkpoint.from_path(folder).verify(config)
    layout = plan_layout(_planned_tensors(old, canonical_tensors(config)), old.manifest.dtype)
    _check_plan(old, layout.refs)
    assets = checkpoint_assets(
        folder,
        config,
        found.raw_config,
        preprocessing=old.preprocessor if PREPROCESSOR in old.manifest.files else None,
        chat_template=old.chat_template,
    )
    files = assets.files
    needed = layout.nbytes + sum(len(content) for content in files.values())
    with BundleWriter(old.path, force=True, needed=needed) as writer:
        _carry_over(old, writer, skip={MANIFEST, *files})
        for relative, content in files.items():
            writer.write(relative, content)
        _write_weights(writer, layout, sources, False, progress)
        manifest = replace(
            old.manifest,
            model=replace(
                old.manifest.model,
                config=found.raw_config,
                revision=revision or old.manifest.model.revision,
            ),
            weights="copied",
            generation=assets.generation,
            files=dict(writer.files),
        )
        writer.write(MANIFEST, manifest.dump())
    return Bundle.load(old.path)


# What prompts and pictures are made with, and graphs do not depend on: the checkpoint's holds.
_OUTSIDE_GRAPHS = {"max_positions", "image_token_id", "grid_pinpoints"}


def _difference(planned: Any, given: Any, prefix: str = "") -> str | None:
    """The first field in which two configurations ask for other graphs, in words."""
    for item in fields(planned):
        ours, theirs = getattr(planned, item.name), getattr(given, item.name)
        if ours == theirs or item.name in _OUTSIDE_GRAPHS:
            continue
        if hasattr(ours, "__dataclass_fields__") and type(ours) is type(theirs):
            if inner := _difference(ours, theirs, f"{prefix}{item.name}."):
                return inner
            continue
        return f"{prefix}{item.name} is {theirs} there and {ours} in the bundle"
    return None


def _graph_references(bundle: Bundle) -> dict[str, WeightRef]:
    """Where the graphs on disk look for each tensor; no weight is read."""
    import onnx

    refs: dict[str, WeightRef] = {}
    for stage in bundle.stages:
        try:
            proto = onnx.load(str(bundle.graph(stage)), load_external_data=False)
        except Exception as error:  # protobuf has exception types of its own
            raise TrioError(
                f"{bundle.graph(stage)} is damaged ({error}): export the bundle again"
            ) from error
        for tensor in proto.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {item.key: item.value for item in tensor.external_data}
            refs[tensor.name] = WeightRef(
                place["location"],
                int(place["offset"]),
                int(place["length"]),
                tuple(tensor.dims),
                bundle.manifest.dtype,
            )
    return refs


def _planned_tensors(
    bundle: Bundle, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    used = _graph_references(bundle)
    return {name: tuple(shape) for name, shape in shapes.items() if name in used}


def _check_plan(bundle: Bundle, refs: Mapping[str, WeightRef]) -> None:
    if _graph_references(bundle) != dict(refs):
        raise TrioError(
            f"the graphs of {bundle.path} expect their weights laid out otherwise than this "
            "version of trio-deploy would: export the graphs again with this version"
        )


def _carry_over(old: Bundle, writer: BundleWriter, skip: set[str]) -> None:
    """Puts the old bundle's files, built engines and recorded outputs among them, into the new."""
    for source in sorted(old.path.rglob("*")):
        relative = source.relative_to(old.path).as_posix()
        if not source.is_file() or relative in skip or relative.startswith(WEIGHTS + "/"):
            continue
        if not link_file(source, writer.path(relative)):
            shutil.copyfile(source, writer.path(relative))
        if relative in old.manifest.files:
            writer.record(relative, old.manifest.files[relative].sha256)


def inspect(bundle: Bundle | str | os.PathLike[str], *, interface: bool = True) -> str:
    """A bundle in words: model, schedule, weights; with `interface`, each stage's tensors."""
    it = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    manifest, text = it.manifest, it.config.text
    graphs = {stage: manifest.files[g.file].size for stage, g in manifest.graphs.items()}
    weights = {n: i for n, i in manifest.files.items() if n.startswith(WEIGHTS + "/")}
    revision = f" at {manifest.model.revision}" if manifest.model.revision else ""
    state = {
        "copied": "in the bundle",
        "linked": "hard links (onnx.load refuses them, ONNX Runtime takes them)",
        "planned": "missing: complete the bundle with `trio attach-weights`",
    }.get(manifest.weights, manifest.weights)
    others = {f"{known:g}": of for known, of in it.budgets.items() if of != it.schedule}
    place = f"{manifest.runtime}, {manifest.provider}" if manifest.provider else manifest.runtime
    lines = [
        f"{it.path}",
        f"model      {manifest.model.name} ({manifest.model.source}{revision})",
        f"           {it.config.family}: {text.num_layers} layers, hidden {text.hidden_size}, "
        f"{text.num_heads} heads, {text.num_kv_heads} key/value heads, "
        f"vocabulary {text.vocab_size}",
        f"target     {manifest.target} ({place}), dialect {manifest.dialect}, "
        f"dtype {manifest.dtype}, decode {manifest.decode}",
        f"pruning    {it.schedule}",
        *(f"{'  at ' + known:<10} {other}" for known, other in others.items()),
        f"           probe {manifest.probe}, positions {manifest.positions}, "
        f"threshold {manifest.threshold:g}",
        f"weights    {format_bytes(sum(i.size for i in weights.values()))} in {len(weights)} "
        f"file{'s' if len(weights) != 1 else ''}, {state}",
        f"checksums  {'of all files' if not it.unsealed else f'none yet of {len(it.unsealed)}'}",
        f"graphs     {format_bytes(sum(graphs.values()))}",
    ]
    for stage, graph in manifest.graphs.items():
        lines.append(f"  {graph.file}  {format_bytes(graphs[stage])}")
        if not interface:
            continue
        for word, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            lines.extend(f"    {word} {line}" for line in _tensor_lines(tensors))
    lines.append("made with  " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    return "\n".join(lines)


def _tensor_lines(tensors: tuple[TensorInfo, ...]) -> list[str]:
    """One line a tensor; the many of a KV cache share one."""
    lines: list[str] = []
    cache: dict[str, list[int]] = {}
    for tensor in tensors:
        shape = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
        match = re.fullmatch(r"(past|present)\.(\d+)\.(key|value)", tensor.name)
        if match:
            cache.setdefault(f"{match[1]}|{shape}", []).append(int(match[2]))
        else:
            lines.append(f"{tensor.name}: {shape}")
    for key, layers in cache.items():
        kind, shape = key.split("|")
        span = f"{min(layers)}…{max(layers)}" if min(layers) != max(layers) else f"{layers[0]}"
        lines.append(f"{kind}.{span}.key / .value: {shape}")
    return lines
