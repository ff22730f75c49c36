"""Device memory of a model's TensorRT engines, per decode layout.

Weights are those that the graphs refer to; an engine may store one of them twice, such as where a
selection uses it and its transpose. Activations are an upper bound: every node's result, as long as
it is needed, at the largest sizes of the profiles; TensorRT fuses nodes and usually needs less.
Whether it fuses the Attention nodes of the `onnx` dialect, which it may split up, makes so much of
a difference that both are shown; whether a model fits depends on the larger one.
All engines share one scratch buffer, so the largest counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto, TensorProto

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import Kind, StageInfo
from trio_deploy.config.target import Target
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.names import EMBEDDINGS, HEAD
from trio_deploy.files import format_bytes
from trio_deploy.runtimes.tensorrt.dry_run.rules import read_graph
from trio_deploy.runtimes.tensorrt.dry_run.shapes import Resolved, activation_bytes, resolve
from trio_deploy.runtimes.tensorrt.logged import Logged, logged
from trio_deploy.runtimes.tensorrt.profiles import (
    DECODE,
    Profile,
    buffer_bytes,
    cache_bytes,
    stage_profiles,
)
from trio_deploy.schedule.schedule import Schedule

#: Estimated bytes that CUDA and TensorRT take before the first engine.
CONTEXT_BYTES = 2**29

_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the device with all engines loaded and a full batch in flight.

    Attributes:
        layout: decode layout, `separate` or `shared`.
        dialect: dialect of the graphs.
        weights: stage → bytes of its engine's weights.
        table: bytes of the tables of embeddings among them, one per engine that looks tokens up.
        heads: bytes of each engine's output head among them, without a table that stands for it.
        bound: bytes of the weights that are inputs of engines, of which there is one copy.
        kinds: stage → its kind.
        cache: keys and values of a full batch, at the schedule's budget where capacity may vary.
        activations: maximum of the engine that needs the largest.
        fused: the same if every Attention node is one kernel.
        logged: the same as NVIDIA's compiler logged it; None: it was not asked for this model.
        moved: bytes of the cache that a decode step reads and writes.
        tensors: inputs and outputs of the stage with the largest, new keys and values included.
        cached: other buffers that the runtime may cache for the next request.
    """

    layout: str
    dialect: str
    weights: dict[str, int]
    table: int
    heads: tuple[int, ...]
    bound: int
    kinds: dict[str, Kind]
    cache: int
    activations: int
    fused: int
    logged: Logged | None
    moved: int
    tensors: int
    cached: int

    @property
    def all_weights(self) -> int:
        return sum(self.weights.values()) + self.bound

    @property
    def total(self) -> int:
        buffers = self.cache + self.tensors + self.cached
        return self.all_weights + self.activations + buffers + CONTEXT_BYTES

    @property
    def at_least(self) -> int:
        """Weights and KV cache, which no fusion makes smaller."""
        return self.all_weights + self.cache

    @property
    def total_fused(self) -> int:
        """The total if every Attention node is one kernel."""
        return self.total - self.activations + self.fused

    def to_json(self) -> dict[str, Any]:
        """Plain values, in bytes."""
        return {
            "decode_layout": self.layout,
            "dialect": self.dialect,
            "weights": self.weights,
            "tables_of_embeddings": self.table,
            "output_heads": list(self.heads),
            "weights_as_inputs": self.bound,
            "kv_cache": self.cache,
            "activations_at_most": self.activations,
            "activations_if_attention_is_fused": self.fused,
            "activations_logged": None if self.logged is None else self.logged.scratch_bytes,
            "kv_cache_moved_per_step": self.moved,
            "inputs_and_outputs": self.tensors,
            "kept_for_the_next_request": self.cached,
            "cuda_and_tensorrt": CONTEXT_BYTES,
            "total": self.total,
            "total_if_attention_is_fused": self.total_fused,
        }


