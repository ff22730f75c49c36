"""Inputs and outputs of a select graph."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import qwen_models
from tests.support.transformers_models import model_config
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.selection.stage import build_select


def shapes(values: Any) -> dict[str, list[str]]:
    return {value.name: [str(size) for size in value.shape] for value in values}


@pytest.mark.parametrize(
    ("config", "given", "left"),
    [
        (model_config(), ["B", "S"], ["B", "W"]),
        (qwen_models.model_config("qwen2_5_vl"), ["B", "3", "S"], ["B", "3", "W"]),
    ],
)
def test_positions_have_the_axes_of_the_model(config: Any, given: list, left: list) -> None:
    graph = build_select(config, 1, GraphOptions(positions="original")).graph
    assert shapes(graph.inputs)["position_ids"] == given
    assert shapes(graph.outputs)["position_ids_out"] == left


def test_features_are_passed_on_to_the_layers_that_still_read_them() -> None:
    config = qwen_models.model_config("qwen3_vl")
    assert config.deepstack == 3
    for layer in (2, 3):
        graph = build_select(config, layer, GraphOptions(positions="original")).graph
        assert ("feature_index" in shapes(graph.inputs)) is (layer < 3)
        assert ("feature_index_out" in shapes(graph.outputs)) is (layer < 3)
