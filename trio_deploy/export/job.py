"""Export a model as a bundle: resolve, plan, build, lay out, write.

Graphs are built from config.json and the headers of the .safetensors files. Weights are copied,
linked or converted in chunks of 16 MiB; neither torch nor transformers is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    ModelInfo,
    Quantization,
    StageInfo,
    TensorPlace,
)
from trio_deploy.bundle.weights import (
    SAFETENSORS,
    Layout,
    PartSource,
    byte_bar,
    dtype_of,
    keep_files,
    kept_places,
    plan_layout,
    write_layout,
)
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.checkpoint import WeightEntry
from trio_deploy.checkpoint.processor_files import (
    Assets,
    checkpoint_assets,
    planned_assets,
    read_chosen_template,
)
from trio_deploy.checkpoint.resolve import (
    Source,
    described,
    resolve,
    source_config,
)
from trio_deploy.checkpoint.safetensors import TensorEntry, missing_weights
from trio_deploy.config.options import (
    DEFAULT_THRESHOLD,
    Calibration,
    ExportOptions,
    SelectionOptions,
)
from trio_deploy.config.recipe import Recipe, with_schedule_file
from trio_deploy.config.target import Target, list_targets
from trio_deploy.errors import TrioError
from trio_deploy.export.checkpoint import ReadCheckpoint, read_checkpoint
from trio_deploy.export.graphs import build_graphs, plan_stages, serialised, used_weights
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.names import EMBEDDINGS, HEAD
from trio_deploy.families.registry import check_methods, check_positions, request_limits
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.quant.quantization_config import require_float
from trio_deploy.quant.schemes import (
    NO_SCHEME,
    READING,
    ROUNDING,
    StoredMatrix,
    same_scheme,
    selections_of,
)
from trio_deploy.quant.stored_weight import StoredWeight, parts_of
from trio_deploy.runtimes.registry import (
    check_scheme,
    load_target,
    refuse_uncalibrated,
    rounds_inputs,
    runtime_spec,
)
from trio_deploy.schedule.budget import budgets_for_layers, resolve_schedule
from trio_deploy.schedule.schedule import Schedule

_SELECTION_FIELDS = frozenset(field.name for field in fields(SelectionOptions))
_DEFAULTS = SelectionOptions(probe="last", threshold=DEFAULT_THRESHOLD)


def export_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    progress: bool = True,
    **keywords: Any,
) -> Bundle:
    """Export a model as a bundle, completely or not at all.

    Args:
        model: recipe name or file, checkpoint folder, or hub id.
        out: the bundle's folder; must not exist unless `options.force`.
        options: what the export makes of the model.
        progress: show a progress bar for weights, and notes on stderr.
        keywords: fields of `ExportOptions` and `SelectionOptions`, which replace those of
            `options`.

    Raises:
        TrioError: an input is wrong, or the disk is too full; nothing is left at `out`.
    """
    target = Path(out)
    job = resolve_job(os.fspath(model), target, _merge(options or ExportOptions(), keywords))
    models = build_graphs(job.config, job.schedule.points, job.graphs)
    weights = lay_out_weights(job, models)
    write_bundle(job, models, weights, target, progress)
    return Bundle.load(out)


@dataclass(frozen=True)
class ExportJob:
    """An export whose inputs have been found and checked.

    Attributes:
        options: as given, with dtype and dialect filled in.
        schedule: the pruning points.
        graphs: how the graphs are written.
        checkpoint: the model's weights; None for `graphs_only` without weights at hand.
        assets: tokenizer, preprocessing, chat template and token ids of the model.
    """

    options: ExportOptions
    target: Target
    source: Source
    config: ModelConfig
    schedule: Schedule
    graphs: GraphOptions
    checkpoint: ReadCheckpoint | None
    assets: Assets

    @property
    def budgets(self) -> dict[str, list[float | int]]:
        """`Manifest.budgets`: those of the recipe's schedules that these graphs can run."""
        published = self.source.recipe.schedules if self.source.recipe else {}
        suitable = budgets_for_layers(published, self.schedule, self.options.method)
        return {
            str(budget): [point.keep for point in other.points]
            for budget, other in suitable.items()
        }

    @property
    def stages(self) -> list[StageInfo]:
        """The stages in the order in which they run, without their graphs."""
        return plan_stages(self.config, self.schedule.points, self.graphs)


