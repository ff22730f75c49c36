"""Cost of a schedule against no pruning, and next to the paper's own figures: `trio plan`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.fit import fit_config
from trio_deploy.checkpoint.resolve import resolve, source_config
from trio_deploy.checkpoint.safetensors import missing_weights
from trio_deploy.config.options import ExportOptions
from trio_deploy.config.recipe import Recipe, with_schedule_file
from trio_deploy.config.target import Target
from trio_deploy.config.yaml_files import DTYPES
from trio_deploy.cost.flops import (
    Cost,
    account,
    paper_layer_flops,
    vision_bytes,
    vision_flops,
)
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.names import EMBEDDINGS, HEAD
from trio_deploy.families.registry import check_methods, request_limits
from trio_deploy.files import format_bytes
from trio_deploy.quant.quantization_config import require_float
from trio_deploy.quant.schemes import same_scheme, selections_of
from trio_deploy.quant.stored_weight import parts_of
from trio_deploy.runtimes.machine import usable_memory
from trio_deploy.runtimes.registry import check_scheme, default_target, load_target, runtime_spec
from trio_deploy.schedule.budget import budgets_for_layers, resolve_schedule, smallest_budget
from trio_deploy.schedule.schedule import Schedule

if TYPE_CHECKING:
    from trio_deploy.runtimes.tensorrt.memory import Fit

PAPER_BUDGET = 0.111
"""The budget that the paper's rows for operations and KV cache belong to."""

_MIB = 2**20
_HALF_BYTES = 2  # KV caches are compared in 16-bit floats, as in the paper
_SAME = 0.01  # figures within 1 % of the paper's need no note


@dataclass(frozen=True)
class PaperRow:
    """A figure of the paper, pruned (at its budget of 11.1 %) and unpruned."""

    label: str
    pruned: float
    unpruned: float
    unit: str


