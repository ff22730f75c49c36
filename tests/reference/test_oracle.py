"""The oracle is transformers' own model where nothing is pruned, and TRIO as stated where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from tests.support.checkpoints import EOS, IMAGE
from tests.support.pictures import make_picture
from trio_deploy import Schedule, TrioError
from trio_deploy.reference.oracle import Oracle, Row, proxy_loss
from trio_deploy.schedule.schedule import PruningPoint

PRUNED = Schedule((PruningPoint(1, 0.5), PruningPoint(2, 0.25), PruningPoint(3, 0.1)))
QUESTION = "what color is the big circle in the image ?"


def processed(folder: Path, text: str, *pictures) -> tuple[dict, Row]:
    """What transformers' processor makes of a prompt, and the same as the oracle's row."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    batch = processor(text=text, images=list(pictures) or None, return_tensors="pt")
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.dim() == 5:  # tiles are padded to the largest image's
        pixels = torch.cat([tiles[tiles.flatten(1).any(1)] for tiles in pixels])
    row = Row(
        batch["input_ids"][0].numpy(),
        None if pixels is None else pixels.numpy(),
        [(picture.height, picture.width) for picture in pictures],
    )
    return dict(batch), row


@pytest.fixture(scope="module")
def oracles(llava_checkpoint, llava_next_checkpoint, llava_mistral_checkpoint) -> Callable:
    folders = {
        "llava": llava_checkpoint,
        "llava_next": llava_next_checkpoint,
        "mistral": llava_mistral_checkpoint,
    }
    loaded: dict = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **options) -> tuple[Path, Oracle]:
        if (name, dtype) not in loaded:
            loaded[name, dtype] = Oracle.from_checkpoint(folders[name], dtype).model
        return folders[name], Oracle(loaded[name, dtype], **options)

    return get


