"""decode.onnx: one step through all layers, for bundles that decode apart from prefill."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import Past
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import DecoderLayer, Embedding, Head
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.prefill import past_inputs, present_outputs
from trio_deploy.graphs.rope import rotary_angles
from trio_deploy.graphs.values import FLOAT, INT64


def build_decode(
    config: ModelConfig, segments: Sequence[tuple[int, int]], options: GraphOptions
) -> ir.Model:
    """All layers, one new token a row.

    Inputs: input_ids int64 [B, 1]; position_ids and lengths int64 [B, segments], of which column s
    belongs to the layers of segment s (segments without layers are not counted): the new token's
    position there and the number of tokens valid before it; past.{i}.key / .value
    [B, G, C_s, D], one capacity C_s a segment. Outputs: logits float32 [B, V] and
    present.{i}.key / .value of the same shapes, the new token at slot lengths[:, s].
    """
    text = config.text
    d = options.make_dialect(decode=True)
    stage = Stage("decode", d)
    op = stage.op
    tokens = stage.input("input_ids", INT64, ["B", 1])
    positions = stage.input("position_ids", INT64, ["B", len(segments)])
    lengths = stage.input("lengths", INT64, ["B", len(segments)])
    pasts = {
        i: past_inputs(stage, config, i, f"C{s}")
        for s, (start, stop) in enumerate(segments)
        for i in range(start, stop)
    }

    table = Embedding(d, "language_model.embed_tokens", text.vocab_size, text.hidden_size)
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
            present_outputs(stage, config, i, presents[i], f"C{s}")
    return stage.finish(config)
