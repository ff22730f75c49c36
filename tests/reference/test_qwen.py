"""The oracle on Qwen2-VL, Qwen2.5-VL and Qwen3-VL: transformers' own answers where nothing goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.qwen_models import FAMILIES, new_model, shared_model
from tests.support.qwen_prompts import inputs_of, row_of
from trio_deploy import Schedule, TrioError
from trio_deploy.reference.oracle import Oracle
from trio_deploy.schedule.schedule import PruningPoint

PROMPTS = {
    "a picture": (3, (4, 5), 6),
    "pictures first and last, of different sizes": ((3, 2), 5, (2, 6)),
    "text alone": (7,),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_pruning_it_is_transformers_generate(family: str, prompt: str) -> None:
    model, row = shared_model(family), row_of(family, PROMPTS[prompt])
    oracle = Oracle(model, family=family, positions="original")
    expected = model.generate(
        **inputs_of(row),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    kept = Schedule((PruningPoint(1, 1.0), PruningPoint(3, 1.0)))
    for schedule in (Schedule(), kept):
        result = oracle.generate([row], schedule, max_new_tokens=4).rows[0]
        assert result.token_ids == expected.sequences[0, len(row.input_ids) :].tolist()
        got, want = result.logits, torch.cat(expected.logits).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_gradient_through_transformers_whole_layer(family: str, layer: int) -> None:
    """By finite differences in fp64 of the plain cross-entropy."""
    model = new_model(family).double()
    oracle = Oracle(model, family=family, positions="original")
    row = row_of(family, PROMPTS["a picture"])
    with torch.no_grad():
        start = oracle.embed(row)
        positions = oracle.adapter.positions(row)
        layers = range(layer)
        hidden = oracle.run_layers(layers, start.hidden, positions, None, start.deepstack)
    visual = torch.as_tensor(row.input_ids) == oracle.adapter.image_token_id
    scores = oracle.saliency(layer, hidden, positions, visual)

    @torch.no_grad()
    def loss(x: torch.Tensor) -> float:
        logits = oracle.logits(oracle.run_layers([layer], x, positions, None))[-4:]
        return float(torch.nn.functional.cross_entropy(logits, logits.argmax(-1)))

    token, step = int(visual.nonzero()[5]), 1e-4
    gradient = []
    for feature in range(hidden.shape[-1]):
        up, down = hidden.clone(), hidden.clone()
        up[0, token, feature] += step
        down[0, token, feature] -= step
        gradient.append((loss(up) - loss(down)) / (2 * step))
    assert float(scores[token]) == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-3)


def test_tokens_with_three_positions_are_not_renumbered() -> None:
    with pytest.raises(TrioError, match="three positions"):
        Oracle(shared_model("qwen2_vl"), family="qwen2_vl")
