"""The whole way, picture to text, of the Qwen families against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import GenerationConfig

from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from tests.support.pieces import equal, of, ran
from tests.support.questions import alike
from tests.support.qwen_checkpoints import make_processor, shared_checkpoint
from tests.support.qwen_models import FAMILIES, shared_model
from tests.support.tensors import file
from trio_deploy import Batcher, Bundle, Pipeline, Request, RuntimeOptions, TrioError, export_model
from trio_deploy.families.registry import request_limits
from trio_deploy.families.rope import grid_positions

ENGINES = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]
SCHEDULE = "1:0.5,3:0.25"
ENCODER = "0:0.6:divprune,2:0.25"
CASES = [(family, *engine, SCHEDULE) for family in FAMILIES for engine in ENGINES]
#: What is dropped before the first layer takes no features of deepstack with it.
CASES += [("qwen3_vl", *engine, ENCODER) for engine in ENGINES]

#: Sizes of the pictures of a conversation, and what stands between and around them.
PROMPTS: list[list[Any]] = [
    ["what color is the star ?"],
    [(200, 130), "what color is the star ?"],
    ["what is in this picture ?", (40, 300)],
    [(28, 28), (90, 120), "and", (90, 120), "count the red ones"],
]


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path):
    def of(family: str) -> Path:
        return shared_checkpoint(run_folder, family)

    return of


@pytest.fixture(scope="module")
def opened(bundles: Bundles, checkpoint):
    found: dict[tuple[str, ...], Pipeline] = {}

    def of(
        family: str, dialect: str = "ort", runtime: str = "onnxruntime", schedule: str = SCHEDULE
    ) -> Pipeline:
        key = (family, dialect, runtime, schedule)
        if key not in found:
            path = bundles.path(checkpoint(family), schedule=schedule, dialect=dialect)
            bundle = Bundle.load(path).with_end_tokens([])
            found[key] = Pipeline.open(bundle, runtime=runtime, threads=1)
        return found[key]

    return of


def ask(parts: list[Any], new: int = 8, **options: Any) -> Request:
    """A request of texts and of pictures of some sizes."""
    images = [make_picture(*part, n) for n, part in enumerate(parts) if isinstance(part, tuple)]
    content = [
        {"type": "image"} if isinstance(part, tuple) else {"type": "text", "text": part}
        for part in parts
    ]
    return Request([{"role": "user", "content": content}], images, new, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_in_pieces_gives_what_the_whole_gives_to_the_last_bit(opened, family: str):
    """Pieces take their part of the positions and of what is added behind layers."""
    pipeline = opened(family)
    for prompt in PROMPTS:
        expected, stages = ran(pipeline, [ask(prompt)])
        got, pieces = ran(pipeline, [ask(prompt)], of(9))
        assert len(pieces) > len(stages) and equal(got, expected)


def inputs_of(family: str, request: Request) -> dict[str, Any]:
    """A request as transformers' processors make it."""
    processor, text = make_processor(family), request.prompt
    if not isinstance(text, str):
        text = processor.apply_chat_template(text, add_generation_prompt=True)
    inputs = processor(text=[text], images=list(request.images) or None, return_tensors="pt")
    return dict(inputs)


@pytest.mark.parametrize(("dialect", "runtime"), ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_answers_and_logits_equal_transformers(opened, family, dialect, runtime):
    model, greedy = shared_model(family), GenerationConfig(max_new_tokens=8, pad_token_id=3)
    pipeline = opened(family, dialect, runtime)
    for parts in PROMPTS:
        request = ask(parts, budget=1.0)
        inputs = inputs_of(family, request)
        length = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, generation_config=greedy)[0, length:]
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].numpy()
        answer = pipeline.generate(request)
        assert answer.prompt_tokens == length
        assert answer.token_ids == expected.tolist()
        assert np.abs(answer.first_logits - logits).max() < 1e-5 * np.abs(logits).max()


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_prompts_are_tokenised_as_by_transformers(opened, family):
    """As they are where they name pictures, else with the pictures in front as templates write."""
    pipeline = opened(family)
    pictures = [make_picture(200, 130), make_picture(40, 300, 1)]
    for written, meant, warnings in (
        ("what is this ?", f"{PICTURE}{PICTURE}what is this ?", 0),
        (f"what {PICTURE} is {PICTURE} this ?", f"what {PICTURE} is {PICTURE} this ?", 0),
        (f"what <|image_pad|> is {PICTURE} ?", f"what <|image_pad|> is {PICTURE} ?", 1),
    ):
        ours = pipeline.prepare(Request(written, pictures, raw=True))
        theirs = inputs_of(family, Request(meant, pictures))
        assert ours.prompt.ids.tolist() == theirs["input_ids"][0].tolist()
        assert [PICTURE in warning for warning in ours.warnings] == [True] * warnings
        expected, _ = shared_model(family).model.get_rope_index(
            theirs["input_ids"],
            mm_token_type_ids=theirs["mm_token_type_ids"],
            image_grid_thw=theirs["image_grid_thw"],
        )
        np.testing.assert_array_equal(ours.prompt.positions, expected[:, 0])


