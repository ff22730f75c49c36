"""Each method's reference keeps what its paper says, on features that show it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trio_deploy.reference.oracle import Oracle, Point
from trio_deploy.schedule.methods import METHODS
from trio_deploy.selection.dart import PIVOTS
from trio_deploy.selection.random import PRIME


@pytest.fixture(scope="module")
def oracle(llava_checkpoint) -> Oracle:
    return Oracle.from_checkpoint(llava_checkpoint)


def view(features: np.ndarray, keep: int, layer: int = 0, texts: int = 3, seed: int = 0):
    """Visual rows with one text token in front and `texts` behind."""
    rng = np.random.default_rng(0)
    n, d = features.shape
    words = rng.normal(size=(1 + texts, d)) * 0.01
    rows = np.concatenate([words[:1], features, words[1:]]).astype(np.float32)
    visual = torch.zeros(len(rows), dtype=torch.bool)
    visual[1 : 1 + n] = True
    prior = torch.zeros(len(rows))
    prior[visual] = torch.tensor(rng.random(n), dtype=torch.float32)
    local = torch.zeros(len(rows))
    local[visual] = torch.tensor(1 + rng.random(n), dtype=torch.float32)
    encoder = {"prior": prior, "prior_local": local}
    at = torch.arange(len(rows))[None]
    return Point(layer, torch.tensor(rows)[None], at, visual, keep, seed, encoder)


def kept(oracle: Oracle, method: str, at: Point) -> list[int]:
    """Numbers of the visual tokens that stay."""
    pruned = oracle.select(method, at)
    assert pruned.scores.shape == at.visual.shape and not pruned.scores[~at.visual].any()
    places = places_of(at).tolist()
    return [places.index(i) for i in pruned.index.tolist() if at.visual[i]]


def places_of(at: Point) -> torch.Tensor:
    """Places of the visual tokens."""
    return at.visual.nonzero().flatten()


def spread(n: int, d: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0, 1, 5, 12])
def test_as_many_as_asked_for_stay(oracle, method, keep):
    at = view(spread(12), keep, layer=1)
    assert len(kept(oracle, method, at)) == keep


def test_divprune_takes_the_loneliest_first_and_then_the_farthest(oracle):
    angles = np.radians([0, 10, 90, 100, 200])
    flat = np.stack([np.cos(angles), np.sin(angles)], 1) @ np.eye(2, 64)
    assert kept(oracle, "divprune", view(flat, 1)) == [4]
    assert kept(oracle, "divprune", view(flat, 2)) == [1, 4]  # 170° from it
    assert kept(oracle, "divprune", view(flat, 3)) == [1, 3, 4]  # 90° from the nearer one


def test_divprune_keeps_one_of_each_copy(oracle):
    features = np.repeat(spread(4), 3, axis=0)
    assert kept(oracle, "divprune", view(features, 4)) == [0, 3, 6, 9]


def test_dart_keeps_the_largest_as_pivots_and_fills_up_with_what_is_unlike_them(oracle):
    base = np.zeros((8 + PIVOTS, 64))
    base[:, 0] = 1.0  # all alike but two, and
    base[[2, 5], 0] = -1.0  # these are the opposite of
    base[8:, 0] = 10.0  # the pivots
    assert kept(oracle, "dart", view(base, PIVOTS + 2)) == [2, 5, 8, 9, 10, 11]
    assert kept(oracle, "dart", view(base, 2)) == [8, 9]


def test_random_is_a_fair_draw_that_depends_on_the_seed_alone(oracle):
    n, draws = 16, 600
    counts = np.zeros(n)
    pairs = np.zeros((n, n))
    for seed in range(draws):
        chosen = kept(oracle, "random", view(spread(n, seed=seed), 4, seed=seed))
        counts[chosen] += 1
        pairs[np.ix_(chosen, chosen)] += 1
    same = kept(oracle, "random", view(spread(n, seed=99), 4, seed=3))
    assert same == kept(oracle, "random", view(spread(n), 4, seed=3))
    # Binomial with p = 1/4: six standard deviations; pairs have p = 4·3 / 16·15.
    assert np.abs(counts - draws / 4).max() < 6 * np.sqrt(draws * 0.25 * 0.75)
    p = 4 * 3 / (n * (n - 1))
    apart = pairs[~np.eye(n, dtype=bool)]
    assert np.abs(apart - draws * p).max() < 6 * np.sqrt(draws * p * (1 - p))


def test_random_draws_from_more_tokens_than_its_permutation_has(oracle):
    n = PRIME + 500
    chosen = np.array(kept(oracle, "random", view(np.ones((n, 64)), n // 2, seed=7)))
    assert abs((chosen < 500).sum() - 250) < 70 and abs((chosen >= n - 500).sum() - 250) < 70


def test_random_draws_anew_at_every_layer(oracle):
    at = [view(spread(40), 10, layer=layer, seed=5) for layer in (0, 1, 2)]
    assert len({tuple(kept(oracle, "random", each)) for each in at}) == 3


def test_fastv_is_the_attention_of_the_last_token(oracle):
    at = view(spread(10), 4, layer=2)
    scores = torch.from_numpy(oracle.select("fastv", at).scores)
    model = oracle.model
    layer = oracle.text.layers[2]
    before = layer.self_attn.config._attn_implementation
    layer.self_attn.config._attn_implementation = "eager"
    try:
        length = at.hidden.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        normal = layer.input_layernorm(at.hidden)
        rotary = model.model.language_model.rotary_emb(at.hidden, position_ids=at.positions)
        _, weights = layer.self_attn(
            hidden_states=normal, position_embeddings=rotary, attention_mask=mask
        )
    finally:
        layer.self_attn.config._attn_implementation = before
    expected = weights[0, :, -1].mean(0) * at.visual
    torch.testing.assert_close(scores.float(), expected, rtol=1e-5, atol=1e-7)


def test_topk_gradient_is_trio_without_suppression(oracle):
    at = view(spread(10), 4, layer=1)
    chosen = kept(oracle, "topk-gradient", at)
    scores = oracle.saliency(1, at.hidden, at.positions, at.visual)[at.visual]
    assert chosen == sorted(scores.topk(4).indices.tolist())
    apart = Oracle(oracle.model, threshold=1.0)
    assert kept(apart, "trio", at) == chosen


def scanned(prior: list[float], local: list[float], features: np.ndarray, keep: int):
    """A row with these scores of its visual tokens."""
    at = view(features, keep)
    for name, values in (("prior", prior), ("prior_local", local)):
        at.encoder[name][at.visual] = torch.tensor(values)
    return at


def test_cls_attention_keeps_what_the_encoder_looks_at_and_newlines_last(oracle):
    at = scanned([0.1, 0.5, 0.0, 0.4, 0.2], [1.0] * 5, spread(5), 3)
    assert kept(oracle, "cls-attention", at) == [1, 3, 4]
    assert kept(oracle, "cls-attention", replace(at, keep=4)) == [0, 1, 3, 4]


def test_vscan_takes_half_by_each_scan_and_no_token_twice(oracle):
    prior, local = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [6.9, 5.9, 5.8, 6.8, 6.7, 5.1]
    at = scanned(prior, local, spread(6), 4)
    assert kept(oracle, "vscan", at) == [0, 1, 3, 4]  # 0 and 1, then 3 and 4: 0 is taken
    assert kept(oracle, "vscan", replace(at, keep=3)) == [0, 1, 3]


def test_what_is_dropped_is_averaged_into_the_most_alike_kept_token(oracle):
    features = np.eye(4, 64)[[0, 1, 0, 1, 2, 1]] + 1e-3 * spread(6)
    at = scanned([0.9, 0.8, 0.1, 0.1, 0.1, 0.0], [2.0, 2.0, 1.0, 1.0, 1.0, 0.0], features, 2)
    merged = oracle.select("vscan", at).hidden[0]
    rows, visual = at.hidden[0], places_of(at)
    assert torch.equal(merged[0], rows[0]) and torch.equal(merged[3:], rows[7:])  # text
    nearest = torch.nn.functional.cosine_similarity(rows[visual[4]], rows[visual[:2]]).argmax()
    groups = [[0, 2], [1, 3]]  # the last one is a newline: no patch, so it goes nowhere
    groups[int(nearest)].append(4)
    for row, group in zip(merged[1:3], groups, strict=True):
        torch.testing.assert_close(row, rows[visual[group]].mean(0))