@dataclass(frozen=True)
class WeightPlan:
    """Where the weights of a bundle will lie.

    Attributes:
        layout: files of our own; None: the checkpoint's files are kept whole.
        sources: what each part is made from, by name of the part.
        places: by name of the part.
    """

    layout: Layout | None
    sources: Mapping[str, PartSource]
    places: Mapping[str, TensorPlace]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        if self.layout is not None:
            return self.layout.nbytes
        return sum(file.stat().st_size for file in {s.entry.file for s in self.sources.values()})


def resolve_job(model: str, out: Path, options: ExportOptions) -> ExportJob:
    """Find the model, the target and the pruning points, and check that they fit together.

    Raises:
        TrioError: they do not; names the option to change.
    """
    if options.budget is not None and options.schedule is not None:
        raise TrioError("pass either --budget or --schedule: both say how many tokens are kept")
    options = with_schedule_file(options)
    if options.graphs_only and options.link_weights:
        raise TrioError("--graphs-only writes no weights, so leave out --link-weights")
    if options.graphs_only and options.chat_template is not None:
        raise TrioError(
            "--graphs-only reads no chat template of a checkpoint: leave out --chat-template, and "
            "pass it to trio attach-weights"
        )
    chosen = read_chosen_template(options.chat_template)
    BundleWriter(out, options.force).refuse_existing()  # before anything that takes time
    target = load_target("cpu" if options.target is None else options.target)
    dtype = options.dtype or target.dtype
    if dtype not in SAFETENSORS:
        raise TrioError(f"unknown dtype {dtype!r}: choose one of {', '.join(SAFETENSORS)}")
    _refuse_unless_it_runs(dtype, target)
    ahead = described(model)  # before weights are downloaded
    wanted = quantize_of(ahead.recipe if ahead else None, target, options)
    _refuse_links(options, wanted)
    if ahead is not None or options.quantize is not None:
        _require_calibration(options, wanted, target)
    if ahead is not None:
        plan_schedule(ahead, source_config(ahead, options.max_pixels), options)
    source = resolve(model, weights_needed=not options.graphs_only)
    config, checkpoint = source_config(source, options.max_pixels), None
    # Before the schedule: what is wrong with a checkpoint concerns every schedule.
    if source.folder is not None and not (options.graphs_only and missing_weights(source.folder)):
        checkpoint = read_checkpoint(source.folder)
        config = replace(checkpoint.config, pixels=config.pixels)
    if options.graphs_only:
        assets = planned_assets(source, config, options.max_pixels)
    else:
        assets = _assets(source, config, chosen, options.max_pixels)
    schedule = plan_schedule(source, config, options)
    options = replace(options, dtype=dtype, dialect=options.dialect or target.dialect)
    graphs = _graph_options(config, source, target, options, checkpoint)
    _refuse_unreadable(graphs.dialect, target)
    check_scheme(target, graphs.quantize)
    _refuse_links(options, graphs.quantize)
    _require_calibration(options, graphs.quantize, target)
    if options.calibration is not None:
        options, graphs = _calibrated(options, graphs, config)
    return ExportJob(options, target, source, config, schedule, graphs, checkpoint, assets)


def _assets(
    source: Source, config: ModelConfig, chosen_template: str | None, max_pixels: int | None
) -> Assets:
    """Tokenizer, preprocessing, chat template and token ids of a model.

    Raises:
        TrioError: the checkpoint's small files are incomplete or damaged.
    """
    assert source.folder is not None
    recipe = source.recipe
    return checkpoint_assets(
        source.folder,
        config,
        source.raw_config,
        preprocessing=recipe.preprocessing if recipe else None,
        chat_template=recipe.chat_template if recipe else None,
        max_pixels=recipe.max_pixels if max_pixels is None and recipe else max_pixels,
        chosen_template=chosen_template,
    )


