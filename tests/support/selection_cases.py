"""Feeds and weights of select graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.selection.stage import build_select

LAYER = 1
TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]


def weights_of(config: ModelConfig, seed: int = 0, **scales: float) -> dict[str, np.ndarray]:
    """Random weights of the tensors that a select graph holds; `scales` by a part of the name."""
    return random_weights(build_select(config, LAYER, GraphOptions()), seed, **scales)


def random_weights(model: ir.Model, seed: int = 0, **scales: float) -> dict[str, np.ndarray]:
    """Random weights of a graph's tensors; `scales` by a part of the name."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(model.graph.initializers):
        value = model.graph.initializers[name]
        if value.const_value is None:
            scale = next((s for part, s in scales.items() if part in name), 0.3)
            weights[name] = (rng.normal(size=tuple(value.shape)) * scale).astype(np.float32)
    return weights


def batch_of(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Five rows: one image, two, none, a single text token in front, one behind the image."""
    rng = np.random.default_rng(seed)
    width = 19
    visual = np.zeros((5, width), bool)
    visual[0, 2:12] = visual[1, 3:6] = visual[1, 8:13] = True
    visual[3, 1:9] = visual[4, 0:9] = True
    lengths = np.array([16, 19, 7, 9, 10])
    visual[2, 9:12] = True  # a mask may say anything about padding
    positions = np.cumsum(rng.integers(1, 4, size=visual.shape), axis=1) - 1  # with gaps
    return {
        "hidden_states": rng.normal(size=(*visual.shape, config.text.hidden_size)).astype(dtype),
        "position_ids": positions,
        "lengths": lengths,
        "visual_mask": visual,
        "keep": np.array([4, 3, 2, 5, 2]),
        "width": np.array([19]),
    }
