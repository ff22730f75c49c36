"""Segments and decode against transformers: every dialect, rows of different lengths, GQA."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import DynamicCache

from tests.support.run_graph import Runner, filled
from tests.support.transformers_models import language_model, model_config, relative, text_weights
from trio_deploy.families.base import ModelConfig, RopeConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_decode, build_prefill

SEGMENTS = ((0, 1), (1, 2), (2, 3))
LENGTHS = (9, 5)
STEPS = 4
CAPACITY = (15, 17, 13)  # segments may hold caches of different capacity
MODELS = {
    "grouped": {},
    "llama3-rope, one key a query, biases": {
        "num_kv_heads": 4,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "rope": RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64),
    },
    "linear-rope, tied": {
        "num_kv_heads": 1,
        "tie_word_embeddings": True,
        "rope": RopeConfig(10000.0, "linear", 4.0),
    },
}
TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]
targets = pytest.mark.parametrize(("dialect", "runtime"), TARGETS)


def row_reference(model: Any, embeds: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One row through transformers: prefill, then one step for each of `tokens`."""
    cache = DynamicCache()
    with torch.no_grad():
        out = model(
            inputs_embeds=torch.tensor(embeds[None], dtype=torch.float32),
            past_key_values=cache,
            output_hidden_states=True,
        )
        logits = [out.logits[0, -1].numpy()]
        for token in tokens:
            step = model(torch.tensor([[token]]), past_key_values=cache)
            logits.append(step.logits[0, -1].numpy())
    result = {"logits": np.stack(logits), "hidden": out.hidden_states[SEGMENTS[0][1]][0].numpy()}
    for i, layer in enumerate(cache.layers):
        result[f"{i}.key"], result[f"{i}.value"] = layer.keys[0].numpy(), layer.values[0].numpy()
    return result


def following(outputs: dict[str, np.ndarray]) -> np.ndarray | None:
    """The hidden states for the next segment: a middle segment's have a name of their own."""
    return outputs.get("hidden_states", outputs.get("hidden_states_out"))