def memory(
    stages: Sequence[StageInfo],
    graphs: Mapping[str, ModelProto],
    config: ModelConfig,
    schedule: Schedule,
    target: Target,
    budgets: Mapping[float, Schedule] | None = None,
) -> Memory:
    """Memory of a model's graphs on a target, at its limits and with `schedule`.

    Args:
        graphs: stage → graph in the target's dialect, without the data of its weights.
        target: its limits bound the sizes.
        budgets: the recipe's schedules at the same pruning points.

    Raises:
        TrioError: the target's limits do not fit the model.
    """
    activations = fused = tensors = 0
    found = stage_profiles(stages, config, schedule, target, budgets)
    for stage in stages:
        graph = graphs[stage.name]
        for profile in found[stage.name]:
            resolved = _at_most(graph, profile)
            activations = max(activations, activation_bytes(graph, resolved))
            # No fused kernel computes in float32: TensorRT-RTX's compiler splits it up.
            split = target.dtype == "float32"
            fused = max(fused, activation_bytes(graph, resolved, split_attention=split))
            for use in profile.parts:
                decodes = stage.kind == "decode" or use.name == DECODE
                at_most = _at_most(graph, use) if profile.uses else resolved
                tensors = max(tensors, _outside(stage, at_most, decodes))
    sizes = {
        "buffers": 1 if target.dialect == "onnx" else 2,  # steps write in place, or alternate
        "item": 4 if target.dtype == "float32" else 2,
    }
    cache = cache_bytes(config, schedule, target.limits, budgets, **sizes)
    buffers = buffer_bytes(config, schedule, target.limits, budgets, **sizes)
    return Memory(
        layout="separate" if any(s.kind == "decode" for s in stages) else "shared",
        dialect=target.dialect,
        weights={stage: stored_bytes(model) for stage, model in graphs.items()},
        table=sum(_table_bytes(stage, graphs[stage.name]) for stage in stages),
        heads=tuple(filter(None, (_head_bytes(stage, graphs[stage.name]) for stage in stages))),
        bound=_bound(stages, graphs, sizes["item"]),
        kinds={stage.name: stage.kind for stage in stages},
        cache=cache,
        activations=activations,
        fused=fused,
        logged=logged(config, schedule, target),
        moved=_moved(target, cache),
        tensors=tensors,
        cached=max(0, buffers - cache - tensors),
    )


def bundle_fit(bundle: Bundle, target: Target) -> Fit:
    """Whether the engines of a bundle's own graphs fit a target.

    Raises:
        TrioError: the target's limits do not fit the model, or a graph cannot be read.
    """
    stages = bundle.manifest.stages
    graphs = {stage.name: read_graph(bundle.graph(stage.name)) for stage in stages}
    own = as_exported(bundle, target)
    return Fit(
        target, (memory(stages, graphs, bundle.config, bundle.schedule, own, bundle.budgets),)
    )


def as_exported(bundle: Bundle, target: Target) -> Target:
    """A target with the form of a bundle's graphs, which the options of its export decided."""
    manifest = bundle.manifest
    fed = any(stage.weight_inputs for stage in manifest.stages)
    quantised = manifest.quantization
    return replace(
        target,
        dialect=manifest.dialect,
        dtype=manifest.dtype,
        decode_layout=manifest.decode,
        weights="inputs" if fed else "constants",
        quantize=None if quantised is None else quantised.scheme,
        selections=None if quantised is None else quantised.selections,
    )


def _moved(target: Target, cache: int) -> int:
    """Bytes of the cache that a decode step moves.

    With the `onnx` dialect it reads one cache, in place. With `primitive` it reads one, writes the
    other, and writes a copy for attention, which reads it: so TensorRT-RTX's compiler does, in all
    forms of the graph that were tried.
    """
    return cache if target.dialect == "onnx" else cache // 2 * 4


def _at_most(graph: ModelProto, profile: Profile) -> Resolved:
    """Sizes in a graph at the largest ones of a profile."""
    shapes = {name: bounds.max for name, bounds in profile.shapes.items()}
    values = {name: bounds.max for name, bounds in profile.values.items()}
    return resolve(graph, shapes, values)


def _outside(stage: StageInfo, resolved: Resolved, decodes: bool) -> int:
    """Bytes of inputs and outputs, without the caches that a decode step reads and writes."""
    tensors = (*stage.inputs, *stage.outputs)
    names = [t.name for t in tensors if not (decodes and t.role == "cache")]
    return sum(resolved.tensors[name].nbytes for name in names)