def plan_schedule(source: Source, config: ModelConfig, options: ExportOptions) -> Schedule:
    """Choose the pruning points.

    Raises:
        TrioError: they do not suit the model.
    """
    depth, published = config.text.num_layers, source.recipe.schedules if source.recipe else None
    schedule = resolve_schedule(depth, options.budget, options.schedule, options.method, published)
    schedule.validate(depth, request_limits(config).visual_tokens)
    check_methods(config, [point.method for point in schedule.points])
    return schedule


def lay_out_weights(job: ExportJob, models: Mapping[str, ir.Model]) -> WeightPlan:
    """Decide whether the checkpoint's files are kept, and where each weight will lie.

    Raises:
        TrioError: weights are to be linked that have to be converted.
    """
    dtype = job.graphs.dtype
    weights = used_weights(job.stages, models, job.graphs.stored_weights(job.config))
    parts = parts_of(weights)
    read = None if job.options.graphs_only else job.checkpoint
    sources = sources_by_part(weights, read.tensors) if read else {}
    same = bool(sources) and all(dtype_of(sources[p.name].entry) == p.dtype for p in parts)
    if job.options.link_weights and not same:
        has = sorted({dtype_of(source.entry) for source in sources.values()})
        hint = f"pass --dtype {has[0]} or " if len(has) == 1 else ""
        raise TrioError(
            f"--link-weights cannot make {dtype} out of the checkpoint's {', '.join(has)}: "
            f"{hint}leave --link-weights out"
        )
    if same:
        return WeightPlan(None, sources, kept_places(_floats(sources)))
    layout = plan_layout(parts)
    return WeightPlan(layout, sources, layout.places)


def _floats(sources: Mapping[str, PartSource]) -> dict[str, TensorEntry]:
    return {n: s.entry for n, s in sources.items() if isinstance(s.entry, TensorEntry)}


def sources_by_part(
    weights: Iterable[StoredWeight], checkpoint: Mapping[str, WeightEntry]
) -> dict[str, PartSource]:
    """Map the name of each part of the weights to what it is made from.

    Args:
        checkpoint: by canonical name.
    """
    return {
        part.name: PartSource(checkpoint[weight.name], weight if weight.coding else None)
        for weight in weights
        for part in weight.parts
    }


def write_bundle(
    job: ExportJob,
    models: Mapping[str, ir.Model],
    weights: WeightPlan,
    out: Path,
    progress: bool,
) -> None:
    """Write graphs, small files, weights and the manifest.

    Raises:
        TrioError: the disk is too full.
    """
    options, target, source, assets = job.options, job.target, job.source, job.assets
    stages, contents = serialised(job.stages, models, weights.places)
    _print_memory(job, stages, contents, progress)
    contents |= assets.files
    needed = sum(len(content) for content in contents.values())
    if not (options.graphs_only or options.link_weights):
        needed += weights.nbytes
    with BundleWriter(out, force=options.force, needed=needed) as writer:
        for name, content in contents.items():
            writer.write(name, content)
        if options.graphs_only:
            assert weights.layout is not None
            state = "planned"
            for shard in weights.layout.shards:
                writer.files[shard.file] = FileInfo(shard.size, None)
        else:
            state = write_weights(
                writer, weights.layout, weights.sources, options.link_weights, progress
            )
        manifest = Manifest(
            model=ModelInfo(source.name, source.source, source.revision, source.raw_config),
            dtype=job.graphs.dtype,
            dialect=job.graphs.dialect,
            schedule=job.schedule.to_json(),
            probe=job.graphs.probe,
            positions=job.graphs.positions,
            threshold=job.graphs.threshold,
            decode="separate" if job.graphs.separate_decode else "shared",
            stages=stages,
            tensors=dict(weights.places),
            generation=assets.generation,
            files=dict(writer.files),
            versions=_versions(),
            weights=state,
            target=target.name,
            runtime=target.runtime,
            provider=target.provider,
            precision=target.precision,
            budgets=job.budgets,
            checkpoint=job.checkpoint.info if job.checkpoint else None,
            quantization=quantization_of(
                job.graphs,
                (job.checkpoint and job.checkpoint.form) or "rtn",
                options.calibration if isinstance(options.calibration, Calibration) else None,
            ),
        )
        writer.write(MANIFEST, manifest.dump())
    for note in (*(job.checkpoint.notes if job.checkpoint else ()), *assets.notes):
        print_note(progress, note)


