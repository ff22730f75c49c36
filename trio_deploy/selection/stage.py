"""select_i.onnx: a pruning point by any method, and the sequence after it.

The method's module decides which visual tokens stay. Inputs, outputs and how the new sequence is
put together are the same for all methods.

B rows, S tokens, N of them visual, d hidden size, W width after pruning.
"""

from __future__ import annotations

import onnx_ir as ir

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import HUGE
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import position_shape, positions_at
from trio_deploy.graphs.values import BOOL, FLOAT, INT64, cast, reduce
from trio_deploy.schedule.methods import METHODS, load
from trio_deploy.selection.ranking import compact
from trio_deploy.selection.saliency import Tokens
from trio_deploy.selection.site import Site
from trio_deploy.selection.suppression import BLOCK


def build_select(
    config: ModelConfig,
    layer: int,
    options: GraphOptions,
    *,
    method: str = "trio",
    block: int = BLOCK,
) -> ir.Model:
    """Build the graph that prunes before `layer`.

    Inputs: hidden_states [B,S,d], position_ids int64 [B,S] (or [B,3,S]), lengths int64 [B],
    visual_mask bool [B,S], keep int64 [B], width int64 [1]: W, the longest row of the result; those
    that the method reads besides (`seed`, `prior`, `prior_local`); and feature_index int64 [B,S] if
    a deepstack layer follows.
    Outputs: keep_index int64 [B,W] (ascending, -1 behind a row's end), hidden_states_out [B,W,d],
    position_ids_out int64 [B,W] (or [B,3,W]), lengths_out int64 [B], visual_mask_out bool [B,W],
    feature_index_out int64 [B,W] if a deepstack layer follows, saliency f32
    [B,S] (the method's scores, 0 where not visual), converged bool [B]: false if the row must not
    be used, because the method did not finish, a score or a visual token is not finite, or `width`
    is too small.

    Args:
        method: one of `methods.METHODS`.
        block: M, ranks that are worked through at a time; at most 1024.

    Raises:
        TrioError: an unknown method, or positions that the model has no use for.
    """
    if method not in METHODS:
        raise TrioError(f"unknown pruning method {method!r}: choose from {', '.join(METHODS)}")
    text, d = config.text, options.make_dialect("select")
    if text.rope.axes is not None and options.positions == "renumber":
        raise TrioError(
            "positions 'renumber' has no meaning where a token has three positions: use 'original'"
        )
    stage = Stage(f"select_before_{layer}", d)
    op = stage.op
    x = stage.input("hidden_states", d.dtype, ["B", "S", text.hidden_size])
    positions = stage.input("position_ids", INT64, position_shape(text))
    lengths = stage.input("lengths", INT64, ["B"])
    visual_mask = stage.input("visual_mask", BOOL, ["B", "S"])
    keep = stage.input("keep", INT64, ["B"])
    width = stage.input("width", INT64, [1])
    feature_index = None
    if layer < config.deepstack:
        feature_index = stage.input("feature_index", INT64, ["B", "S"])

    tokens = Tokens.of(op, x, positions, lengths, visual_mask)
    site = Site(stage, d, text, layer, options, tokens, lengths, keep, width, block)
    choice = load(method).graph(op, site)
    index, lengths_out = compact(op, d, op.Or(tokens.text, choice.kept), tokens.index, width)
    # The hidden states, too: a least or a greatest of numbers loses a NaN in some runtimes.
    squares = op.Where(tokens.visual, op.Squeeze(tokens.squares, [2]), 0.0)
    total = reduce(op, "ReduceSum", op.Add(choice.finite, squares), [1], keepdims=False)
    converged = op.Less(op.Abs(total), HUGE)  # false for NaN, too
    if choice.converged is not None:
        converged = op.And(choice.converged, converged)
    converged = op.And(converged, op.LessOrEqual(lengths_out, width))

    filled = op.GreaterOrEqual(index, 0)  # [B,W]
    safe = op.Max(index, 0)
    if choice.merge is None:
        rows = op.Gather(tokens.flat, op.Add(safe, tokens.offset), axis=0)
    else:
        rows = choice.merge(op, index)
    rows = op.Where(op.Unsqueeze(filled, [2]), rows, 0.0)
    old = positions_at(op, positions, safe)
    if options.positions == "original":
        real = filled if text.rope.axes is None else op.Unsqueeze(filled, [1])
        places = op.Where(real, old, 0)
    else:
        # The minimum is 0, and a reason for OpenVINO to keep an input that no method may read.
        places = op.Unsqueeze(op.Range(0, op.Squeeze(width, [0]), 1), [0])
        places = op.Where(filled, places, op.Min(old, 0))
    visual = op.GatherElements(cast(op, tokens.visual, INT64), safe, axis=1)

    stage.output("keep_index", index, INT64, ["B", "W"])
    stage.output("hidden_states_out", rows, d.dtype, ["B", "W", text.hidden_size])
    stage.output("position_ids_out", places, INT64, [*position_shape(text)[:-1], "W"])
    stage.output("lengths_out", lengths_out, INT64, ["B"])
    stage.output("visual_mask_out", op.And(cast(op, visual, BOOL), filled), BOOL, ["B", "W"])
    stage.output("saliency", choice.score, FLOAT, ["B", "S"])
    stage.output("converged", converged, BOOL, ["B"])
    if feature_index is not None:
        own = op.Where(filled, op.GatherElements(feature_index, safe, axis=1), -1)
        stage.output("feature_index_out", own, INT64, ["B", "W"])
    return stage.finish(config)
