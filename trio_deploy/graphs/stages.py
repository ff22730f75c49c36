"""Graphs of the stages of a bundle, all but select_i.

B rows, S tokens, T tiles, p feature rows per tile, d hidden size, G key/value heads, D head size,
C capacity of the KV cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.connectors import Newline, make_connector
from trio_deploy.graphs.dialects.base import KV, Past
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import DecoderLayer, Embedding, Head
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import position_shape, rotary_angles
from trio_deploy.graphs.towers import make_tower
from trio_deploy.graphs.values import FLOAT, INT64, cast, constant


def build_vision(
    config: ModelConfig, options: GraphOptions, scores: Collection[str] = ()
) -> ir.Model:
    """Write vision.onnx: the tower's inputs to image_features [T·p, d], tile after tile.

    Further outputs are those of `scores`, f32 [T·p] (see `ClipTower.forward`), and deepstack.{j}
    [T·p, d].

    Raises:
        TrioError: scores that the tower does not have.
    """
    size = config.text.hidden_size
    d = options.make_dialect("vision")
    stage = Stage("vision", d)
    op = stage.op
    tower = make_tower(d, config)
    inputs = {
        name: stage.input(name, dtype, shape) for name, (dtype, shape) in tower.inputs().items()
    }
    features, found = tower(op, inputs, scores)
    y = op.Reshape(make_connector(d, config)(op, features), [-1, size])
    stage.output("image_features", y, d.dtype, ["R", size])
    for name in scores:
        stage.output(name, op.Reshape(found[name], [-1]), FLOAT, ["R"])
    for j in range(config.deepstack):
        stage.output(f"deepstack.{j}", found[f"deepstack.{j}"], d.dtype, ["R", size])
    return stage.finish(config)


def build_embed(config: ModelConfig, options: GraphOptions) -> ir.Model:
    """Write embed.onnx: text and image rows to one sequence.

    Inputs: input_ids int64 [B, S], or token_embeddings [B, S, d] with embeddings on the host;
    image_features [R, d] (R may be 0); source_index int64 [B, S]. Output: inputs_embeds [B, S, d].

    An entry e of source_index picks the embedding of this row's token e if e < S, image row e-S
    (rows counted over the whole batch) if e < S + R, and the newline row if e = S + R. Ids that no
    entry picks are not looked up, so placeholders outside the vocabulary do no harm. Rows of
    token_embeddings are those that the entries pick, in their places.
    """
    text = config.text
    size = text.hidden_size
    d = options.make_dialect("embed")
    stage = Stage("embed", d)
    op = stage.op
    on_host = options.embeddings == "host"
    if on_host:
        tokens = stage.input("token_embeddings", d.dtype, ["B", "S", size])
    else:
        tokens = stage.input("input_ids", INT64, ["B", "S"])
    features = stage.input("image_features", d.dtype, ["R", size])
    source = stage.input("source_index", INT64, ["B", "S"])

    length = op.Shape(tokens, start=1, end=2)
    is_text = op.Less(source, length)
    words = tokens
    if not on_host:
        token = op.GatherElements(tokens, op.Where(is_text, source, 0), axis=1)
        words = Embedding.of_tokens(d, text)(op, op.Where(is_text, token, 0))
    rows = op.Concat(features, Newline(d, config)(op), axis=0)
    visual = op.Gather(rows, op.Where(is_text, 0, op.Sub(source, length)), axis=0)
    y = op.Where(op.Unsqueeze(is_text, [2]), words, visual)
    stage.output("inputs_embeds", y, d.dtype, ["B", "S", size])
    return stage.finish(config)


def build_prefill(
    config: ModelConfig, index: int, start: int, stop: int, options: GraphOptions
) -> ir.Model:
    """Write prefill_{index}.onnx: layers start…stop-1, which without decode.onnx decode as well.

    Inputs: inputs_embeds (index 0) or hidden_states [B, S, d], position_ids int64 [B, S] (or
    [B, 3, S]), lengths int64 [B] (valid new tokens; absent if nothing reads them), and, unless
    there is a decode.onnx (some dialects: always), past_lengths int64 [B] (valid tokens in the
    past) and past.{i}.key / .value [B, G, C, D], i counted over the whole model; for layers with
    features of their own deepstack.{i} [R, d] and feature_index int64 [B, S].
    Outputs: hidden_states [B, S, d] (hidden_states_out if hidden_states is an input), or from the
    last segment logits float32 [B, V] at each row's last valid new token; present.{i}.key / .value
    [B, G, max(C, S), D].

    Prefill: C = 0 and past_lengths = 0. Decode: S = 1, lengths = 1, C > past_lengths; present is
    the past with the new token at slot past_lengths.
    """
    text = config.text
    d = options.make_dialect()
    stage = Stage(f"prefill_{index}", d)
    op = stage.op
    source = "inputs_embeds" if index == 0 else "hidden_states"
    x = stage.input(source, d.dtype, ["B", "S", text.hidden_size])
    positions = stage.input("position_ids", INT64, position_shape(text))
    is_last = stop == text.num_layers
    # An engine may drop an input that nothing reads.
    lengths = stage.input("lengths", INT64, ["B"]) if is_last or d.reads_lengths else None
    pasts: dict[int, KV] = {}
    past = None
    if d.always_takes_past or not options.separate_decode:
        past_lengths = stage.input("past_lengths", INT64, ["B"])
        pasts = {i: _past_inputs(stage, config, i, "C") for i in range(start, stop)}
        past = Past(past_lengths, pasts[start])

    window = d.prefill_window(op, rotary_angles(op, d, text, positions), x, lengths, past)
    presents: dict[int, KV] = {}
    added = _deepstack(stage, config, range(start, stop))
    for i in range(start, stop):
        x, presents[i] = DecoderLayer(d, text, i)(op, x, window, pasts.get(i))
        if i in added:
            x = op.Add(x, added[i])

    if is_last:
        assert lengths is not None
        last = op.GatherND(x, op.Unsqueeze(op.Sub(lengths, 1), [1]), batch_dims=1)
        stage.output("logits", Head(d, text)(op, last), FLOAT, ["B", text.vocab_size])
    else:
        # A graph cannot have an input and an output of one name.
        name = "hidden_states" if index == 0 else "hidden_states_out"
        stage.output(name, x, d.dtype, ["B", "S", text.hidden_size])
    for i, present in presents.items():
        _present_outputs(stage, config, i, present, "P" if pasts else "S")
    return stage.finish(config)


def _deepstack(stage: Stage, config: ModelConfig, layers: range) -> dict[int, ir.Value]:
    """What is added behind each of `layers` that has features of its own, [B, S, d].

    Declares their inputs: deepstack.{i} [R, d] and feature_index [B, S], -1 for tokens that get
    nothing added.
    """
    taken = [i for i in layers if i < config.deepstack]
    if not taken:
        return {}
    op, d, size = stage.op, stage.d, config.text.hidden_size
    features = [stage.input(f"deepstack.{i}", d.dtype, ["R", size]) for i in taken]
    index = op.Add(stage.input("feature_index", INT64, ["B", "S"]), 1)
    nothing = op.Expand(cast(op, constant(op, np.zeros(1, np.float32), "zero"), d.dtype), [1, size])
    return {
        i: op.Gather(op.Concat(nothing, rows, axis=0), index, axis=0)
        for i, rows in zip(taken, features, strict=True)
    }


def build_decode(
    config: ModelConfig, segments: Sequence[tuple[int, int]], options: GraphOptions
) -> ir.Model:
    """Write decode.onnx: one step of all layers, for bundles that decode apart from prefill.

    Inputs: input_ids int64 [B, 1], or token_embeddings [B, 1, d] with embeddings on the host;
    position_ids and lengths int64 [B, segments], of which column s belongs to the layers of segment
    s (segments without layers are not counted): the new token's position there and the number of
    tokens valid before it; past.{i}.key / .value [B, G, C_s, D], one capacity C_s per segment.
    Outputs: logits float32 [B, V] and present.{i}.key / .value of the same shapes, the new token
    at slot lengths[:, s].
    """
    text = config.text
    d = options.make_dialect("decode")
    stage = Stage("decode", d)
    op = stage.op
    if options.embeddings == "host":
        tokens = stage.input("token_embeddings", d.dtype, ["B", 1, text.hidden_size])
    else:
        tokens = stage.input("input_ids", INT64, ["B", 1])
    positions = stage.input("position_ids", INT64, ["B", len(segments)])
    lengths = stage.input("lengths", INT64, ["B", len(segments)])
    pasts = {
        i: _past_inputs(stage, config, i, f"C{s}")
        for s, (start, stop) in enumerate(segments)
        for i in range(start, stop)
    }

    table = None
    x = tokens
    if options.embeddings == "device":
        table = Embedding.of_tokens(d, text)
        x = table(op, tokens)
    presents = {}
    for s, (start, stop) in enumerate(segments):
        angles = rotary_angles(op, d, text, op.Slice(positions, [s], [s + 1], [1]))
        past = Past(op.Gather(lengths, s, axis=1), pasts[start])
        window = d.decode_window(op, angles, x, past)
        for i in range(start, stop):
            x, presents[i] = DecoderLayer(d, text, i)(op, x, window, pasts[i])

    last = op.Squeeze(x, [1])
    stage.output("logits", Head(d, text, table)(op, last), FLOAT, ["B", text.vocab_size])
    for s, (start, stop) in enumerate(segments):
        for i in range(start, stop):
            _present_outputs(stage, config, i, presents[i], f"C{s}")
    return stage.finish(config)


def _past_inputs(stage: Stage, config: ModelConfig, layer: int, capacity: str) -> KV:
    """Declare past.{layer}.key / .value [B, G, C, D]."""
    text = config.text
    size = stage.d.cache_head_dim(text.head_dim)
    shape: list[int | str] = ["B", text.num_kv_heads, capacity, size]
    return KV(
        stage.input(f"past.{layer}.key", stage.d.dtype, shape),
        stage.input(f"past.{layer}.value", stage.d.dtype, shape),
    )


def _present_outputs(
    stage: Stage, config: ModelConfig, layer: int, present: KV, capacity: str
) -> None:
    """Declare present.{layer}.key / .value [B, G, C, D]."""
    text = config.text
    size = stage.d.cache_head_dim(text.head_dim)
    shape: list[int | str] = ["B", text.num_kv_heads, capacity, size]
    stage.output(f"present.{layer}.key", present.key, stage.d.dtype, shape)
    stage.output(f"present.{layer}.value", present.value, stage.d.dtype, shape)
