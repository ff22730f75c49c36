"""The shipped weights: small, loadable by transformers as they are, and able to see."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import Bundles
from trio_deploy import Generation, Pipeline, Request
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.evaluation import scenes

FOLDER = Path(__file__).parents[1] / "trio_deploy" / "data" / "tiny"

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def parts() -> tuple:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    return transformers.AutoProcessor.from_pretrained(FOLDER, backend="pil"), model.eval()


def test_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 10_000_000


def test_shape_of_the_model(parts: tuple) -> None:
    processor, model = parts
    assert 12 <= model.config.text_config.num_hidden_layers <= 16
    assert all(torch.isfinite(p).all() for p in model.parameters())
    feeds = processor(
        images=scenes.generate(0).image,
        text="USER: <image>\nwhat color is the star? ASSISTANT:",
        return_tensors="pt",
    )
    ids = feeds["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) >= 256
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.unk_token_id not in ids


def test_template_gives_the_prompt_it_was_trained_on(parts: tuple) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what color is the star?"}]
    prompt = parts[0].apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == "USER: <image>\nwhat color is the star? ASSISTANT:"


def test_answers_held_out_scenes(parts: tuple) -> None:
    processor, model = parts
    right, kinds = [], set()
    for seed in scenes.TEST_SEEDS[5000:5003]:
        scene = scenes.generate(seed)
        prompts = [f"USER: <image>\n{q.text} ASSISTANT:" for q in scene.questions]
        feeds = processor(
            images=[scene.image] * len(prompts), text=prompts, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(**feeds, do_sample=False)
        said = processor.batch_decode(
            out[:, feeds["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += [a == q.answer for a, q in zip(said, scene.questions, strict=True)]
        kinds |= {q.kind for q in scene.questions}
    assert kinds == set(scenes.KINDS)
    assert math.fsum(right) / len(right) >= 0.9


def test_a_budget_of_the_recipe_is_the_same_exported_or_asked_for(bundles: Bundles) -> None:
    scene = scenes.generate(scenes.TEST_SEEDS[6000])
    questions = [question.text for question in scene.questions[:4]]

    def answers(exported: float, asked: float | None) -> list[Generation]:
        pipeline = Pipeline.open(bundles.path("tiny", budget=exported), threads=1)
        return pipeline.generate_batch(
            [Request(question, [scene.image], budget=asked) for question in questions]
        )

    for budget in (0.111, 0.222):
        plain, asked = answers(budget, None), answers(0.111, budget)
        for ours, theirs in zip(asked, plain, strict=True):
            assert (ours.text, ours.keep_counts) == (theirs.text, theirs.keep_counts)
            assert all(map(np.array_equal, ours.kept, theirs.kept))
            assert ours.schedule == theirs.schedule == load_recipe("tiny").schedules[f"{budget}"]


def test_every_kind_reaches_its_bound_unpruned_through_the_runtime(bundles: Bundles) -> None:
    bounds = dict.fromkeys(("color", "shape", "exists", "count"), 0.95) | {
        "digit": 0.90,
        "plate": 0.80,
    }
    pipeline = Pipeline.open(bundles.path("tiny"), threads=1)
    right: dict[str, list[bool]] = {kind: [] for kind in scenes.KINDS}
    for seed in scenes.TEST_SEEDS[6000:6015]:
        scene = scenes.generate(seed)
        answers = pipeline.generate_batch(
            [Request(q.text, [scene.image], budget=1.0) for q in scene.questions]
        )
        for question, answer in zip(scene.questions, answers, strict=True):
            right[question.kind].append(answer.text.strip() == question.answer)
    for kind, bound in bounds.items():
        assert len(right[kind]) >= 10
        assert sum(right[kind]) / len(right[kind]) >= bound, kind


def test_the_readmes_follow_up_question_is_answered_rightly(bundles: Bundles) -> None:
    pipeline = Pipeline.open(bundles.path("tiny", budget=0.111), threads=1)
    picture = Path(__file__).parents[1] / "examples" / "scene.png"
    question = {"type": "text", "text": "what color is the circle?"}
    asked = [{"role": "user", "content": [{"type": "image"}, question]}]
    answer = pipeline.generate(Request(asked, picture))
    assert answer.text == "white"
    follow_up = [
        *asked,
        {"role": "assistant", "content": [{"type": "text", "text": answer.text}]},
        {"role": "user", "content": [{"type": "text", "text": "where is the circle?"}]},
    ]
    assert pipeline.generate(Request(follow_up, picture)).text == "top right"