@dataclass(frozen=True)
class HostMemory:
    """Memory of a bundle on a target without TensorRT, and on this machine if that is a CPU.

    Attributes:
        weights: bytes of the weights in the target's float type.
        cache: bytes of the KV cache in it, for the planned prompt.
        tower: bytes that the vision tower takes beside its weights while it runs over the prompt's
            picture, about.
        machine: bytes of this machine's memory, or its container's; None: unknown, or of no
            importance (a GPU).
    """

    target: Target
    weights: int
    cache: int
    tower: int
    machine: int | None

    @property
    def verdict(self) -> str:
        """One line: whether it fits this machine."""
        least = self.weights + self.cache + self.tower
        if self.machine is None:
            return f"takes {format_bytes(least)} and working memory on {self.target.name}"
        has = f"this machine's {format_bytes(self.machine)}"
        if least > self.machine:
            return f"does not fit: {format_bytes(least)} exceed {has}"
        # Runtimes lay weights out anew, of which the files' pages are a second copy.
        if least + self.weights > self.machine:
            return (
                f"may not fit: {format_bytes(least)}, and up to {format_bytes(self.weights)} more "
                f"for copies of weights, of {has}"
            )
        return f"fits: {format_bytes(least)} to {format_bytes(least + self.weights)} of {has}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, in bytes."""
        return {
            "target": self.target.name,
            "dtype": self.target.dtype,
            "quantize": self.target.quantize,
            "selections": self.target.selections,
            "weights": self.weights,
            "kv_cache": self.cache,
            "tower": self.tower,
            "machine": self.machine,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Plan:
    """Cost of a schedule on one model; `cost` with, `unpruned` without pruning.

    Attributes:
        fit: memory on a target; None where the packages are missing that count weights.
        warnings: notes of importance whoever reads the plan; the others are on its arithmetic.
    """

    model: str
    config: ModelConfig
    schedule: Schedule
    visual: int
    text: int
    tiles: int
    cost: Cost
    unpruned: Cost
    vision: int
    paper: tuple[PaperRow, ...]
    notes: tuple[str, ...]
    fit: Fit | HostMemory | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Multiply-adds and bytes; the paper's figures under `paper`, in their units."""
        return {
            "model": self.model,
            "visual_tokens": self.visual,
            "text_tokens": self.text,
            "schedule": self.schedule.to_json(),
            "keep": list(self.schedule.resolve(self.visual)),
            "pruned": _cost_json(self.cost),
            "unpruned": _cost_json(self.unpruned),
            "vision": {"tiles": self.tiles, "flops": self.vision},
            "paper": [asdict(row) for row in self.paper],
            "notes": [*self.warnings, *self.notes],
            **({"memory": self.fit.to_json()} if self.fit else {}),
        }

    def to_text(self, paper: bool = False) -> str:
        """What a budget keeps and costs, and whether it fits, in about ten lines.

        Args:
            paper: show the layers, all that is counted and the paper's own figures instead.
        """
        return self._paper_text() if paper else self._short_text()

    def _short_text(self) -> str:
        ours, full, depth = self.cost, self.unpruned, self.config.text.num_layers
        *others, last = map(str, self.schedule.resolve(self.visual) or ["all"])
        kept = f"{', '.join(others)} and {last}" if others else last
        layers = ", ".join(map(str, self.schedule.layers))
        where = f" from layer{'s' * bool(others)} {layers} on" if layers else ""
        share = ours.average / self.visual if self.visual else 1.0
        flops = _instead(_count(ours.prefill), _count(full.prefill), full.prefill / ours.prefill)
        cache = _instead(
            format_bytes(ours.kv_bytes),
            format_bytes(full.kv_bytes),
            full.kv_bytes / max(1, ours.kv_bytes),
        )
        tower = self.fit.tower if isinstance(self.fit, HostMemory) else 0
        lines = [
            self.model,
            f"prompt     {self.visual} visual and {self.text} text tokens",
            f"pruning    {kept} visual tokens kept{where}",
            f"kept       {share:.1%} of the visual tokens, averaged over {depth} layers",
            f"tower      {_count(self.vision)}: multiply-adds of the vision tower, never pruned"
            + (f"; about {format_bytes(tower)} while it runs" if tower else ""),
            f"prefill    {flops}: multiply-adds of the language model",
            f"KV cache   {cache}: in 16 bits",
        ]
        if self.fit is None:
            lines.append("memory     not counted: pip install 'trio-deploy[export]'")
        else:
            target = self.fit.target
            kind = f"{target.quantize} and {target.dtype}" if target.quantize else target.dtype
            kind += ", selections float" if target.selections == "float" else ""
            weights = f"{format_bytes(self.fit.weights)} in {kind}"
            lines.append(f"weights    {weights}, for the target {target.name}")
            if not isinstance(self.fit, HostMemory) and self.fit.vocabulary:
                lines.append(f"           {self.fit.vocabulary}")
            lines.append(f"memory     {self.fit.verdict}")
        advice = () if self.fit is None or isinstance(self.fit, HostMemory) else self.fit.advice
        return "\n".join([*lines, *(f"- {each}" for each in (*advice, *self.warnings))])

    def _paper_text(self) -> str:
        text = self.config.text
        lines = [
            f"{self.model}: {text.num_layers} layers, hidden size {text.hidden_size}; "
            f"{self.visual} visual and {self.text} text tokens",
            f"schedule {self.schedule}",
            "",
            f"{'layers':<12}{'visual':>8}{'all':>8}",
        ]
        for start, stop, visual, tokens in self.cost.ranges:
            span = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
            lines.append(f"{span:<12}{visual:>8}{tokens:>8}")
        share = self.cost.average / self.visual if self.visual else 1.0
        lines += [
            f"{'average':<12}{self.cost.average:>8.1f}  {share:.1%} of the visual tokens",
            "",
            f"{'':<34}{'pruned':>12}{'unpruned':>12}{'ratio':>8}",
        ]
        ours, full = self.cost, self.unpruned
        rows: list[tuple[str, float, float, str]] = [
            ("FLOPs by the paper's formula", ours.paper, full.paper, ""),
            ("FLOPs of the prefill, all counted", ours.prefill, full.prefill, ""),
            ("  layers", ours.layers, full.layers, ""),
            ("  scores of tokens", ours.saliency, full.saliency, ""),
            ("  comparisons of tokens, at most", ours.similarity, full.similarity, ""),
            ("  lm_head", ours.lm_head, full.lm_head, ""),
            (f"FLOPs of the vision tower, {_tiles(self.tiles)}", self.vision, self.vision, ""),
            ("KV cache, 16-bit", ours.kv_bytes / _MIB, full.kv_bytes / _MIB, "MiB"),
        ]
        lines += [_row(*row) for row in rows]
        if self.paper:
            lines += ["", "the paper's own figures (11.1 %)"]
            lines += [_row(r.label, r.pruned, r.unpruned, r.unit) for r in self.paper]
        lines += ["", *(f"- {note}" for note in (*self.warnings, *self.notes))]
        if self.fit is not None and not isinstance(self.fit, HostMemory):
            lines += ["", self.fit.to_text()]
        return "\n".join(lines)


def plan(
    model: str,
    options: ExportOptions | None = None,
    *,
    visual_tokens: int | None = None,
    text_tokens: int = 60,
    probes: int = 4,
    progress: bool = True,
    **keywords: Any,
) -> Plan:
    """Cost of a model at a budget or schedule (default: the paper's 11.1 %).

    Args:
        model: recipe name or file, checkpoint folder (its config.json is enough), or hub id.
        options: budget, schedule, method, target, dtype, quantize, selections, embeddings and
            max_pixels are used, as in `export_model`; whether it fits is said of the target, or of
            this machine if that is a CPU.
        visual_tokens: visual tokens of the prompt; None: the maximum of one image, without
            newlines.
        text_tokens: text tokens of the prompt.
        probes: number of probe positions per pruning point.
        progress: say on stderr what takes long.
        keywords: fields of `ExportOptions`, which replace those of `options`.

    Raises:
        TrioError: unknown model, impossible budget or schedule, counts below 0, or a quantised
            checkpoint without its weights or with another scheme than it has.
    """
    options = with_schedule_file(replace(options or ExportOptions(), **keywords))
    found = resolve(model, weights_needed=False)
    config, stored = source_config(found, options.max_pixels), None
    if found.folder is not None and not missing_weights(found.folder):
        checkpoint = Checkpoint.from_path(found.folder)
        config, stored = fit_config(checkpoint, config), checkpoint.stored
    else:
        require_float(found.raw_config)
    published = found.recipe.schedules if found.recipe else {}
    visual, tiles = _visual_tokens(config, visual_tokens)
    if visual < 0 or text_tokens < 0 or probes < 1:
        raise TrioError("token counts must not be negative, and probes must be 1 or more")
    depth = config.text.num_layers
    chosen = resolve_schedule(
        depth, options.budget, options.schedule, options.method, published or None
    )
    chosen.validate(depth, visual)
    check_methods(config, [point.method for point in chosen.points])

    def cost(of: Schedule) -> Cost:
        return account(config.text, of, visual, text_tokens, probes=probes, item_bytes=_HALF_BYTES)

    pruned, unpruned = cost(chosen), cost(Schedule())
    paper = _paper_rows(found.name)
    if stored:
        options = replace(options, quantize=same_scheme(stored, options.quantize))
    device = _device(options, found.recipe, bool(stored))
    if progress and runtime_spec(device.runtime).needs_engines:
        print(
            f"trio: building the graphs of {found.name} to count its memory on {device.name}, "
            "which takes up to a minute",
            file=sys.stderr,
        )
    budgets = budgets_for_layers(published, chosen, options.method)
    return Plan(
        model=found.name,
        config=config,
        schedule=chosen,
        visual=visual,
        text=text_tokens,
        tiles=tiles,
        cost=pruned,
        unpruned=unpruned,
        vision=vision_flops(config, tiles, visual_tokens),
        paper=paper,
        notes=_notes(config, chosen, visual, pruned, unpruned, paper),
        fit=_memory(config, chosen, device, budgets, pruned, (tiles, visual_tokens)),
        warnings=_warnings(config, chosen, visual, text_tokens),
    )


def _memory(
    config: ModelConfig,
    schedule: Schedule,
    device: Target,
    budgets: Mapping[float, Schedule],
    cost: Cost,
    picture: tuple[int, int | None],
) -> Fit | HostMemory | None:
    """Memory on a target; None where weights cannot be counted without the extra [export].

    Args:
        picture: tiles, and feature rows per tile (None: the most), of the prompt's picture.
    """
    if not runtime_spec(device.runtime).needs_engines:
        try:
            weights = _weight_bytes(config, schedule, device)
        except ModuleNotFoundError:
            return None
        scale = 2 if device.dtype == "float32" else 1
        machine = None if device.provider == "cuda" else usable_memory()
        block = runtime_spec(device.runtime).query_block(device.dialect)
        tower = vision_bytes(config, *picture, item_bytes=2 * scale, query_block=block)
        return HostMemory(device, weights, cost.kv_bytes * scale, tower, machine)
    # Builds graphs, which the arithmetic does not need.
    from trio_deploy.cost.device_memory import fit

    return fit(config, schedule, device, budgets)


def _weight_bytes(config: ModelConfig, schedule: Schedule, device: Target) -> int:
    """Bytes of a bundle's weights: a layer behind a pruning point may be stored twice."""
    from trio_deploy.graphs.options import GraphOptions
    from trio_deploy.graphs.weights import stored_weights

    options = GraphOptions(
        dialect=device.dialect,
        dtype=device.dtype,  # type: ignore[arg-type]  # of a checked target
        quantize=device.quantize,
        selections=device.selections or "int8",  # type: ignore[arg-type]  # of a checked target
    )
    parts = parts_of(stored_weights(config, options.make_dialect()))
    selected = tuple(f"language_model.layers.{layer}." for layer in schedule.layers)
    if any(point.method == "trio" for point in schedule.points):
        selected += (HEAD, EMBEDDINGS)  # tied, it has the table's name
    copies = parts_of(stored_weights(config, options.make_dialect("select")))
    parts += [part for part in copies if part.name.startswith(selected)]
    return sum(part.nbytes for part in {part.name: part for part in parts}.values())


def _warnings(
    config: ModelConfig, schedule: Schedule, visual: int, text_tokens: int
) -> tuple[str, ...]:
    few = schedule.rounded_up(visual)
    warnings = [] if few is None else [f"{few[:1].upper()}{few[1:]}."]
    if visual + text_tokens > config.text.max_positions:
        warnings.append(
            f"A prompt of {visual} visual and {text_tokens} text tokens is longer than the model's "
            f"context of {config.text.max_positions} tokens and will be rejected."
        )
    return tuple(warnings)


def _visual_tokens(config: ModelConfig, asked: int | None) -> tuple[int, int]:
    """Visual tokens and tiles of a prompt: those asked for, or the maximum of one image."""
    largest = request_limits(config)
    if asked is None:
        return largest.tiles * largest.tile_rows, largest.tiles
    return asked, min(largest.tiles, math.ceil(asked / largest.tile_rows))


def _device(options: ExportOptions, recipe: Recipe | None, stored: bool) -> Target:
    """The target whose memory is planned, with the float type and scheme that were asked for.

    Args:
        stored: whether the checkpoint's weights are quantised.
    """
    dtype = options.dtype
    if dtype is not None and dtype not in DTYPES:
        raise TrioError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    device = load_target(options.target or default_target())
    named = (options.quantize, recipe.quantize if recipe else None, device.quantize)
    scheme = check_scheme(device, next(filter(None, named), None))
    usual = (recipe.selections if recipe else None, device.selections)
    selections = selections_of(options.selections, usual, scheme, stored)
    return replace(
        device,
        dtype=dtype or device.dtype,
        quantize=scheme,
        selections=selections if scheme else None,
        embeddings=options.embeddings or device.embeddings,
    )


def _paper_rows(name: str) -> tuple[PaperRow, ...]:
    text = resources.files("trio_deploy").joinpath("data/paper.json").read_text(encoding="utf-8")
    paper = json.loads(text)
    rows = []
    for key, label, unit in (
        ("flops_T", "FLOPs", "T"),
        ("kv_cache_MiB_fp16", "KV cache, 16-bit", "MiB"),
    ):
        if name in paper[key]:
            figures = paper[key][name]
            rows.append(PaperRow(label, figures["trio_11.1"], figures["full"], unit))
    return tuple(rows)


def _notes(
    config: ModelConfig,
    schedule: Schedule,
    visual: int,
    pruned: Cost,
    unpruned: Cost,
    paper: tuple[PaperRow, ...],
) -> tuple[str, ...]:
    """Notes: what the figures mean, and where they differ from the paper's."""
    text = config.text
    notes = [
        "FLOPs are multiply-adds; the paper's formula takes visual tokens alone, two of three MLP "
        "matrices, and selection as free."
    ]
    largest = request_limits(config)
    if largest.visual_tokens > largest.tiles * largest.tile_rows:
        notes.append(
            "Visual tokens are those of the tiles, as the paper counts them; a prompt has one "
            "newline more per row of the tiled image: --visual-tokens takes the exact number."
        )
    if schedule.layers and schedule.layers[0] == 0:
        notes.append("With a first pruning point before layer 0, any budget above 0 can be had.")
    elif schedule.layers:
        notes.append(
            f"With a first pruning point before layer {schedule.layers[0]}, a budget must exceed "
            f"{smallest_budget(text.num_layers, schedule.layers):.3f}."
        )
    share = pruned.average / visual if visual else 1.0
    if paper and not math.isclose(share, PAPER_BUDGET, abs_tol=_SAME):
        notes.append(f"The paper's pruned figures belong to 11.1 %, not to this {share:.1%}.")
        paper = ()
    for row in paper:
        if row.unit == "T":
            notes += _flops_note(row, schedule, visual, config, pruned, unpruned)
        else:
            notes += _kv_note(row, config, pruned, unpruned)
    return tuple(notes)


def _flops_note(
    row: PaperRow,
    schedule: Schedule,
    visual: int,
    config: ModelConfig,
    pruned: Cost,
    unpruned: Cost,
) -> list[str]:
    ours, full = pruned.paper / 1e12, unpruned.paper / 1e12
    if _close(ours, row.pruned) and _close(full, row.unpruned):
        return []
    text = config.text
    before = (visual, *schedule.resolve(visual))[:-1]
    probed = ours + sum(
        paper_layer_flops(n, text.hidden_size, text.intermediate_size) / 1e12 for n in before
    )
    return [
        f"The paper gives {row.pruned:g} T pruned and {row.unpruned:g} T unpruned; its formula "
        f"gives {ours:#.3g} T and {full:.4g} T here, and {probed:#.3g} T with one whole layer's "
        "forward pass per probe."
    ]


def _kv_note(row: PaperRow, config: ModelConfig, pruned: Cost, unpruned: Cost) -> list[str]:
    ours, full = pruned.kv_bytes / _MIB, unpruned.kv_bytes / _MIB
    if _close(ours, row.pruned) and _close(full, row.unpruned):
        return []
    per_token = config.text.kv_bytes([1] * config.text.num_layers, _HALF_BYTES) / _MIB
    return [
        f"The paper gives {row.pruned:g} MiB pruned and {row.unpruned:g} MiB unpruned: "
        f"{row.pruned / per_token:.0f} and {row.unpruned / per_token:.0f} tokens per layer, "
        f"against {ours / per_token:.0f} and {full / per_token:.0f} here."
    ]


def _close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=_SAME)


