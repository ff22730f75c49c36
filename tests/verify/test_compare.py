"""What counts as a difference, and that a wrong selection is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trio_deploy.reference.encoder_scores import window_order
from trio_deploy.reference.trace import Stage
from trio_deploy.selection.nms import greedy_select
from trio_deploy.verify.compare import (
    TOLERANCES,
    compare_outputs,
    compare_selection,
    difference,
    difference_of_proportions,
    most_excluded,
    tied,
)

EXACT = TOLERANCES["float32"]


def selection(renumber: bool = True) -> Stage:
    """Two rows, six tokens of which the middle four are visual; the second row keeps fewer."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 6, 8)).astype(np.float32)
    visual = np.array([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]], bool)
    positions = np.tile(np.arange(6), (2, 1)) + 10 * (not renumber)
    lengths = np.array([6, 5])
    scores = np.where(visual, rng.uniform(1, 2, (2, 6)), 0).astype(np.float32)
    index = np.full((2, 5), -1)
    for b, keep in enumerate((3, 1)):
        places = np.flatnonzero(visual[b])
        kept = places[greedy_select(scores[b][places], hidden[b][places], keep, 0.8)]
        text = np.flatnonzero(~visual[b][: lengths[b]])
        index[b, : len(text) + keep] = np.sort(np.concatenate([text, kept]))
    real = index >= 0
    at = np.where(real, index, 0)
    take = np.take_along_axis
    places = np.tile(np.arange(5), (2, 1)) if renumber else take(positions, at, 1)
    return Stage(
        {
            "hidden_states": hidden,
            "position_ids": positions,
            "lengths": lengths,
            "visual_mask": visual,
            "keep": np.array([3, 1]),
            "width": np.array([5]),
            "probe_logits": np.array([0.5, 2.0]),
        },
        {
            "keep_index": index,
            "hidden_states_out": np.where(real[..., None], take(hidden, at[..., None], 1), 0),
            "position_ids_out": np.where(real, places, 0),
            "lengths_out": real.sum(1),
            "visual_mask_out": take(visual, at, 1) & real,
            "saliency": scores,
            "converged": np.array([True, True]),
        },
    )


@pytest.mark.parametrize("renumber", [True, False])
def test_equal_selections_pass(renumber):
    stage = selection(renumber)
    row = compare_selection("select_1", stage, stage.outputs, EXACT, 0.8)
    assert row.passed and row.overlap == 1.0 and row.excluded == 0.0


def spoil(key: str, change) -> dict:
    stage = selection()
    outputs = {name: value.copy() for name, value in stage.outputs.items()}
    change(outputs[key])
    return outputs


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("saliency", lambda a: a.__setitem__((0, 1), a[0, 1] * 1.001), "saliency differs"),
        ("saliency", lambda a: a.__setitem__((0, 0), 1.0), "at tokens that are not visual"),
        ("saliency", lambda a: a.__setitem__((0, 1), np.nan), "saliency differs"),
        ("converged", lambda a: a.__setitem__(1, False), "did not converge"),
        ("hidden_states_out", lambda a: a.__setitem__((0, 1, 0), 9.0), "hidden_states_out"),
        ("hidden_states_out", lambda a: a.__setitem__((1, 4, 0), 9.0), "hidden_states_out"),
        ("position_ids_out", lambda a: a.__setitem__((0, 1), 7), "position_ids_out"),
        ("visual_mask_out", lambda a: a.__setitem__((0, 0), True), "visual_mask_out"),
        ("lengths_out", lambda a: a.__setitem__(0, 4), "lengths_out"),
        ("keep_index", lambda a: a.__setitem__((1, 4), 3), "padded"),
    ],
)
def test_every_output_of_a_selection_is_checked(key, change, said):
    row = compare_selection("select_1", selection(), spoil(key, change), EXACT, 0.8)
    assert not row.passed and said in row.problem


def test_a_wrong_token_fails_even_if_all_outputs_fit_together():
    stage = selection()
    visual, index = stage.inputs["visual_mask"][0], stage.outputs["keep_index"][0]
    dropped = (set(np.flatnonzero(visual)) - set(index.tolist())).pop()
    other = np.sort(np.r_[index[index != index[visual[index]][0]], dropped])
    outputs = dict(stage.outputs)
    for key in ("keep_index", "hidden_states_out"):
        outputs[key] = outputs[key].copy()
    outputs["keep_index"][0] = other
    outputs["hidden_states_out"][0] = stage.inputs["hidden_states"][0][other]
    row = compare_selection("select_1", stage, outputs, EXACT, 0.8)
    assert row.overlap == 0.75 and "but no scores are within the error" in row.problem
    loose = compare_selection("select_1", stage, outputs, TOLERANCES["float16"], 0.8)
    assert not loose.passed  # nor is it what the greedy rule picks from its own scores