def stored_bytes(model: ModelProto) -> int:
    """Bytes of a graph's weights."""
    return sum(map(_stored, model.graph.initializer))


def _stored(tensor: TensorProto) -> int:
    lengths = [entry.value for entry in tensor.external_data if entry.key == "length"]
    if tensor.data_location == TensorProto.EXTERNAL and lengths:
        return int(lengths[0])
    return len(tensor.raw_data)


def _table_bytes(stage: StageInfo, graph: ModelProto) -> int:
    """Bytes of the table that tokens are looked up in; 0 in a stage that looks none up.

    One that serves as a quantised head is that head's codes and scales in 8 bit.
    """
    if not stage.inputs_of("ids"):
        return 0
    return sum(_stored(each) for each in graph.graph.initializer if _of_table(each.name))


def _head_bytes(stage: StageInfo, graph: ModelProto) -> int:
    """Bytes of the output head; tied, it has the name of the table, whose bytes are not counted."""
    return sum(
        _stored(each)
        for each in graph.graph.initializer
        if each.name.startswith((EMBEDDINGS, HEAD))
        and not (stage.inputs_of("ids") and _of_table(each.name))
    )


def _of_table(name: str) -> bool:
    return name == EMBEDDINGS or name.startswith(f"{EMBEDDINGS}.int8")