def _merge(options: ExportOptions, keywords: Mapping[str, Any]) -> ExportOptions:
    """Options with fields replaced; those of `SelectionOptions` go to `selection`."""
    own = {name: value for name, value in keywords.items() if name not in _SELECTION_FIELDS}
    selection = {name: value for name, value in keywords.items() if name in _SELECTION_FIELDS}
    options = replace(options, **own)
    return replace(options, selection=replace(options.selection, **selection))


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


def _refuse_unreadable(dialect: str, target: Target) -> None:
    """Raises TrioError where the target's runtime does not read graphs in this dialect."""
    readable = runtime_spec(target.runtime).readable_dialects(target)
    if dialect not in readable:
        raise TrioError(
            f"{target.runtime}{f' {target.tensorrt}' if target.tensorrt else ''}, the runtime of "
            f"the target {target.name}, does not read graphs in the {dialect} dialect: choose "
            f"{' or '.join(readable)}"
        )


def _graph_options(
    config: ModelConfig,
    source: Source,
    target: Target,
    options: ExportOptions,
    checkpoint: ReadCheckpoint | None,
) -> GraphOptions:
    """How the graphs are written: as given, else as the recipe says, else the default."""
    recipe = source.recipe
    stored = _stored_matrices(source, checkpoint)
    quantize = quantize_of(recipe, target, options)
    if stored is not None:
        quantize = same_scheme(stored, options.quantize)
    usual = (recipe.selections if recipe else None, target.selections)
    selections = selections_of(options.selections, usual, quantize, stored is not None)
    values: dict[str, Any] = {}
    for name in ("probe", "positions", "threshold"):
        given = getattr(options.selection, name)
        values[name] = given if given is not None else getattr(recipe or _DEFAULTS, name)
    values["positions"] = check_positions(config, values["positions"])
    if not 0 < values["threshold"] <= 1:
        raise TrioError(f"the threshold is {values['threshold']}, but cosines lie in (0, 1]")
    # Codes are constants: a target's inputs are meant for floats.
    weights = options.weights or ("constants" if quantize else target.weights)
    return GraphOptions(
        dialect=str(options.dialect),
        weights=weights,  # type: ignore[arg-type]
        dtype=options.dtype,  # type: ignore[arg-type]
        quantize=quantize,
        selections=selections,  # type: ignore[arg-type]
        embeddings=options.embeddings or target.embeddings,  # type: ignore[arg-type]
        stored=stored,
        separate_decode=target.decode_layout == "separate",
        query_block=runtime_spec(target.runtime).query_block(str(options.dialect)),
        **values,
    )


def _stored_matrices(
    source: Source, checkpoint: ReadCheckpoint | None
) -> Mapping[str, StoredMatrix] | None:
    """Matrices that the checkpoint holds quantised; None: it has none.

    Raises:
        TrioError: config.json says that there are, and the weights are not at hand.
    """
    if checkpoint is not None:
        return checkpoint.stored
    require_float(source.raw_config)
    return None


def _refuse_links(options: ExportOptions, quantize: str | None) -> None:
    """Raises TrioError where the checkpoint's files are to be kept and weights are quantised."""
    if options.link_weights and quantize is not None:
        raise TrioError(
            f"--link-weights keeps the checkpoint's files, and weights in {quantize} are written "
            "into other ones: leave --link-weights out"
        )


def _require_calibration(options: ExportOptions, quantize: str | None, target: Target) -> None:
    """Raises TrioError where a scheme needs a calibration and there is none, or the reverse."""
    if options.calibration is None:
        refuse_uncalibrated(quantize, target)
    elif not rounds_inputs(quantize):
        raise TrioError(
            "--calibrate measures activations, which --quantize fp8 alone rounds: leave one out"
        )


