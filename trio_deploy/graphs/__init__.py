"""The stages of a bundle as ONNX graphs, written with onnxscript.nn; no torch, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import onnx_ir as ir

from trio_deploy.errors import TrioError
from trio_deploy.graphs.decode import build_decode
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.prefill import build_prefill
from trio_deploy.graphs.pruning import build_select
from trio_deploy.graphs.vision import build_embed, build_vision
from trio_deploy.methods import ENCODER_SCORES
from trio_deploy.models.config import ModelConfig
from trio_deploy.schedule import PruningPoint

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
    needed = {name for point in points for name in ENCODER_SCORES.get(point.method, ())}
    graphs = {
        "vision": build_vision(config, options, sorted(needed)),
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
