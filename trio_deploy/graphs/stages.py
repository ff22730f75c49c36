"""vision.onnx (CLIP tower and projector) and embed.onnx (text and image rows into one sequence)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig, VisionConfig
from trio_deploy.families.names import canonical_tensors
from trio_deploy.graphs.connectors import Projector
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import Embedding, LayerNorm, Weight
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.towers import ClipEmbeddings, ClipLayer
from trio_deploy.graphs.values import FLOAT, INT64, cast, constant, reduce
from trio_deploy.schedule.methods import WINDOW, shallow_layer


def build_vision(
    config: ModelConfig, options: GraphOptions, scores: Collection[str] = ()
) -> ir.Model:
    """Input pixel_values [T, 3, h, w]; output image_features [T·p, d], tile after tile.

    And those of `scores`, f32 [T·p]:

    * `prior`: the attention that the class token pays to each, averaged over the heads, in the
      layer whose output the features are (the last but one);
    * `prior_local`: the order of a scan window by window (VScan, arXiv 2505.22654), greater is
      earlier: the tile is cut into windows of 6 x 6 patches, and with r the rank of a patch in its
      window by the class token's attention a in a shallow layer, it is 36 - r + 0.999 a / max a.
      The class token's own row, where it is among the features, counts 36.

    Layers above the last feature layer are not built, nor is the tower's post-norm.

    Raises:
        TrioError: scores are asked for of a tower whose features come before its first layer.
    """
    vision, size = config.vision, config.text.hidden_size
    top = max(vision.feature_layers) - 1
    if scores and top < 0:
        raise TrioError(
            "This model takes the features of pictures before the encoder's first layer, so there "
            "is no attention of a class token: choose another method than cls-attention and vscan."
        )
    d = options.make_dialect()
    stage = Stage("vision", d)
    op = stage.op
    pixels = stage.input("pixel_values", d.dtype, ["T", 3, vision.image_size, vision.image_size])
    x = ClipEmbeddings(d, vision)(op, pixels)
    norm = "vision_tower.pre_layrnorm"
    x = LayerNorm(d, norm, vision.hidden_size, vision.layer_norm_eps)(op, x)
    hidden = [x]
    shallow = min(shallow_layer(vision.num_layers), top)
    watched = {"prior": top, "prior_local": shallow}
    attention: dict[int, list[ir.Value]] = {watched[name]: [] for name in scores}
    for i in range(top + 1):
        hidden.append(ClipLayer(d, vision, i)(op, hidden[-1], attention.get(i)))
    chosen = [hidden[i] for i in vision.feature_layers]
    features = chosen[0] if len(chosen) == 1 else op.Concat(*chosen, axis=-1)
    if vision.drop_cls:
        features = op.Slice(features, [1], [vision.side**2 + 1], [1])
    y = op.Reshape(Projector(d, config)(op, features), [-1, size])
    stage.output("image_features", y, d.dtype, ["R", size])
    for name in scores:
        a = attention[watched[name]][0]  # [T, 1 + patches]
        if name == "prior_local":
            local = _window_order(op, vision, op.Slice(a, [1], [vision.side**2 + 1], [1]))
            own = op.Mul(op.Slice(a, [0], [1], [1]), 0.0)
            a = op.Concat(op.Add(own, float(WINDOW**2)), local, axis=1)
        if vision.drop_cls:
            a = op.Slice(a, [1], [vision.side**2 + 1], [1])
        stage.output(name, op.Reshape(a, [-1]), FLOAT, ["R"])
    return stage.finish(config)


def _window_order(op: Any, vision: VisionConfig, attention: ir.Value) -> ir.Value:
    """`prior_local` of patches from the attention paid to them: f32 [T, patches] of each."""
    side, area = vision.side, WINDOW**2
    across = -(-side // WINDOW)
    grid = op.Reshape(attention, [-1, side, side])
    if missing := across * WINDOW - side:  # windows at the far edges are smaller
        grid = op.Pad(grid, [0, 0, 0, 0, missing, missing], -1.0)
    windows = op.Transpose(
        op.Reshape(grid, [-1, across, WINDOW, across, WINDOW]), perm=[0, 1, 3, 2, 4]
    )
    windows = op.Reshape(windows, [-1, across * across, area])
    mine, other = op.Unsqueeze(windows, [3]), op.Unsqueeze(windows, [2])
    before = constant(op, np.tril(np.ones((1, 1, area, area), np.bool_), -1), "window")
    ahead = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), before))
    rank = reduce(op, "ReduceSum", op.Cast(ahead, to=FLOAT), [3], keepdims=False)
    most = op.Unsqueeze(reduce(op, "ReduceMax", attention, [1]), [2])
    order = op.Add(op.Sub(float(area), rank), op.Mul(op.Div(windows, most), 0.999))
    order = op.Reshape(order, [-1, across, across, WINDOW, WINDOW])
    order = op.Reshape(
        op.Transpose(order, perm=[0, 1, 3, 2, 4]), [-1, across * WINDOW, across * WINDOW]
    )
    return op.Reshape(op.Slice(order, [0, 0], [side, side], [1, 2]), [-1, side * side])


def build_embed(config: ModelConfig, options: GraphOptions) -> ir.Model:
    """Inputs input_ids int64 [B, S], image_features [R, d] (R may be 0), source_index int64 [B, S].

    An entry e of source_index picks the embedding of this row's token e if e < S, image row e-S
    (rows counted over the whole batch) if e < S + R, and the newline row if e = S + R. A family
    without image_newline has a row of zeros there, which no prompt refers to. Ids that no entry
    picks are not looked up, so placeholders outside the vocabulary do no harm.
    Output inputs_embeds [B, S, d].
    """
    text = config.text
    size = text.hidden_size
    d = options.make_dialect()
    stage = Stage("embed", d)
    op = stage.op
    ids = stage.input("input_ids", INT64, ["B", "S"])
    features = stage.input("image_features", d.dtype, ["R", size])
    source = stage.input("source_index", INT64, ["B", "S"])

    length = op.Shape(ids, start=1, end=2)
    is_text = op.Less(source, length)
    token = op.GatherElements(ids, op.Where(is_text, source, 0), axis=1)
    table = Embedding(d, "language_model.embed_tokens", text.vocab_size, size)
    words = table(op, op.Where(is_text, token, 0))

    if "image_newline" in canonical_tensors(config):
        newline = op.Reshape(Weight("image_newline", [size], d.dtype).into(op), [1, size])
    else:
        newline = op.Expand(
            cast(op, constant(op, np.zeros(1, np.float32), "zero"), d.dtype), [1, size]
        )
    rows = op.Concat(features, newline, axis=0)
    pictures = op.Gather(rows, op.Where(is_text, 0, op.Sub(source, length)), axis=0)
    y = op.Where(op.Unsqueeze(is_text, [2]), words, pictures)
    stage.output("inputs_embeds", y, d.dtype, ["B", "S", size])
    return stage.finish(config)
