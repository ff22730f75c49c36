"""Segments of decoder layers: prefill_i.onnx, which in `ort` and `primitive` decode as well."""

from __future__ import annotations

import onnx_ir as ir

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import KV, Past
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import DecoderLayer, Head
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import rotary_angles
from trio_deploy.graphs.values import FLOAT, INT64


def build_prefill(
    config: ModelConfig, index: int, start: int, stop: int, options: GraphOptions
) -> ir.Model:
    """Layers start…stop-1 as prefill_{index}.onnx.

    Inputs: inputs_embeds (index 0) or hidden_states [B, S, d], position_ids int64 [B, S], lengths
    int64 [B] (valid new tokens; not where nothing reads them, see below), and, unless there is a
    decode.onnx (whatever there is, in `ort`), past_lengths int64 [B] (valid tokens in the past) and
    past.{i}.key / .value [B, G, C, D], i counted over the whole model.
    Outputs: hidden_states [B, S, d] (hidden_states_out where hidden_states is an input), or from
    the last segment logits float32 [B, V] at each row's last valid new token; present.{i}.key /
    .value [B, G, max(C, S), D].

    Prefill: C = 0 and past_lengths = 0. Decode: S = 1, lengths = 1, C > past_lengths; present is
    the past with the new token at slot past_lengths.
    """
    text = config.text
    d = options.make_dialect()
    stage = Stage(f"prefill_{index}", d)
    op = stage.op
    source = "inputs_embeds" if index == 0 else "hidden_states"
    x = stage.input(source, d.dtype, ["B", "S", text.hidden_size])
    positions = stage.input("position_ids", INT64, ["B", "S"])
    ends = stop == text.num_layers
    # An engine may lack an input that nothing reads.
    lengths = stage.input("lengths", INT64, ["B"]) if ends or d.reads_lengths else None
    pasts: dict[int, KV] = {}
    past = None
    if d.always_takes_past or not options.separate_decode:
        past_lengths = stage.input("past_lengths", INT64, ["B"])
        pasts = {i: past_inputs(stage, config, i, "C") for i in range(start, stop)}
        past = Past(past_lengths, pasts[start])

    window = d.prefill_window(op, rotary_angles(op, d, text, positions), x, lengths, past)
    presents: dict[int, KV] = {}
    for i in range(start, stop):
        x, presents[i] = DecoderLayer(d, text, i)(op, x, window, pasts.get(i))

    if ends:
        assert lengths is not None
        last = op.GatherND(x, op.Unsqueeze(op.Sub(lengths, 1), [1]), batch_dims=1)
        stage.output("logits", Head(d, text)(op, last), FLOAT, ["B", text.vocab_size])
    else:
        # A graph cannot have an input and an output of one name.
        name = "hidden_states" if index == 0 else "hidden_states_out"
        stage.output(name, x, d.dtype, ["B", "S", text.hidden_size])
    for i, present in presents.items():
        present_outputs(stage, config, i, present, "P" if pasts else "S")
    return stage.finish(config)


def past_inputs(stage: Stage, config: ModelConfig, layer: int, capacity: str) -> KV:
    """Declare past.{layer}.key / .value [B, G, C, D]."""
    text = config.text
    shape: list[int | str] = ["B", text.num_kv_heads, capacity, text.head_dim]
    return KV(
        stage.input(f"past.{layer}.key", stage.d.dtype, shape),
        stage.input(f"past.{layer}.value", stage.d.dtype, shape),
    )


def present_outputs(
    stage: Stage, config: ModelConfig, layer: int, present: KV, capacity: str
) -> None:
    """Declare present.{layer}.key / .value [B, G, C, D]."""
    text = config.text
    shape: list[int | str] = ["B", text.num_kv_heads, capacity, text.head_dim]
    stage.output(f"present.{layer}.key", present.key, stage.d.dtype, shape)
    stage.output(f"present.{layer}.value", present.value, stage.d.dtype, shape)