@pytest.mark.parametrize(("family", "dialect", "runtime", "schedule"), CASES)
def test_a_row_of_a_batch_gives_what_it_gives_alone(opened, family, dialect, runtime, schedule):
    pipeline = opened(family, dialect, runtime, schedule)
    budgets = (None, 1.0, None, 0.6)
    requests = [ask(parts, new=3 + 2 * n, budget=budgets[n]) for n, parts in enumerate(PROMPTS)]
    for request, together in zip(requests, pipeline.generate_batch(requests), strict=True):
        assert alike(pipeline.generate(request), together)


@pytest.mark.parametrize(("family", "dialect", "runtime", "schedule"), CASES)
def test_requests_that_come_and_go_give_what_they_give_alone(
    opened, family, dialect, runtime, schedule
):
    pipeline = opened(family, dialect, runtime, schedule)
    requests = [ask(PROMPTS[n % 4], new=2 + n) for n in range(6)]
    with Batcher(pipeline, max_rows=3) as batcher:
        answers = [each.result(timeout=300) for each in [batcher.submit(r) for r in requests]]
    for request, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == pipeline.generate(request).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_keep_their_three_positions(opened, family):
    """A picture takes as many positions as its longer side, so there are fewer than tokens."""
    pipeline = opened(family)
    answer = pipeline.generate(ask(PROMPTS[3]))
    assert answer.keep_counts == list(pipeline.bundle.schedule.resolve(answer.visual_tokens))
    layout = [grid for picture in answer.processed for grid in picture.grids]
    prompt = pipeline.prepare(ask(PROMPTS[3])).prompt
    np.testing.assert_array_equal(prompt.positions, grid_positions(prompt.visual, layout))
    assert prompt.next_position < prompt.length


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_one_size_share_a_run_of_the_tower_and_others_have_their_own(
    opened, monkeypatch, family
):
    pipeline = opened(family)
    stages = pipeline._stages
    engine, runs = stages.engines["vision"], []
    run = engine.run

    def counted(feeds, *args, **options):
        runs.append(feeds["pixel_values"].shape[:2])
        return run(feeds, *args, **options)

    monkeypatch.setattr(engine, "run", counted)
    together = pipeline.generate(ask(PROMPTS[3]))
    layouts = together.processed
    assert sorted(runs) == sorted([(1, len(layouts[0].rows) * 4), (2, len(layouts[1].rows) * 4)])
    runs.clear()
    monkeypatch.setattr(stages, "_rows_at_once", 1)
    assert alike(pipeline.generate(ask(PROMPTS[3])), together)
    assert [tiles for tiles, _ in runs] == [1, 1, 1]


def test_small_pictures_share_a_run_where_the_largest_fills_one(checkpoint, tmp_path, monkeypatch):
    """At a recipe's bounds; an engine that is built for fewer pictures takes fewer."""
    out = tmp_path / "bundle"
    export_model(
        checkpoint("qwen2_vl"), out, schedule="2:0.5", max_pixels=1280 * 28**2, progress=False
    )
    pipeline = Pipeline.open(out, RuntimeOptions(threads=1))
    stages, runs = pipeline._stages, []
    assert request_limits(pipeline.bundle.config).tiles_at_once == 1
    engine = stages.engines["vision"]
    run = engine.run

    def counted(feeds, *args, **options):
        runs.append(feeds["pixel_values"].shape[:2])
        return run(feeds, *args, **options)

    monkeypatch.setattr(engine, "run", counted)
    request = ask([*[(90, 120)] * 3, (56, 56), (90, 120), "what is this ?"])
    together = pipeline.generate(request)
    assert sorted(runs) == [(1, 16), (4, 48)]
    runs.clear()
    spec = engine.inputs["pixel_values"]
    monkeypatch.setitem(engine.inputs, "pixel_values", replace(spec, most=(3, 48, spec.shape[2])))
    assert alike(pipeline.generate(request), together)
    assert sorted(runs) == [(1, 16), (1, 48), (3, 48)]
    runs.clear()
    monkeypatch.setattr(stages, "_rows_at_once", 2 * 12)
    assert alike(pipeline.generate(request), together)
    assert sorted(runs) == [(1, 16), (2, 48), (2, 48)]