def _instead(ours: str, full: str, ratio: float) -> str:
    return f"{ours} instead of {full}, {ratio:.1f}x less" if ratio > 1 else f"{ours}, nothing less"


def _count(flops: float) -> str:
    """A number of operations with its magnitude: `2.98 T`."""
    size, unit = (1e12, "T") if flops >= 1e12 else (1e9, "G") if flops >= 1e9 else (1e6, "M")
    return f"{flops / size:.3g} {unit}"


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"


def _row(label: str, pruned: float, unpruned: float, unit: str) -> str:
    """A line of the table; counts without a unit get the magnitude of the larger one."""
    ratio = f"{unpruned / pruned:.2f}x" if pruned and unpruned else ""
    size, digits = 1.0, 2 if unit == "T" else 1
    if not unit:
        digits, most = 3, max(pruned, unpruned)
        size, unit = (1e12, "T") if most >= 1e12 else (1e9, "G") if most >= 1e9 else (1e6, "M")
    values = "".join(f"{f'{value / size:.{digits}f} {unit}':>12}" for value in (pruned, unpruned))
    return f"{label:<34}{values}{ratio:>8}".rstrip()


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {
        "ranges": [
            {"start": start, "stop": stop, "visual": visual, "tokens": tokens}
            for start, stop, visual, tokens in cost.ranges
        ],
        "average": cost.average,
        "flops": {"paper_formula": cost.paper, **cost.prefill_json()},
        "kv_bytes": cost.kv_bytes,
    }
