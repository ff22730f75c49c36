"""The shipped weights: small, loadable by transformers as they are, and able to see."""

import math
from pathlib import Path

import pytest

from trio_deploy.evaluate import scenes

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
