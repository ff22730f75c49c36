"""What families keep to themselves, and what each of them promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