@pytest.mark.parametrize("schedule", [SCHEDULE, ENCODER])
def test_follow_ups_about_pictures_of_several_sizes_are_answered_as_without_the_cache(
    opened, schedule
):
    """Features that are added behind decoder layers are held, too, each with its picture."""
    pipeline = opened("qwen3_vl", schedule=schedule)
    files = {size: file(*size) for size in ((28, 28), (90, 120), (300, 40))}
    orders = ([(90, 120)], [(28, 28), (90, 120), (300, 40)], [(300, 40), (28, 28), (300, 40)], [])

    def asked(sizes: list[tuple[int, int]]) -> Request:
        content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "what is it ?"}]
        pictures = [files[size] for size in sizes]
        return Request([{"role": "user", "content": content}], pictures, 4)

    alone = [pipeline.generate(asked(sizes)) for sizes in orders]
    pipeline.cache_features(2**24)
    try:
        follow_ups = [pipeline.generate(asked(sizes)) for sizes in orders]
        together = pipeline.generate_batch([asked(sizes) for sizes in orders])
        assert pipeline.feature_counts.misses == len(files)
    finally:
        pipeline.cache_features(0)
    for one, other, third in zip(alone, follow_ups, together, strict=True):
        assert alike(one, other) and alike(one, third)


def test_what_has_no_meaning_is_refused_at_export(checkpoint, tmp_path):
    for options, says in (
        ({"schedule": "0:0.5:cls-attention"}, "class token"),
        ({"schedule": "0:0.5", "method": "vscan"}, "class token"),
        ({"schedule": "2:0.5", "positions": "renumber"}, "'renumber' have no meaning"),
        ({"schedule": "2:0.5", "max_pixels": 10}, "at most 10"),
    ):
        with pytest.raises(TrioError, match=says):
            export_model(checkpoint("qwen2_vl"), tmp_path / "bundle", progress=False, **options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("dialect", "target", "blocks"),
    [
        ("ort", "cpu", False),  # its own operator needs no loop
        ("onnx", "cpu", True),
        ("primitive", "cpu", True),
        ("primitive", "cpu-openvino", False),
        ("primitive", "jetson-orin-nano-8gb", False),
        ("onnx", "h200", False),
    ],
)
def test_towers_attend_in_blocks_of_queries_on_runtimes_that_hold_all_scores(
    checkpoint, tmp_path, dialect, target, blocks
):
    """Where attention is fused the graph is the plain one, which fusing needs."""
    bundle = export_model(
        checkpoint("qwen2_5_vl"),
        tmp_path / "bundle",
        schedule="2:0.5",
        dialect=dialect,
        target=target,
        dtype="float16" if target in ("h200", "jetson-orin-nano-8gb") else "float32",
        graphs_only=True,
        progress=False,
    )
    graph = onnx.load(bundle.graph("vision"), load_external_data=False).graph
    full = len(bundle.config.patch_tower.full_layers)  # windows are short
    assert [node.op_type for node in graph.node].count("Loop") == full * blocks


def test_graphs_for_another_runtime_refuse_pictures_whose_scores_take_too_much(
    bundles, checkpoint, monkeypatch
):
    """A graph for OpenVINO, which fuses attention, holds all scores on ONNX Runtime."""
    path = bundles.path(
        checkpoint("qwen2_vl"), schedule=SCHEDULE, dialect="primitive", target="cpu-openvino"
    )
    monkeypatch.setattr("trio_deploy.pipeline.prefill._MOST_SCORES", 4 * 2 * 48**2)
    small, large = ([size, "what is this ?"] for size in ((90, 120), (200, 130)))
    elsewhere = Pipeline.open(path, runtime="onnxruntime", threads=1)
    elsewhere.generate(ask(small, 1))
    with pytest.raises(TrioError, match="140 patches takes .* made for another runtime: export"):
        elsewhere.generate(ask(large, 1))
    Pipeline.open(path, threads=1).generate(ask(large, 1))


def test_the_most_pixels_of_an_export_bound_its_pictures(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    bundle = export_model(
        checkpoint("qwen3_vl"), out, schedule="2:0.5", max_pixels=8 * 1024, progress=False
    )
    assert bundle.config.pixels == (4096, 8192)
    with_runtime = RuntimeOptions(threads=1)
    answer = Pipeline.open(out, with_runtime).generate(ask([(400, 300), "what is this ?"]))
    assert answer.visual_tokens == 6
