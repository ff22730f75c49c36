"""vision.onnx of the Qwen families against transformers' towers, mergers and deepstack mergers."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.support.full_runs import only_in_full_runs
from tests.support.qwen_models import (
    FAMILIES,
    model_config,
    pixels,
    shared_model,
    tower_feeds,
    weights_of,
)
from tests.support.run_graph import Runner, filled
from tests.support.transformers_models import relative
from trio_deploy import TrioError
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_vision
from trio_deploy.reference.adapters import adapt

TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]
GRIDS = (
    (1, 2, 2),
    (1, 2, 60),
    (1, 8, 8),
    (1, 10, 14),  # ragged windows
    (1, 30, 18),
    (3, 10, 6),
    (2, 12, 18),
)
"""(frames, rows, columns) of patches."""


@cache
def expected(family: str, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """image_features and deepstack.{j} by transformers."""
    model = shared_model(family)
    patches = torch.from_numpy(pixels(model_config(family), grid)).flatten(0, 1)
    with torch.no_grad():
        out = model.model.get_image_features(patches, torch.tensor([grid]))
    features = {"image_features": torch.cat(list(out.pooler_output)).numpy()}
    for j, tap in enumerate(getattr(out, "deepstack_features", None) or []):
        features[f"deepstack.{j}"] = torch.cat(list(tap)).numpy()
    return features


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_equals_transformers_for_grids_of_any_shape(
    family: str, dialect: str, runtime: str
) -> None:
    config = model_config(family)
    graph = build_vision(config, GraphOptions(dialect=dialect))
    runner = Runner(graph, weights_of(shared_model(family)), runtime)
    for grid in GRIDS:
        got = runner({"pixel_values": pixels(config, grid), **tower_feeds(config, grid)})
        want = expected(family, grid)
        assert got.keys() == want.keys()
        for name, values in want.items():
            assert relative(got[name], values) < 5e-6, (grid, name)


REAL = ((1, 36, 40), (1, 60, 36))
SQUARE = {"qwen2_vl": (1, 72, 72), "qwen2_5_vl": (1, 72, 72), "qwen3_vl": (1, 64, 64)}
"""Patches of a picture of 1008 x 1008 pixels, which Qwen3-VL makes 1024 x 1024."""
HERE = [(family, *TARGETS[0], None) for family in FAMILIES]
HERE += [("qwen2_5_vl", *TARGETS[2], 512), ("qwen3_vl", *TARGETS[3], None)]
LARGE = [
    (family, *target, block) for family in FAMILIES for target in TARGETS for block in (None, 512)
]


@pytest.mark.parametrize(
    ("family", "dialect", "runtime", "block"),
    [
        case if case in HERE else pytest.param(*case, marks=only_in_full_runs("make tests"))
        for case in LARGE
    ],
)
def test_pictures_of_real_sizes_equal_transformers(
    family: str, dialect: str, runtime: str, block: int | None
) -> None:
    """Up to 1,296 visual tokens; sides that are multiples of the windows, and that are not."""
    config = model_config(family)
    graph = build_vision(config, GraphOptions(dialect=dialect, query_block=block))
    runner = Runner(graph, weights_of(shared_model(family)), runtime)
    for grid in (*REAL, SQUARE[family]):
        got = runner({"pixel_values": pixels(config, grid), **tower_feeds(config, grid)})
        for name, values in expected(family, grid).items():
            assert relative(got[name], values) < 5e-6, (grid, name, relative(got[name], values))


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_queries_change_nothing(family: str, dialect: str, runtime: str) -> None:
    """Of lengths that are a multiple of the block, that are not, and that are below it."""
    config = model_config(family)
    graph = build_vision(config, GraphOptions(dialect=dialect, query_block=48))
    runner = Runner(graph, weights_of(shared_model(family)), runtime)
    for grid in GRIDS:
        got = runner({"pixel_values": pixels(config, grid), **tower_feeds(config, grid)})
        for name, values in expected(family, grid).items():
            assert relative(got[name], values) < 5e-6, (grid, name)


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_two_percent(family: str, dialect: str) -> None:
    config, grid = model_config(family), (2, 10, 14)
    graph = build_vision(config, GraphOptions(dialect=dialect, dtype="float16"))
    runner = Runner(graph, weights_of(shared_model(family)))
    feeds = {"pixel_values": pixels(config, grid).astype(np.float16), **tower_feeds(config, grid)}
    got = runner(feeds)
    for name, values in expected(family, grid).items():
        assert got[name].dtype == np.float16
        assert relative(got[name].astype(np.float32), values) < 2e-2, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_pass_the_checker_with_strict_shape_inference(
    family: str, dialect: str, dtype: str
) -> None:
    for block in (None, 48):
        options = GraphOptions(dialect=dialect, dtype=dtype, query_block=block)
        proto = filled(
            build_vision(model_config(family), options), weights_of(shared_model(family))
        )
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


def test_scores_of_a_class_token_are_refused() -> None:
    with pytest.raises(TrioError, match="no class token"):
        build_vision(model_config("qwen2_vl"), GraphOptions(), ["prior"])


@pytest.mark.parametrize("family", FAMILIES)
def test_three_ways_to_place_patches_agree(family: str) -> None:
    """By the definition, as these tests; by the family's own; by the oracle's adapter."""
    config, factor = model_config(family), model_config(family).patch_tower.factor
    raw = {"size": {"shortest_edge": factor**2, "longest_edge": 2000 * factor**2}}
    preprocessor = Preprocessor(raw, config)
    adapter = adapt(shared_model(family), family)
    for _, rows, columns in GRIDS:
        feeds = tower_feeds(config, (1, rows, columns))
        size = (columns * factor // 2, rows * factor // 2)
        ours = dict(preprocessor(Image.new("RGB", size)).feeds)
        del ours["pixel_values"]
        for placed in (ours, adapter._places(rows, columns)):
            assert placed.keys() == feeds.keys()
            for name in feeds.keys() - {"position_taps", "position_weights"}:
                np.testing.assert_array_equal(placed[name], feeds[name], name)
            if "position_taps" in feeds:
                wanted, found = (
                    _taken(each, config.patch_tower.position_side) for each in (feeds, placed)
                )
                np.testing.assert_allclose(found, wanted, atol=1e-6)


def _taken(feeds: dict[str, np.ndarray], side: int) -> np.ndarray:
    """How much of each entry of the table of positions each patch takes."""
    share = np.zeros((len(feeds["position_taps"]), side**2))
    for tap in range(4):
        np.add.at(
            share,
            (np.arange(len(share)), feeds["position_taps"][:, tap]),
            feeds["position_weights"][:, tap],
        )
    return share
