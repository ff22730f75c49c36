"""What a prefill costs: the paper's figures, and everything counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trio_deploy import Schedule
from trio_deploy.cost.flops import (
    account,
    layer_flops,
    paper_layer_flops,
    vision_flops,
)
from trio_deploy.families.base import ModelConfig, RopeConfig, TextConfig, VisionConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.schedule.methods import METHODS, PointSizes, load
from trio_deploy.selection.trio import saliency_flops

MIB = 2**20
VICUNA = TextConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    max_positions=4096,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
)
CLIP = VisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu", (23,), True)
PAPER_11 = Schedule.parse("1:92,10:54,15:22")
NOTHING = Schedule()


def cost(schedule, visual, text_tokens=60):
    return account(VICUNA, schedule, visual, text_tokens, item_bytes=2, probes=4)


@pytest.mark.parametrize(("visual", "tera"), [(576, 2.986), (2880, 16.670)])
def test_unpruned_flops_are_the_papers(visual, tera):
    assert cost(NOTHING, visual).paper / 1e12 == pytest.approx(tera, abs=5e-4)


@pytest.mark.parametrize(("schedule", "mib"), [(NOTHING, 318), (PAPER_11, 62)])
def test_kv_cache_is_the_papers_llava_row(schedule, mib):
    assert cost(schedule, 576).kv_bytes == mib * MIB


@pytest.mark.parametrize(
    ("schedule", "visual", "free", "layer_a_probe"),
    [(PAPER_11, 576, 0.326, 0.442), (Schedule.parse("1:460,10:270,15:110"), 2880, 1.70, 2.34)],
)
def test_pruned_flops_with_and_without_a_layer_forward_a_probe(
    schedule, visual, free, layer_a_probe
):
    base = cost(schedule, visual).paper
    probed = (visual, *schedule.resolve(visual))[:-1]
    with_probe = base + sum(paper_layer_flops(n, 4096, 11008) for n in probed)
    assert base / 1e12 == pytest.approx(free, abs=6e-3)
    assert with_probe / 1e12 == pytest.approx(layer_a_probe, abs=6e-3)


def test_saliency_costs_the_share_of_a_layer_that_was_derived():
    share = saliency_flops(2944, VICUNA, probes=4) / layer_flops(2944, VICUNA)
    assert share == pytest.approx(0.157, abs=2e-3)


def test_the_full_count_has_the_third_mlp_matrix_and_the_selection():
    pruned, full = cost(PAPER_11, 576, 0), cost(NOTHING, 576, 0)
    assert full.selection == 0
    assert full.layers - full.paper == 32 * 576 * 4096 * 11008
    assert pruned.prefill == pruned.layers + pruned.saliency + pruned.similarity + pruned.lm_head
    assert 0 < pruned.selection < 3 * layer_flops(576, VICUNA)


def test_grouped_heads_make_keys_and_their_cache_cheaper():
    grouped = TextConfig(**{**VICUNA.__dict__, "num_kv_heads": 8})
    assert grouped.kv_bytes([10], 2) * 4 == VICUNA.kv_bytes([10], 2)
    assert layer_flops(100, VICUNA) - layer_flops(100, grouped) == 2 * 100 * 4096 * (4096 - 1024)
    assert saliency_flops(2944, grouped, 4) < saliency_flops(2944, VICUNA, 4)


def test_vision_cost_grows_with_the_tiles():
    config = ModelConfig("llava_next", CLIP, VICUNA, "gelu", True, 32000, ((336, 672),))
    one = vision_flops(config, 1)
    assert vision_flops(config, 5) == 5 * one
    # 23 of CLIP-L's 24 layers over 577 tokens, about 0.19 T with its attention
    assert one / 1e12 == pytest.approx(0.19, abs=0.02)


def test_the_largest_image_is_known_from_the_configuration():
    llava = ModelConfig("llava", CLIP, VICUNA, "gelu", True, 32000)
    canvases = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    tiled = ModelConfig("llava_next", CLIP, VICUNA, "gelu", True, 32000, canvases)
    for config, tiles, visual in ((llava, 1, 576), (tiled, 5, 2928)):
        limits = request_limits(config)
        assert (limits.tiles, limits.visual_tokens) == (tiles, visual)


def test_a_range_without_layers_is_not_shown():
    assert [r[:3] for r in cost(Schedule.parse("0:96,16:32"), 576).ranges] == [
        (0, 16, 96),
        (16, 32, 32),
    ]


def test_what_selects_is_counted_by_its_method():
    """TRIO's probes cost more than attention of one token; diversity compares all with all."""
    by = {m: cost(PAPER_11.with_method(m), 576) for m in METHODS}
    assert by["random"].selection == 0
    assert by["trio"].saliency == by["topk-gradient"].saliency > by["fastv"].saliency > 0
    assert by["topk-gradient"].similarity == by["fastv"].similarity == 0
    assert by["divprune"].saliency == 0
    tokens = [n + 60 for n in (576, 92, 54)]
    assert by["divprune"].similarity == sum(n * n * 4096 for n in tokens)
    assert by["dart"].saliency == sum(n * 4096 * 4096 for n in tokens)
    one_shot = cost(Schedule.parse("0:64:dart"), 576)
    assert one_shot.saliency == 0 and one_shot.similarity == 8 * 636 * 4096
    layers = {c.layers for c in by.values()}
    assert len(layers) == 1


SMALL = replace(
    VICUNA,
    hidden_size=40,
    intermediate_size=88,
    num_heads=6,
    num_kv_heads=3,
    head_dim=5,
    vocab_size=97,
)
GRADIENT = 36 * (2 * 40 * 15 + 2 * 4 * 30 + 3 * 6 * 4 * 40) + 4 * (
    40 * 30 + 2 * (2 * 30 * 40 + 3 * 40 * 88 + 40 * 97)
)


@pytest.mark.parametrize(
    ("method", "layer", "after", "expected"),
    [
        ("trio", 1, 11, (GRADIENT, 29 * (11 + 5) * 40)),
        ("trio", 1, 25, (GRADIENT, 29 * 29 * 40)),
        ("topk-gradient", 1, 11, (GRADIENT, 0)),
        ("fastv", 1, 11, (36 * 40 * 15 + 40 * 30 + 36 * 30, 0)),
        ("dart", 1, 11, (36 * 40 * 15, 8 * 36 * 40)),
        ("dart", 0, 11, (0, 8 * 36 * 40)),
        ("divprune", 1, 11, (0, 36 * 36 * 40)),
        ("cdpruner", 1, 13, (2 * 36 * 40, 13 * 36 * (40 + 2 * 13))),
        ("vscan", 1, 11, (0, 2 * 36 * (7 + 11) * 40)),
        ("cls-attention", 1, 11, (0, 0)),
        ("random", 1, 11, (0, 0)),
    ],
)
def test_the_operations_of_a_method_are_those_of_its_formula(method, layer, after, expected):
    sizes = PointSizes(layer, before=29, after=after, text_tokens=7, probes=4, block=5)
    assert load(method).flops(SMALL, sizes) == expected