def test_tokens_that_may_change_places_are_counted():
    reference = np.array([1.0, 2.0, 2.001, 5.0])
    assert not tied(reference, reference).any()
    assert not tied(np.zeros(3), np.zeros(3)).any()  # exactly equal scores have a rule
    noisy = reference + np.array([0.0, 1e-3, -1e-3, 0.0])
    assert tied(noisy, reference).tolist() == [False, True, True, False]
    assert not tied(reference * 1.01, reference).any()  # a common factor changes no rank
    wide = reference + np.array([0.0, 0.0, 0.0, 3.5])
    assert tied(wide, reference).tolist() == [False, True, True, True]


def test_the_share_of_tokens_in_doubt_that_is_taken_grows_with_their_number():
    """As it does for scores that are spread evenly, with errors that stay the same."""
    draw, shares = np.random.default_rng(0), []
    for count in (256, 1024, 4096):
        reference = draw.random((200, count)) + 1
        scores = reference + draw.normal(0, 3e-6, reference.shape)
        doubtful = [tied(one, other) for one, other in zip(scores, reference, strict=True)]
        shares.append(np.mean(doubtful) / most_excluded(0.01, count))
    assert shares == pytest.approx([shares[0]] * 3, rel=0.2) and 0.1 < shares[0] < 1
    assert most_excluded(0.01, 1) == most_excluded(0.01, 256) == 0.01


def test_padding_is_not_compared_and_everything_else_is():
    hidden = np.ones((2, 3, 4), np.float32)
    stage = Stage({"lengths": np.array([3, 2])}, {"hidden_states": hidden})
    padded = hidden.copy()
    padded[1, 2] = 1e6
    assert compare_outputs("prefill_0", stage, {"hidden_states": padded}, EXACT).passed
    padded[1, 1, 0] = 1.1
    row = compare_outputs("prefill_0", stage, {"hidden_states": padded}, EXACT)
    assert row.max_rel == pytest.approx(0.1) and "hidden_states" in row.problem
    assert "missing" in compare_outputs("prefill_0", stage, {}, EXACT).problem
    assert (
        "shape" in compare_outputs("prefill_0", stage, {"hidden_states": hidden[:1]}, EXACT).problem
    )


