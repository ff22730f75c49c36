"""What families keep to themselves, and what each of them promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trio_deploy.families.base import TowerSizes
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import FAMILIES, parse_config, request_limits

PACKAGE = Path(__file__).parents[2] / "trio_deploy"
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "families"]

#: How images become tiles and tiles become tokens.
GEOMETRY = {"image_size", "patch_size", "rows_per_tile", "grid_pinpoints", "image_newline"}
WHERE = ("reference/", "graphs/towers.py", "graphs/patch_tower.py", "graphs/connectors.py")


def names(tree: ast.AST) -> set[str]:
    """Attributes, keywords, variables and keys that a module mentions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_geometry_of_images_is_known_to_families_towers_and_the_reference_alone(path):
    if path.relative_to(PACKAGE).as_posix().startswith(WHERE):
        return
    assert not names(ast.parse(path.read_text(encoding="utf-8"))) & GEOMETRY


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_outside_asks_for_a_familys_name(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            compared = [ast.unparse(side) for side in (node.left, *node.comparators)]
            models = any("config.family" in side or "model_type" in side for side in compared)
            known = any(side.strip("'") in FAMILIES for side in compared)
            assert not models and not known, ast.unparse(node)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_no_image_brings_more_than_the_family_says(family):
    from tests.support.pictures import make_picture

    config = parse_config(family.tiny())
    assert config.family == family.name
    if config.pixels is None:
        side = config.clip.image_size
        settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    else:
        settings = {"size": {"shortest_edge": 3000, "longest_edge": 60000}}
    preprocessor = Preprocessor(settings, config)
    config = preprocessor.config
    limits = request_limits(config)
    largest = preprocessor(make_picture(*limits.picture))
    assert len(largest.rows) == largest.text.count("\ufffc") == limits.visual_tokens
    for size in ((64, 64), (200, 40), (33, 170), (1, 90), limits.picture):
        layout = preprocessor(make_picture(*size))
        tiles = layout.feeds["pixel_values"]
        assert len(tiles) <= limits.tiles and len(layout.rows) <= limits.visual_tokens
        assert tiles[0].size <= limits.tile_values
        assert layout.feature_rows <= len(tiles) * limits.tile_rows
        assert layout.rows.max() < layout.feature_rows and layout.boxes.shape[1] == 4
        counts = family.counts(layout.size, config)
        assert counts.visual_tokens == len(layout.rows)
        assert counts.input_bytes == sum(values.nbytes for values in layout.feeds.values())
        squares = 1 if config.pixels is None else config.patch_tower.merge**2
        assert counts.patches == layout.feature_rows * squares
        if config.pixels is None:
            assert tiles[0].size == limits.tile_values
            assert layout.feature_rows == len(tiles) * limits.tile_rows


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_names_on_the_hub_are_those_that_the_prefixes_undo(family):
    from trio_deploy.families.names import canonical_name
    from trio_deploy.graphs.weights import canonical_tensors

    for name in canonical_tensors(parse_config(family.tiny())):
        assert canonical_name(family, family.hub.name(name)) == name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_config_of_any_sizes_is_read_as_these_sizes(family):
    tower = TowerSizes(width=32, layers=4, mlp=64, heads=2, image=224, patch=14)
    text = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 500,
    }
    raw = family.hub.config(tower, text) | dict.fromkeys(family.hub.tokens, 4)
    config = parse_config(raw)
    vision, read = config.vision, config.text
    assert config.family == family.name and config.image_token_id == 4
    sizes = (vision.hidden_size, vision.num_layers, vision.intermediate_size, vision.num_heads)
    assert sizes == (32, 4, 64, 2) and vision.patch_size == 14
    assert (read.hidden_size, read.intermediate_size, read.num_layers) == (48, 80, 5)
    assert (read.num_heads, read.num_kv_heads, read.head_dim) == (3, 1, 16)
    assert (read.vocab_size, read.max_positions) == (300, 500)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_transformers_model_has_the_weights_that_the_graphs_read(family):
    """Under the names and in the shapes of the modules, once the prefixes are undone."""
    torch = pytest.importorskip("torch")
    from trio_deploy.families.names import map_checkpoint_names
    from trio_deploy.graphs.weights import canonical_tensors
    from trio_deploy.reference.adapters import ADAPTERS, model_class

    raw = family.tiny()
    architecture = model_class(family.name)
    with torch.device("meta"):
        state = architecture(architecture.config_class.from_dict(raw)).state_dict()
    shapes = canonical_tensors(parse_config(raw))
    names = map_checkpoint_names(family, state, shapes)
    assert {name: tuple(state[given].shape) for name, given in names.items()} == shapes
    assert family.reference in ADAPTERS


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_random_checkpoint_of_every_family_passes_check(family, tmp_path):
    pytest.importorskip("torch")
    from tests.support.checkpoints import make_tiny
    from trio_deploy import check, export_model
    from trio_deploy.verify.examples import default_examples
    from trio_deploy.verify.report import format_report

    checkpoint = make_tiny(tmp_path / "checkpoint", family)
    bundle = export_model(checkpoint, tmp_path / "bundle", schedule="2:0.4", progress=False)
    report = check(bundle, examples=default_examples()[:1], threads=2)
    assert report.passed, format_report(report)