class Segmented:
    """Three segments and, in the `onnx` dialect, decode.onnx, driven as the runtime drives them."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, np.ndarray], options: GraphOptions, rt: str
    ) -> None:
        self.config, self.options = config, options
        self.table = weights["language_model.embed_tokens.weight"]
        self.dtype = np.dtype(options.dtype)
        self.parts = [
            Runner(build_prefill(config, i, *bounds, options), weights, rt)
            for i, bounds in enumerate(SEGMENTS)
        ]
        self.decoder = None
        if options.separate_decode:
            self.decoder = Runner(build_decode(config, SEGMENTS, options), weights, rt)
        self.cache: dict[str, np.ndarray] = {}
        self.valid = np.zeros(0, np.int64)

    def _empty(self, rows: int, layers: range) -> dict[str, np.ndarray]:
        text = self.config.text
        shape = (rows, text.num_kv_heads, 0, text.head_dim)
        return {f"past.{i}.{kv}": np.zeros(shape, self.dtype) for i in layers for kv in KV}

    def prefill(self, embeds: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        rows, width = embeds.shape[:2]
        seen = {}
        x = embeds.astype(self.dtype)
        for s, part in enumerate(self.parts):
            feeds = {
                "inputs_embeds": x,
                "hidden_states": x,
                "position_ids": np.tile(np.arange(width), (rows, 1)),
                "lengths": lengths,
                "past_lengths": np.zeros(rows, np.int64),
            }
            out = part(feeds | self._empty(rows, range(*SEGMENTS[s])))
            for i in range(*SEGMENTS[s]):
                for kv in KV:
                    present = out[f"present.{i}.{kv}"]
                    assert present.shape[2] == width
                    # Slots beyond a row's tokens hold large garbage: nothing may read them.
                    buffer = np.full((*present.shape[:2], CAPACITY[s], present.shape[3]), 1e4)
                    buffer[:, :, :width] = present
                    self.cache[f"past.{i}.{kv}"] = buffer.astype(self.dtype)
            x = following(out)
            seen |= out
        self.valid = lengths.copy()
        return seen

    def step(self, tokens: np.ndarray) -> np.ndarray:
        rows = len(tokens)
        if self.decoder is not None:
            both = np.stack([self.valid] * len(SEGMENTS), axis=1)
            feeds = {"input_ids": tokens[:, None], "position_ids": both, "lengths": both}
            out = self.decoder(feeds | self.cache)
        else:
            out, x = {}, self.table[tokens][:, None].astype(self.dtype)
            for part in self.parts:
                feeds = {
                    "inputs_embeds": x,
                    "hidden_states": x,
                    "position_ids": self.valid[:, None],
                    "lengths": np.ones(rows, np.int64),
                    "past_lengths": self.valid,
                }
                outputs = part(feeds | self.cache)
                out |= outputs
                x = following(outputs)
        for name in self.cache:
            fresh = out[name.replace("past", "present")]
            assert fresh.shape == self.cache[name].shape
            self.cache[name] = fresh
        self.valid = self.valid + 1
        return out["logits"]


KV = ("key", "value")


def compare(
    options: GraphOptions, runtime: str, changes: dict[str, Any], mistral: bool = False
) -> float:
    """The worst relative error over hidden states, logits of all steps, and the final cache."""
    config = model_config(**changes)
    model = language_model(config, mistral=mistral)
    if options.dtype != "float32":
        model = model.to(getattr(torch, options.dtype)).float()
    weights = text_weights(model, config)
    rng = np.random.default_rng(0)
    lengths = np.array(LENGTHS)
    embeds = rng.standard_normal((2, max(LENGTHS), config.text.hidden_size)).astype(options.dtype)
    tokens = rng.integers(0, config.text.vocab_size, (STEPS, 2))
    segmented = Segmented(config, weights, options, runtime)
    first = segmented.prefill(embeds, lengths)
    assert first["logits"].dtype == np.float32
    logits = [first["logits"], *(segmented.step(step) for step in tokens)]
    worst = 0.0
    for row, length in enumerate(LENGTHS):
        want = row_reference(model, embeds[row, :length], tokens[:, row])
        worst = max(worst, relative(first["hidden_states"][row, :length], want["hidden"]))
        worst = max(worst, relative(np.stack([each[row] for each in logits]), want["logits"]))
        for name, buffer in segmented.cache.items():
            got = buffer[row, :, : length + STEPS]
            worst = max(worst, relative(got, want[name.removeprefix("past.")]))
    return worst


@targets
@pytest.mark.parametrize("kind", MODELS)
def test_segments_then_decode_equal_transformers(dialect: str, runtime: str, kind: str) -> None:
    options = GraphOptions(dialect=dialect)
    assert compare(options, runtime, MODELS[kind]) < 1e-5


def test_mistral_equals_transformers() -> None:
    assert compare(GraphOptions(), "ort", {}, mistral=True) < 1e-5


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_decode_graph_of_all_layers_equals_segments(dialect: str) -> None:
    options = GraphOptions(dialect=dialect, separate_decode=True)
    assert compare(options, "ort", {}) < 1e-5


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_half_precision_stays_within_one_percent(dialect: str) -> None:
    options = GraphOptions(dialect=dialect, dtype="float16")
    assert compare(options, "ort", {}) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_graphs_pass_the_checker_with_strict_shape_inference(dialect: str, dtype: str) -> None:
    options = GraphOptions(dialect=dialect, dtype=dtype)
    config = model_config()
    weights = text_weights(language_model(config), config)
    graphs = [build_prefill(config, i, *bounds, options) for i, bounds in enumerate(SEGMENTS)]
    for graph in [*graphs, build_decode(config, SEGMENTS, options)]:
        proto = filled(graph, weights)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


@targets
def test_a_prompt_of_one_token(dialect: str, runtime: str) -> None:
    """S = 1 with an empty past is a prefill, not a step."""
    config = model_config()
    model = language_model(config)
    segmented = Segmented(
        config, text_weights(model, config), GraphOptions(dialect=dialect), runtime
    )
    embeds = np.random.default_rng(1).standard_normal((2, 1, 48)).astype(np.float32)
    got = segmented.prefill(embeds, np.array([1, 1]))["logits"]
    for row in range(2):
        want = row_reference(model, embeds[row], np.zeros(0, np.int64))["logits"][0]
        assert relative(got[row], want) < 1e-5


def test_decode_writes_into_the_past_where_both_are_one_buffer() -> None:
    """ONNX Runtime with past and present bound to one OrtValue: one slot changes, nothing else."""
    import onnxruntime

    config = model_config()
    weights = text_weights(language_model(config), config)
    runner = Runner(build_prefill(config, 0, 0, 3, GraphOptions()), weights)
    rng = np.random.default_rng(0)
    past_lengths = np.array([6, 3])
    feeds = {
        "inputs_embeds": rng.standard_normal((2, 1, 48)).astype(np.float32),
        "position_ids": past_lengths[:, None],
        "lengths": np.array([1, 1]),
        "past_lengths": past_lengths,
    }
    pasts = {
        f"past.{i}.{kv}": rng.standard_normal((2, 2, 8, 16)).astype(np.float32)
        for i in range(3)
        for kv in KV
    }
    fresh = runner(feeds | pasts)
    binding = runner.session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(a.copy()) for name, a in pasts.items()
    }
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
    binding.bind_output("logits")
    runner.session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), fresh["logits"])
    for name, buffer in buffers.items():
        changed = (buffer.numpy() != pasts[name]).any(axis=(1, 3))
        assert [list(np.flatnonzero(row)) for row in changed] == [[6], [3]], name
        np.testing.assert_array_equal(
            buffer.numpy()[0, :, 6], fresh[name.replace("past", "present")][0, :, 6]
        )