@pytest.mark.parametrize("name", ["llava", "llava_next", "mistral"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_without_pruning_it_is_transformers_generate(oracles, name, pictures):
    folder, oracle = oracles(name)
    shown = [make_picture(100, 60), make_picture(40, 90, seed=1)][:pictures]
    inputs, row = processed(folder, "<image> " * pictures + QUESTION, *shown)
    expected = oracle.model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    result = oracle.generate([row], Schedule(), max_new_tokens=6, end_tokens=[EOS]).rows[0]
    assert result.token_ids == expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    np.testing.assert_allclose(result.logits, torch.cat(expected.logits), rtol=0, atol=2e-5)
    keeps_all = Schedule((PruningPoint(1, 1.0), PruningPoint(3, 1.0)))
    again = oracle.generate([row], keeps_all, max_new_tokens=6, end_tokens=[EOS]).rows[0]
    np.testing.assert_allclose(again.logits, result.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_decoding_with_the_cache_is_the_same_as_without_one(oracles, positions):
    folder, oracle = oracles("llava_next", positions=positions)
    _, row = processed(folder, "<image> " + QUESTION, make_picture())
    result = oracle.generate([row], PRUNED, max_new_tokens=5).rows[0]
    # Run every segment over its kept prompt tokens and all generated ones at once.
    answer = torch.tensor([result.token_ids[:-1]])
    start = len(row.input_ids)
    with torch.no_grad():
        prompt = oracle.embed(row).hidden
        new = oracle.text.embed_tokens(answer)
        places = torch.arange(start)
        for i, layers in enumerate(PRUNED.segments(4)):
            if i:
                kept = torch.isin(places, torch.as_tensor(result.kept[i - 1]))
                places, prompt = places[kept], prompt[:, kept]
            at = torch.cat([places, torch.arange(start, start + answer.shape[1])])
            if positions == "renumber":
                at = torch.arange(len(at))
            hidden = oracle.run_layers(
                range(*layers), torch.cat([prompt, new], dim=1), at[None], None
            )
            prompt, new = hidden[:, : len(places)], hidden[:, len(places) :]
        logits = oracle.logits(torch.cat([prompt[:, -1:], new], dim=1))
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("probe", ["last", "shifted"])
def test_saliency_is_the_gradient_of_the_plain_cross_entropy(oracles, probe):
    """Against finite differences in fp64 of the loss as the method states it."""
    folder, oracle = oracles("llava", torch.float64, probe=probe)
    _, row = processed(folder, "<image> " + QUESTION, make_picture())
    with torch.no_grad():
        hidden = oracle.embed(row).hidden
    positions = torch.arange(hidden.shape[1])[None]
    visual = torch.as_tensor(row.input_ids) == IMAGE
    scores = oracle.saliency(2, hidden, positions, visual)
    last = hidden.shape[1] - (1 if probe == "shifted" else 0)

    @torch.no_grad()
    def loss(x: torch.Tensor) -> float:
        logits = oracle.logits(oracle.run_layers([2], x, positions, None))[last - 4 : last]
        return float(torch.nn.functional.cross_entropy(logits, logits.argmax(-1)))

    token = int(visual.nonzero()[5])
    slopes = []
    for j in range(hidden.shape[-1]):
        step = torch.zeros_like(hidden)
        step[0, token, j] = 1e-5
        slopes.append((loss(hidden + step) - loss(hidden - step)) / 2e-5)
    assert float(scores[token]) == pytest.approx(np.linalg.norm(slopes), rel=1e-6)
    assert (scores[~visual] == 0).all() and (scores[visual] > 0).all()


def test_a_certain_prediction_still_has_an_exact_gradient():
    """Where p of the label rounds to 1 in fp32, the usual cross entropy's gradient is noise."""
    logits = torch.tensor([[24.0, 1.0, 0.5, -3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(proxy_loss(logits), logits)
    exact = torch.softmax(logits.detach().double(), dim=-1)[0]
    exact[0] = -exact[1:].sum()
    torch.testing.assert_close(gradient[0].double(), exact, rtol=1e-6, atol=0)
    usual = torch.nn.functional.cross_entropy(logits, torch.tensor([0]))
    (noisy,) = torch.autograd.grad(usual, logits)
    assert abs(float(noisy[0, 0] / exact[0]) - 1) > 0.1  # why the form matters


def test_text_is_never_dropped_and_what_is_kept_stays_in_order(oracles):
    folder, oracle = oracles("llava_next")
    pictures = make_picture(), make_picture(40, 90, seed=1)
    _, row = processed(folder, f"see <image> and <image> {QUESTION}", *pictures)
    result = oracle.generate([row], PRUNED).rows[0]
    text = set(np.flatnonzero(row.input_ids != IMAGE).tolist())
    counts = PRUNED.resolve(int((row.input_ids == IMAGE).sum()))
    before = set(range(len(row.input_ids)))
    for kept, count in zip(result.kept, counts, strict=True):
        assert sorted(kept.tolist()) == kept.tolist()
        assert text <= set(kept.tolist()) <= before
        assert len(kept) == len(text) + count
        before = set(kept.tolist())


def test_a_text_prompt_passes_unchanged(oracles):
    folder, oracle = oracles("llava")
    _, row = processed(folder, QUESTION)
    result = oracle.generate([row], PRUNED, max_new_tokens=3).rows[0]
    unpruned = oracle.generate([row], Schedule(), max_new_tokens=3).rows[0]
    assert result.token_ids == unpruned.token_ids
    assert all(kept.tolist() == list(range(len(row.input_ids))) for kept in result.kept)


def test_rows_are_put_together_padded_on_the_right(oracles):
    folder, oracle = oracles("llava_next")
    rows = [
        processed(folder, "<image> " + QUESTION, make_picture())[1],
        processed(folder, QUESTION)[1],
        processed(folder, "count the <image> ?", make_picture(40, 90, seed=1))[1],
    ]
    batch = oracle.generate(rows, PRUNED, max_new_tokens=2).stages
    embed = batch["embed"]
    table = oracle.text.embed_tokens.weight.detach().numpy()
    words, features = table[embed.inputs["input_ids"]], embed.inputs["image_features"]
    newline = oracle.model.model.image_newline.detach().numpy()
    for b, row in enumerate(rows):
        source = np.concatenate([words[b], features, newline[None]])
        own = source[embed.inputs["source_index"][b]][: len(row.input_ids)]
        np.testing.assert_array_equal(own, embed.outputs["inputs_embeds"][b, : len(own)])
    select = batch["select_1"]
    assert select.inputs["lengths"].tolist() == [len(row.input_ids) for row in rows]
    assert select.inputs["width"].tolist() == [select.outputs["lengths_out"].max()]
    assert (select.outputs["keep_index"][1, len(rows[1].input_ids) :] == -1).all()
    step = batch["decode_1"]
    assert step.inputs["past.1.key"].shape == step.outputs["present.1.key"].shape
    assert step.inputs["past_lengths"].tolist() == select.outputs["lengths_out"].tolist()


def test_refuses_what_it_does_not_know(oracles):
    folder, oracle = oracles("llava")
    _, row = processed(folder, "<image> " + QUESTION, make_picture())
    other = Schedule((PruningPoint(1, 0.5, method="best"),))
    with pytest.raises(TrioError, match="best"):
        oracle.generate([row], other)
    with pytest.raises(TrioError, match="no picture"):
        oracle.generate([Row(row.input_ids)], PRUNED)
    with pytest.raises(TrioError, match="probe"):
        Oracle(oracle.model, probe="first")