def test_what_is_not_finite_is_no_small_difference():
    assert difference(np.array([np.nan]), np.array([1.0])) == (np.inf, np.inf)
    assert difference(np.array([1e-9]), np.array([0.0]))[1] == np.inf
    assert difference(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_proportions_are_those_beside_the_best_common_factor():
    reference = np.array([1.0, 2.0, 2.0])
    assert difference_of_proportions(1e-9 * reference, reference) == pytest.approx(0, abs=1e-12)
    # Of a part across the reference, as long as the reference: the best factor leaves sqrt(1/2).
    across = reference + np.array([0.0, 3.0, -3.0]) / np.sqrt(2)
    assert difference_of_proportions(across, reference) == pytest.approx(np.sqrt(0.5))
    assert difference_of_proportions(np.zeros(3), reference) == 1.0
    assert difference_of_proportions(reference, np.zeros(3)) == 0.0
    assert difference_of_proportions(np.array([1.0, np.nan, 2.0]), reference) == np.inf
    assert difference_of_proportions(reference, np.array([1.0, np.inf, 2.0])) == np.inf


def test_scores_of_other_proportions_are_noticed_where_large_logits_explain_any_error():
    stage = selection()
    stage.inputs["probe_logits"] = np.array([40.0, 40.0])
    changed = stage.outputs["saliency"].copy()
    place = stage.outputs["keep_index"][0, 1]
    changed[0, place] *= 1.3  # still kept, as it was
    outputs = stage.outputs | {"saliency": changed}
    row = compare_selection("select_1", stage, outputs, TOLERANCES["bfloat16"], 0.8)
    assert row.problem.startswith("saliency differs by")
    assert row.problem.endswith("beside a factor common to all tokens")
    outputs = stage.outputs | {"saliency": 1.3 * stage.outputs["saliency"]}
    assert compare_selection("select_1", stage, outputs, TOLERANCES["bfloat16"], 0.8).passed


def test_a_token_with_huge_hidden_states_hides_no_other():
    """As in trained models: the first token's hidden states are a thousand times the others'."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 9, 16)).astype(np.float32)
    hidden[0, 0, 3] = 25_000
    stage = Stage({"lengths": np.array([9])}, {"hidden_states": hidden})
    half = TOLERANCES["float16"]
    near = {"hidden_states": hidden.astype(np.float16).astype(np.float32)}
    assert compare_outputs("prefill_0", stage, near, half).passed
    other = hidden.copy()
    other[0, 5] = rng.normal(size=16)
    row = compare_outputs("prefill_0", stage, {"hidden_states": other}, half)
    assert not row.passed and "hidden_states differs" in row.problem
    small = hidden.copy()
    small[0, 5] *= 1e-4  # a token of almost nothing is held to the size of the others
    stage = Stage(stage.inputs, {"hidden_states": small})
    off = {"hidden_states": small + 1e-6 * np.eye(9, 16, dtype=np.float32)}
    assert compare_outputs("prefill_0", stage, off, EXACT).passed
    zero = Stage(stage.inputs, {"hidden_states": np.zeros_like(hidden)})
    assert compare_outputs("prefill_0", zero, zero.outputs, EXACT).passed
    assert not compare_outputs("prefill_0", zero, {"hidden_states": hidden}, EXACT).passed


@pytest.mark.parametrize("key", ["hidden_states", "logits", "present.0.key"])
def test_many_small_differences_of_one_token_are_noticed_by_its_norm(key):
    """A wrong part of a matrix moves all values of a token a little, and none by much."""
    rng = np.random.default_rng(0)
    shape = {"hidden_states": (2, 5, 64), "logits": (2, 64), "present.0.key": (2, 4, 5, 16)}[key]
    values = rng.normal(size=shape).astype(np.float32)
    values[..., 0] = 9  # the greatest value, which the differences are small beside
    stage = Stage({"lengths": np.array([5, 4]), "past_lengths": np.array([0, 0])}, {key: values})
    bounds = replace(TOLERANCES["float32"], relative=0.1, per_token=0.1, norm=0.023)
    near, wrong = values.copy(), values.copy()
    near += (0.01 * rng.choice([-1, 1], shape)).astype(np.float32)
    token = (1,) if key == "logits" else (1, 2) if key == "hidden_states" else (1, slice(None), 2)
    wrong[token] += (0.5 * rng.choice([-1, 1], values[token].shape)).astype(np.float32)
    assert compare_outputs("prefill_0", stage, {key: near}, bounds).passed
    row = compare_outputs("prefill_0", stage, {key: wrong}, bounds)
    assert not row.passed and "of a token's norm" in row.problem and key in row.problem
    assert compare_outputs("prefill_0", stage, {key: wrong}, replace(bounds, norm=None)).passed
    if key != "logits":  # padding is not compared
        padding = values.copy()
        padding[(1, 4) if key == "hidden_states" else (1, slice(None), 4)] = np.nan
        assert compare_outputs("prefill_0", stage, {key: padding}, bounds).passed


def picked(method: str, kept: list[list[int]], scores: np.ndarray) -> Stage:
    """`selection` with other tokens and scores."""
    stage = selection()
    hidden, visual = stage.inputs["hidden_states"], stage.inputs["visual_mask"]
    index = np.full((2, 5), -1)
    for b, tokens in enumerate(kept):
        text = np.flatnonzero(~visual[b][: stage.inputs["lengths"][b]])
        index[b, : len(text) + len(tokens)] = np.sort([*text, *tokens])
    real = index >= 0
    moved = np.take_along_axis(hidden, np.where(real, index, 0)[..., None], 1)
    outputs = stage.outputs | {
        "keep_index": index,
        "hidden_states_out": np.where(real[..., None], moved, 0),
        "saliency": np.where(visual, scores, 0).astype(np.float32),
    }
    return Stage(stage.inputs, outputs)


def test_a_score_keeps_its_greatest_without_suppression():
    scores = np.tile(np.array([0, 4.0, 3, 2, 1, 0]), (2, 1))
    right = picked("random", [[1, 2, 3], [1]], scores)
    assert compare_selection("select_1", right, right.outputs, EXACT, 0.8, "random").passed
    wrong = picked("random", [[1, 2, 4], [1]], scores)
    row = compare_selection("select_1", wrong, wrong.outputs, EXACT, 0.8, "random")
    assert "picks" in row.problem


def test_the_farthest_are_recognised_whatever_came_of_a_tie():
    """Distances equal to within the rule's slack: either token is right, a nearer one is not."""
    scores = np.array([[0, 2.0, 1, 1, 0, 0], [0, 2, 1, 1, 0, 0]])
    stage = picked("divprune", [[1, 2, 3], [1]], scores)
    stage.inputs["hidden_states"][0, 1:5] = np.eye(8)[[0, 1, 2, 0]] + 1e-8
    for kept, right in (([1, 2, 3], True), ([4, 2, 3], True), ([1, 2, 4], False)):
        own = scores.copy()
        own[0, 1:5] = 0
        own[0, kept] = [2.0, 1, 1 if right else 0.5]
        got = picked("divprune", [kept, [1]], own)
        moved = stage.inputs["hidden_states"][0, got.outputs["keep_index"][0]]
        got.outputs["hidden_states_out"][0] = moved
        row = compare_selection("select_1", stage, got.outputs, EXACT, 0.8, "divprune")
        assert ("picks" in row.problem) is not right


def encoded(attention: np.ndarray, side: int, class_token: bool = False) -> np.ndarray:
    """`prior_local` [T·p] of attention [T, patches], by the oracle."""
    import torch

    whole = torch.from_numpy(np.concatenate([np.ones((len(attention), 1)), attention], axis=1))
    local = window_order(whole.float()).numpy()
    assert local.shape[1] == side * side
    if class_token:
        local = np.concatenate([np.full((len(local), 1), 36, np.float32), local], axis=1)
    return local.reshape(-1)


@pytest.mark.parametrize("class_token", [False, True])
def test_near_equal_attention_may_change_ranks_within_its_error(class_token):
    """The values are compared; the ranks must be those of the values, not of the reference's."""
    rng = np.random.default_rng(0)
    attention = 1 + 0.01 * rng.random((2, 64))
    noisy = attention * (1 + rng.uniform(-4e-3, 4e-3, attention.shape))
    stage = Stage(
        {"pixel_values": np.zeros((2, 3, 8, 8), np.float32)},
        {"prior_local": encoded(attention, 8, class_token)},
    )
    got = {"prior_local": encoded(noisy, 8, class_token)}
    moved = np.floor(got["prior_local"]) != np.floor(stage.outputs["prior_local"])
    assert moved.mean() > 0.3
    half = TOLERANCES["float16"]
    row = compare_outputs("vision", stage, got, half)
    assert row.passed and row.worst == "prior_local" and 1e-3 < row.max_rel < 1e-2, row
    assert not compare_outputs("vision", stage, got, EXACT).passed  # values differ too much here

    other = encoded(rng.random((2, 64)), 8, class_token)
    wrong = compare_outputs("vision", stage, {"prior_local": other}, half)
    assert "prior_local differs by" in wrong.problem
    swapped = got["prior_local"].copy()
    start = int(class_token)
    first, second = start + np.argsort(noisy[0, :3])[[0, 2]]  # three patches of one window
    pair = [first, second]
    swapped[pair] += np.floor(swapped[pair[::-1]]) - np.floor(swapped[pair])
    wrong = compare_outputs("vision", stage, {"prior_local": swapped}, half)
    assert "rank the patches" in wrong.problem
    twice = got["prior_local"].copy()
    twice[first] += np.floor(twice[second]) - np.floor(twice[first])
    wrong = compare_outputs("vision", stage, {"prior_local": twice}, half)
    assert "number the patches" in wrong.problem


def test_two_scans_keep_what_the_encoder_scores_say_in_every_type():
    """`vscan` reads scores in fp32 whatever the graph's type is, so its tokens follow from them."""
    prior = np.array([[0, 4.0, 3, 2, 1, 0], [0, 2, 3, 1, 0, 0]])
    stage = picked("vscan", [[1, 2, 4], [2]], prior)
    stage.inputs["prior"] = prior.astype(np.float32)
    local = np.array([[0, 36.5, 35.1, 34.2, 36.1, 0], [0, 36, 35, 34, 0, 0]], np.float32)
    stage.inputs["prior_local"] = local
    half = TOLERANCES["float16"]
    assert compare_selection("select_1", stage, stage.outputs, half, 0.8, "vscan").passed
    wrong = picked("vscan", [[1, 2, 3], [2]], prior)
    row = compare_selection("select_1", stage, wrong.outputs, half, 0.8, "vscan")
    assert "picks" in row.problem


def test_a_selection_that_tells_no_token_from_another_is_noticed_whatever_the_tolerance():
    """An error of the probes' logits would explain a difference of 100 %, and keep some tokens."""
    stage = selection()
    stage.inputs["probe_logits"] = np.array([40.0, 40.0])
    flat = np.where(stage.inputs["visual_mask"], np.float32(0.25), np.float32(0))
    for scores in (np.zeros_like(flat), flat):
        outputs = stage.outputs | {"saliency": scores}
        row = compare_selection("select_1", stage, outputs, TOLERANCES["bfloat16"], 0.8)
        assert "the same score at all visual tokens" in row.problem