def _calibrated(
    options: ExportOptions, graphs: GraphOptions, config: ModelConfig
) -> tuple[ExportOptions, GraphOptions]:
    """Options with what was measured, or is measured now.

    Raises:
        TrioError: it was measured on another model.
    """
    found = options.calibration
    if found is not None and not isinstance(found, Calibration):
        found = found(options)
    assert found is not None
    for weight in graphs.stored_weights(config):
        coded = weight.coding is not None and weight.coding.label == "fp8"
        if coded and weight.name not in found.greatest:
            raise TrioError(
                f"the calibration says nothing of {weight.name}: it is one of another model, so "
                "calibrate with this one"
            )
    return replace(options, calibration=found), replace(graphs, inputs=found.greatest)


def quantize_of(recipe: Recipe | None, target: Target, options: ExportOptions) -> str | None:
    """The scheme to quantise by: the option, else the recipe's, else the target's; None: float."""
    named = (options.quantize, recipe and recipe.quantize, target.quantize)
    chosen = next((name for name in named if name), None)
    return None if chosen in (None, NO_SCHEME) else chosen


def quantization_of(
    graphs: GraphOptions, source: str = "rtn", calibration: Calibration | None = None
) -> Quantization | None:
    """What a manifest says of quantised weights; None: all are float.

    Args:
        source: where the codes come from.
        calibration: what activations are rounded by.
    """
    scheme = graphs.scheme
    if scheme is None:
        return None
    named = scheme.stored or {}
    stored = named.values()
    heads = [named[name] for name in (HEAD, EMBEDDINGS) if name in named]
    per_row = scheme.bits == 8 and graphs.make_dialect().form == "signed"
    block = 0 if per_row else scheme.blocks[0]
    if stored:
        block = max(matrix.block for matrix in stored if matrix.bits == scheme.bits)
    return Quantization(
        scheme=scheme.name,
        bits=scheme.bits,
        block=block,
        symmetric=all(matrix.symmetric for matrix in stored),
        selections=graphs.selections,
        head=f"int{heads[0].bits}" if heads else "int8",
        source=source,
        revision=READING if stored else ROUNDING,
        calibration=calibration,
    )


def write_weights(
    writer: BundleWriter,
    layout: Layout | None,
    sources: Mapping[str, PartSource],
    link: bool,
    progress: bool,
) -> str:
    """Write weights into a bundle, with a progress bar; returns `Manifest.weights`."""
    files = {source.entry.file for source in sources.values()}
    if layout is not None:
        total = sum(place.nbytes for place in layout.places.values())
    else:
        total = sum(file.stat().st_size for file in files)
    with byte_bar(total, "weights", progress) as bar:
        if layout is not None:
            write_layout(writer, layout, sources, bar.update)
            return "copied"
        kept = keep_files(writer, files, link, bar.update)
    if link and kept.linked:
        print_note(
            progress,
            "weights are hard links, no weight byte was written: ONNX Runtime takes them, "
            "onnx.load and onnx.checker refuse hard-linked data (load_external_data=False)",
        )
    if link and kept.linked < len(files):
        print_note(progress, "the file system refused hard links here, so weights were copied")
    return "linked" if kept.linked else "copied"


def _print_memory(
    job: ExportJob, stages: Sequence[StageInfo], contents: Mapping[str, bytes], show: bool
) -> None:
    """Say whether the engines of a target will fit it, before weights are copied."""
    if not show or not runtime_spec(job.target.runtime).needs_engines:
        return
    from trio_deploy.runtimes.tensorrt.memory import Fit, memory

    graphs = {s.name: onnx.load_model_from_string(contents[s.file]) for s in stages}
    target = replace(job.target, dialect=job.graphs.dialect, dtype=job.graphs.dtype)
    budgets = budgets_for_layers(
        job.source.recipe.schedules if job.source.recipe else {}, job.schedule, job.options.method
    )
    try:
        needed = memory(stages, graphs, job.config, job.schedule, target, budgets)
    except TrioError:  # limits that do not suit the model, which `trio build` refuses
        return
    print_note(show, Fit(job.target, (needed,)).verdict)


def print_note(show: bool, text: str) -> None:
    """Print what an export has to say on stderr, if it is to be shown."""
    if show:
        print(f"trio: {text}", file=sys.stderr)


def _versions() -> dict[str, str]:
    return {
        name: metadata.version(name) for name in ("trio-deploy", "onnx", "onnx-ir", "onnxscript")
    }
