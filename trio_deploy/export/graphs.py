"""The stages of a bundle as ONNX graphs, written with onnxscript.nn; no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import onnx_ir as ir

from trio_deploy.bundle.manifest import (
    GraphInfo,
    TensorInfo,
)
from trio_deploy.bundle.weights import (
    WeightRef,
    plan_layout,
)
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.names import canonical_tensors
from trio_deploy.graphs.decode import build_decode
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.prefill import build_prefill
from trio_deploy.graphs.stages import build_embed, build_vision
from trio_deploy.schedule.methods import encoder_scores
from trio_deploy.schedule.schedule import PruningPoint
from trio_deploy.selection.stage import build_select

__all__ = ["GraphOptions", "build_graphs", "segments"]


def segments(config: ModelConfig, layers: Sequence[int]) -> list[tuple[int, int, int]]:
    """(index, start, stop) of each prefill_{index}, for pruning before each of `layers`.

    A pruning point before layer 0 leaves no prefill_0: a segment without layers is not written.

    Raises:
        TrioError: layers that do not increase, or that the model does not have.
    """
    count = config.text.num_layers
    bounds = [0, *layers, count]
    if any(a >= b for a, b in pairwise(bounds[1:])) or (layers and layers[0] < 0):
        raise TrioError(
            f"The pruning layers {list(layers)} must increase and lie within 0…{count - 1}."
        )
    return [(i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]


def build_graphs(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> dict[str, ir.Model]:
    """All stages in the order in which they run, pruning at each of `points`, by its method.

    Names: vision, embed, prefill_0, select_1, prefill_1, …, and decode where
    `options.separate_decode`. Initializers that belong to the checkpoint carry canonical names,
    shape and dtype, and no data (`const_value` is None); small constants are inline. Pure.

    Raises:
        TrioError: layers that do not increase or lie outside the model, or an unknown method.
    """
    parts = segments(config, [point.layer for point in points])
    scores = encoder_scores(point.method for point in points)
    graphs = {
        "vision": build_vision(config, options, scores),
        "embed": build_embed(config, options),
    }
    for index, start, stop in parts:
        if index:
            method = points[index - 1].method
            graphs[f"select_{index}"] = build_select(config, start, options, method=method)
        graphs[f"prefill_{index}"] = build_prefill(config, index, start, stop, options)
    if options.separate_decode:
        bounds = [(start, stop) for _, start, stop in parts]
        graphs["decode"] = build_decode(config, bounds, options)
    return graphs


def planned_graphs(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> dict[str, bytes]:
    """The graphs of a model by stage, as --graphs-only writes them: weights have places, no data.

    Raises:
        TrioError: pruning points that do not suit the model.
    """
    models = build_graphs(config, points, options)
    layout = plan_layout(used_tensors(models, canonical_tensors(config)), options.dtype)
    infos, contents = serialised(models, layout.refs)
    return {stage: contents[info.file] for stage, info in infos.items()}


def used_tensors(
    models: Mapping[str, ir.Model], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Canonical tensors that some graph refers to, in canonical order, with their shapes."""
    names: set[str] = set()
    for stage, model in models.items():
        for value in open_initializers(model):
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


def open_initializers(model: ir.Model) -> list[ir.Value]:
    """Initializers without data: those that stand for a tensor of the checkpoint."""
    return [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is None
    ]


def serialised(
    models: Mapping[str, ir.Model], refs: Mapping[str, WeightRef]
) -> tuple[dict[str, GraphInfo], dict[str, bytes]]:
    """What the manifest says of each graph by its stage, and the graphs' files."""
    infos: dict[str, GraphInfo] = {}
    contents: dict[str, bytes] = {}
    for stage, model in models.items():
        for value in open_initializers(model):
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
