"""The stages of a bundle as ONNX graphs, written with onnxscript.nn; no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
import onnx_ir as ir

from trio_deploy.bundle.manifest import Kind, StageInfo, TensorInfo, TensorPlace
from trio_deploy.bundle.roles import tensor_info
from trio_deploy.bundle.weights import plan_layout
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.modules import Embedding
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_decode, build_embed, build_prefill, build_vision
from trio_deploy.graphs.values import PART_TYPES, dtype_of, shape_of
from trio_deploy.graphs.weight import Weight
from trio_deploy.quant.stored_weight import StoredWeight, parts_of
from trio_deploy.schedule.methods import encoder_scores
from trio_deploy.schedule.schedule import PruningPoint
from trio_deploy.selection.stage import build_select


def plan_stages(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> list[StageInfo]:
    """Plan the stages of a model in the order in which they run, without their graphs.

    Names: vision, embed, prefill_0, select_1, prefill_1, …, and decode where it has a graph of its
    own. A pruning point before layer 0 leaves no prefill_0: a segment without layers has no stage.

    Raises:
        TrioError: layers that do not increase, or that the model does not have.
    """
    count = config.text.num_layers
    layers = [point.layer for point in points]
    bounds = [0, *layers, count]
    if any(a >= b for a, b in pairwise(bounds[1:])) or (layers and layers[0] < 0):
        raise TrioError(
            f"the pruning layers {layers} must increase and lie within 0…{count - 1}: choose others"
        )
    table = _looked_up(config, options)
    stages = [StageInfo("vision", "vision"), StageInfo("embed", "embed", looked_up=table)]
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if index:
            method = points[index - 1].method
            stages.append(StageInfo(f"select_{index}", "select", index, method=method))
        if start < stop:
            segment = tuple(range(start, stop))
            stages.append(StageInfo(f"prefill_{index}", "prefill", index, segment))
    if options.separate_decode:
        stages.append(StageInfo("decode", "decode", layers=tuple(range(count))))
    return stages


def _looked_up(config: ModelConfig, options: GraphOptions) -> tuple[str, ...]:
    """`StageInfo.looked_up` of embed."""
    if options.embeddings == "device":
        return ()
    table = Embedding.of_tokens(options.make_dialect("embed"), config.text)
    return tuple(str(part.name) for part in table.parameters())


def build_graphs(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> dict[str, ir.Model]:
    """Build the graph of each stage of `plan_stages`, by the stage's name.

    Initializers that belong to the checkpoint carry canonical names, shape and dtype, and no data
    (`const_value` is None); small constants are inline. With `weights: inputs` the matrices among
    them are the graph's last inputs instead. Pure.

    Raises:
        TrioError: layers that do not increase or lie outside the model, or an unknown method.
    """
    stages = plan_stages(config, points, options)
    segments = [stage.layers for stage in stages if stage.kind == "prefill"]
    scores = encoder_scores(point.method for point in points)

    def build(stage: StageInfo) -> ir.Model:
        if stage.kind == "vision":
            return build_vision(config, options, scores)
        if stage.kind == "embed":
            return build_embed(config, options)
        if stage.kind == "decode":
            bounds = [(layers[0], layers[-1] + 1) for layers in segments]
            return build_decode(config, bounds, options)
        assert stage.index is not None
        if stage.kind == "select":
            point = points[stage.index - 1]
            return build_select(config, point.layer, options, method=point.method)
        start, stop = stage.layers[0], stage.layers[-1] + 1
        return build_prefill(config, stage.index, start, stop, options)

    models = {stage.name: build(stage) for stage in stages}
    if options.weights == "inputs":
        for model in models.values():
            _take_matrices_as_inputs(model)
    return models


def _take_matrices_as_inputs(model: ir.Model) -> None:
    """Turn initializers of two axes or more that stand for weights into inputs of the graph."""
    graph = model.graph
    for value in open_weights(model):
        if len(shape_of(value)) > 1:
            del graph.initializers[str(value.name)]
            graph.inputs.append(value)


def planned_graphs(
    config: ModelConfig, points: Sequence[PruningPoint], options: GraphOptions
) -> list[tuple[StageInfo, bytes]]:
    """The graphs of a model as --graphs-only writes them: weights have places, but no data.

    Raises:
        TrioError: pruning points that do not suit the model.
    """
    models = build_graphs(config, points, options)
    stages = plan_stages(config, points, options)
    weights = used_weights(stages, models, options.stored_weights(config))
    layout = plan_layout(parts_of(weights))
    described, contents = serialised(stages, models, layout.places)
    return [(stage, contents[stage.file]) for stage in described]


def used_weights(
    stages: Sequence[StageInfo],
    models: Mapping[str, ir.Model],
    weights: Sequence[StoredWeight],
) -> list[StoredWeight]:
    """List the weights of which some graph refers to a part, or rows are looked up, in order.

    Raises:
        TrioError: a graph refers to a part that no weight has, or as another shape or type.
    """
    parts = {part.name: part for part in parts_of(weights)}
    names = {name for stage in stages for name in stage.looked_up}
    for stage, model in models.items():
        for value in open_weights(model):
            name = str(value.name)
            if name not in parts:
                raise TrioError(f"the graph {stage} asks for a tensor {name}, which no model has")
            part, shape, dtype = parts[name], shape_of(value), dtype_of(value)
            if tuple(shape) != part.shape or dtype != PART_TYPES[part.dtype]:
                raise TrioError(
                    f"the graph {stage} takes {name} as {dtype.name} {shape}, but it is stored as "
                    f"{part.dtype} {list(part.shape)}"
                )
            names.add(name)
    return [weight for weight in weights if any(part.name in names for part in weight.parts)]


def open_weights(model: ir.Model) -> list[ir.Value]:
    """Values that stand for a part of a weight: initializers without data, or inputs."""
    constants = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is None
    ]
    return constants + [value for value in model.graph.inputs if isinstance(value, Weight)]


def serialised(
    stages: Sequence[StageInfo],
    models: Mapping[str, ir.Model],
    places: Mapping[str, TensorPlace],
) -> tuple[tuple[StageInfo, ...], dict[str, bytes]]:
    """Serialise graphs the parts of whose weights lie at `places`.

    Returns:
        The stages with their files, inputs, outputs and names of weights, and content by file.
    """
    described, contents = [], {}
    for stage in stages:
        model = models[stage.name]
        weights = open_weights(model)
        fed = [value for value in weights if value.is_graph_input()]
        for value in weights:
            if value.is_graph_input():
                continue
            place = places[str(value.name)]
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.nbytes,
                PART_TYPES[place.dtype],
                shape=ir.Shape(place.shape),
                name=str(value.name),
            )
        file = f"{stage.name}.onnx"
        contents[file] = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        described.append(
            msgspec.structs.replace(
                stage,
                file=file,
                inputs=tuple(
                    _describe(stage.kind, v, True) for v in model.graph.inputs if v not in fed
                ),
                outputs=tuple(_describe(stage.kind, v, False) for v in model.graph.outputs),
                tensors=tuple(str(value.name) for value in weights),
                weight_inputs=tuple(str(value.name) for value in fed),
            )
        )
    return tuple(described), contents


def _describe(kind: Kind, value: ir.Value, is_input: bool) -> TensorInfo:
    dtype = value.dtype
    name = {"FLOAT": "float32"}.get(dtype.name, dtype.name.lower()) if dtype else "unknown"
    shape: list[int | str] = []
    for dim in value.shape or ():
        shape.append(dim if isinstance(dim, int) else str(dim.value or "?"))
    return tensor_info(kind, str(value.name), name, tuple(shape), is_input=is_input)