def _bound(stages: Sequence[StageInfo], graphs: Mapping[str, ModelProto], item_bytes: int) -> int:
    """Bytes of the weights that are inputs of some graph, each counted once."""
    counts = {
        entry.name: math.prod(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        for stage in stages
        for entry in graphs[stage.name].graph.input
        if entry.name in stage.weight_inputs
    }
    return sum(counts.values()) * item_bytes


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a target, and what would make it fit.

    Attributes:
        layouts: memory per decode layout; the target's own first.
        advice: one sentence per remedy; empty if it fits.
    """

    target: Target
    layouts: tuple[Memory, ...]
    advice: tuple[str, ...] = ()

    @property
    def usable(self) -> int | None:
        """Bytes that engines and buffers may take; None: unknown."""
        return None if self.target.usable_gib is None else int(self.target.usable_gib * _GIB)

    @property
    def fits(self) -> bool | None:
        """Whether the target's own layout fits even if TensorRT splits attention up; None if the
        target's memory is unknown."""
        return None if self.usable is None else self.layouts[0].total <= self.usable

    @property
    def fits_if_fused(self) -> bool | None:
        """Whether it fits if TensorRT makes every Attention node one kernel; None: unknown."""
        return None if self.usable is None else self.layouts[0].total_fused <= self.usable

    @property
    def weights(self) -> int:
        """Bytes of the weights in the target's own layout."""
        return self.layouts[0].all_weights

    @property
    def vocabulary(self) -> str:
        """What of the weights has a row per word: those of the table and of each engine's head.

        Empty if engines get their weights as inputs, of which there is one copy.
        """
        own, parts = self.layouts[0], []
        if own.table:
            parts.append(f"{format_bytes(own.table)} of them for the table of embeddings")
        elif self.target.embeddings == "host":
            parts.append("without the table of embeddings, which is mapped on the host")
        if own.heads:
            engines = f"each of {len(own.heads)} engines" if len(own.heads) > 1 else "one engine"
            parts.append(f"{format_bytes(max(own.heads))} for the output head in {engines}")
        return ", ".join(parts)

    @property
    def oversized(self) -> bool:
        """Whether weights and KV cache of the target's own layout alone exceed its memory."""
        return self.usable is not None and self.layouts[0].at_least > self.usable

    @property
    def verdict(self) -> str:
        """One line: whether the target's own layout fits, with the figures that decide it."""
        own, name = self.layouts[0], self.target.name
        if self.usable is None:
            return f"unknown: the target {name} does not say how much memory it has"
        has = format_bytes(self.usable)
        if self.oversized:
            return (
                f"does not fit {name}: weights, {format_bytes(own.all_weights)}, and KV cache, "
                f"{format_bytes(own.cache)}, exceed its {has}"
            )
        if not self.fits:
            return (
                f"may not fit {name}: with activations of at most {format_bytes(own.activations)} "
                f"it takes {format_bytes(own.total)}, beyond its {has}"
            )
        return f"fits {name}: at most {format_bytes(own.total)} of its {has}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, in bytes."""
        return {
            "target": self.target.name,
            "dtype": self.target.dtype,
            "usable": self.usable,
            "fits": self.fits,
            "oversized": self.oversized,
            "verdict": self.verdict,
            "fits_if_attention_is_fused": self.fits_if_fused,
            "layouts": [each.to_json() for each in self.layouts],
            "advice": list(self.advice),
        }

    def to_text(self) -> str:
        target, limits = self.target, self.target.limits
        size = "of unknown size"
        if target.memory_gib is not None and self.usable is not None:
            size = f"{target.memory_gib:g} GiB, {format_bytes(self.usable)} of them for this"
        lines = [
            f"memory on {target.name} ({size}), {target.dtype}",
            f"at its limits: {_count(limits.max_batch, 'row')} of {limits.max_text_tokens} text, "
            f"{limits.max_visual_tokens} visual and {limits.max_new_tokens} new tokens",
            "",
            f"{'decode layout':<34}" + "".join(f"{each.layout:>12}" for each in self.layouts),
        ]
        rows: list[tuple[str, Sequence[int | None]]] = [
            ("weights, about", [each.all_weights for each in self.layouts]),
            ("  vision and embed", [_part(m, "vision", "embed") for m in self.layouts]),
            ("  segments of layers", [_part(m, "prefill") for m in self.layouts]),
            ("  selections", [_part(m, "select") for m in self.layouts]),
            ("  decode", [_part(m, "decode") for m in self.layouts]),
            ("  of these: tables of embeddings", [each.table for each in self.layouts]),
            ("  of these: output heads", [sum(each.heads) for each in self.layouts]),
            *self._bound(),
            ("KV cache", [each.cache for each in self.layouts]),
            ("activations, at most", [each.activations for each in self.layouts]),
            *self._fused("  if attention is fused", "activations", "fused"),
            *self._logged(),
            ("inputs and outputs", [each.tensors for each in self.layouts]),
            ("cached for the next request", [each.cached for each in self.layouts]),
            ("CUDA and TensorRT, about", [CONTEXT_BYTES for _ in self.layouts]),
            ("total", [each.total for each in self.layouts]),
            *self._fused("  if attention is fused", "total", "total_fused"),
            ("KV cache moved per decode step", [each.moved for each in self.layouts]),
        ]
        for label, sizes in rows:
            figures = ["" if size is None else format_bytes(size) for size in sizes]
            line = f"{label:<34}" + "".join(f"{figure:>12}" for figure in figures)
            lines.append(line.rstrip())
        if self.usable is not None:
            verdicts = [_verdict(each, self.usable) for each in self.layouts]
            lines.append(f"{'fits':<34}" + "".join(f"{verdict:>12}" for verdict in verdicts))
        if self.advice:
            lines += ["", *(f"- {each}" for each in self.advice)]
        return "\n".join(lines)

    def _bound(self) -> list[tuple[str, list[int]]]:
        """A row of the weights that are inputs, if there are any."""
        found = [each.bound for each in self.layouts]
        return [("  inputs of the engines, once", found)] if any(found) else []

    def _logged(self) -> list[tuple[str, list[int | None]]]:
        """A row of what NVIDIA's compiler logged, if it was asked for one of the layouts."""
        found = [each.logged for each in self.layouts]
        names = [each.compiler for each in found if each is not None]
        sizes = [None if each is None else each.scratch_bytes for each in found]
        return [(f"  logged by {names[0]}", sizes)] if names else []

    def _fused(self, label: str, split: str, whole: str) -> list[tuple[str, list[int]]]:
        """A row of the bytes with fused attention, if they differ."""
        if all(getattr(each, split) == getattr(each, whole) for each in self.layouts):
            return []
        return [(label, [getattr(each, whole) for each in self.layouts])]


def _verdict(memory: Memory, usable: int) -> str:
    if memory.total <= usable:
        return "yes"
    return "if fused" if memory.total_fused <= usable else "no"


def _part(memory: Memory, *kinds: Kind) -> int:
    return sum(size for stage, size in memory.weights.items() if memory.kinds[stage] in kinds)


def _count(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
