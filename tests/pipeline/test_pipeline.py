"""The whole way, picture to text, against transformers and the oracle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image
from tokenizers import Tokenizer

from tests.support.bundles import Bundles
from tests.support.checkpoints import EOS
from tests.support.pictures import make_picture
from tests.support.questions import COLOR, alike, ask
from trio_deploy import Batcher, Bundle, Pipeline, Request, RuntimeOptions, TrioError, export_model
from trio_deploy.bundle.describe import inspect
from trio_deploy.checkpoint.generation_config import read_sampling
from trio_deploy.pipeline.draw import draw_generation
from trio_deploy.pipeline.sampling import warp
from trio_deploy.runtimes.registry import complete_options
from trio_deploy.schedule.methods import METHODS

SCHEDULE = "1:0.4,2:0.2"


class Setup:
    """Bundles of the two fixture checkpoints, exported and opened once."""

    def __init__(self, folder: Path, checkpoints: dict[str, Path]) -> None:
        self.checkpoints = checkpoints
        self._folder = folder
        self._bundles: dict[tuple, Path] = {}
        self._pipelines: dict[tuple, Pipeline] = {}
        self._oracles: dict[tuple, Any] = {}

    def bundle(self, family: str, dialect: str = "ort", positions: str = "renumber") -> Path:
        key = (family, dialect, positions)
        if key not in self._bundles:
            out = self._folder / "-".join(key)
            export_model(
                self.checkpoints[family],
                out,
                schedule=SCHEDULE,
                dialect=dialect,
                positions=positions,
                progress=False,
            )
            self._bundles[key] = out
        return self._bundles[key]

    def pipeline(
        self,
        family: str = "llava_next",
        dialect: str = "ort",
        positions: str = "renumber",
        runtime: str = "onnxruntime",
    ) -> Pipeline:
        key = (family, dialect, positions, runtime)
        if key not in self._pipelines:
            bundle = self.bundle(family, dialect, positions)
            self._pipelines[key] = Pipeline.open(bundle, runtime=runtime, threads=1)
        return self._pipelines[key]

    def oracle(self, family: str, positions: str = "renumber") -> Any:
        from trio_deploy.reference.oracle import Oracle

        key = (family, positions)
        if key not in self._oracles:
            path = self.checkpoints[family]
            self._oracles[key] = Oracle.from_checkpoint(path, positions=positions)
        return self._oracles[key]


@pytest.fixture(scope="session")
def setup(
    tmp_path_factory: pytest.TempPathFactory, llava_checkpoint: Path, llava_next_checkpoint: Path
) -> Setup:
    folder = tmp_path_factory.mktemp("bundles")
    return Setup(folder, {"llava": llava_checkpoint, "llava_next": llava_next_checkpoint})


def inputs_of(checkpoint: Path, messages: list[dict], images: list[Image.Image]) -> Any:
    """What transformers' processor makes of a conversation."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=text, images=images or None, return_tensors="pt")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_unpruned_answers_are_those_of_transformers(setup: Setup, family: str, count: int) -> None:
    images = [make_picture(100, 60), make_picture(40, 90, seed=1)][:count]
    inputs = inputs_of(setup.checkpoints[family], ask(COLOR, count), images)
    model = setup.oracle(family).model
    prompt = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, prompt:].tolist()
    answer = setup.pipeline(family).generate(
        Request(ask(COLOR, count), images, max_new_tokens=12, budget=1.0)
    )
    assert answer.token_ids == expected
    assert answer.prompt_tokens == prompt
    assert "select_1" not in answer.timings, "nothing to prune, yet a selection ran"


SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "min_new_tokens": 12},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(10, 30)), "begin_suppress_tokens": [31, 35, 40]},
    {"bad_words_ids": [[each] for each in range(20, 40)] + [[41, 41], [42, 43]]},
    {"repetition_penalty": 2.0, "no_repeat_ngram_size": 3, "min_new_tokens": 12},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_penalties_and_bans_give_the_tokens_of_transformers(
    setup: Setup, settings: dict[str, Any]
) -> None:
    """With a picture: its visual tokens count as the image token's id, as in transformers."""
    image = make_picture(100, 60)
    inputs = inputs_of(setup.checkpoints["llava"], ask(COLOR, 1), [image])
    model = setup.oracle("llava").model
    prompt = inputs["input_ids"].shape[1]
    plain, expected = (
        model.generate(**inputs, do_sample=False, max_new_tokens=12, **each)[0, prompt:].tolist()
        for each in ({}, settings)
    )
    answer = setup.pipeline("llava").generate(
        Request(ask(COLOR, 1), image, max_new_tokens=12, budget=1.0, **settings)
    )
    assert answer.token_ids == expected != plain
    assert answer.sampling.to_json() == settings


def test_a_bundle_answers_as_its_checkpoints_generation_config_says(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    checkpoint = Path(shutil.copytree(llava_checkpoint, tmp_path / "checkpoint"))
    path = checkpoint / "generation_config.json"
    said = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | said | {"typical_p": 0.9}))
    bundle = export_model(checkpoint, tmp_path / "b", schedule="1:0.5")
    assert bundle.manifest.generation.sampling == said
    assert "generation_config.json asks for typical_p 0.9, which is not" in capsys.readouterr().err
    assert "greedy, repetition_penalty 1.3, no_repeat_ngram_size 2, min" in inspect(bundle)

    image = make_picture(100, 60)
    inputs = inputs_of(checkpoint, ask(COLOR, 1), [image])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    whole, plain = (
        model.generate(**inputs, max_new_tokens=12, **each)[0, inputs["input_ids"].shape[1] :]
        for each in ({}, {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0})
    )
    request = Request(ask(COLOR, 1), image, max_new_tokens=12, budget=1.0)
    neutral = replace(request, repetition_penalty=1.0, no_repeat_ngram_size=0)
    with_nothing = replace(request, bundle_sampling=False)
    pipeline = Pipeline.open(bundle)
    batch = [request, neutral, with_nothing]
    answers = pipeline.generate_batch(batch)
    assert answers[0].token_ids == whole.tolist() != plain.tolist()
    assert answers[1].token_ids == plain.tolist()
    assert answers[2].sampling.to_json() == {}
    with Batcher(pipeline, max_rows=3) as batcher:
        handles = [batcher.submit(each) for each in batch]
        assert [each.result().token_ids for each in handles] == [a.token_ids for a in answers]


def test_a_bundle_draws_from_what_its_checkpoint_draws_from(setup: Setup) -> None:
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05}
    image = make_picture(100, 60)
    inputs = inputs_of(setup.checkpoints["llava"], ask(COLOR, 1), [image])
    drawn = setup.oracle("llava").model.generate(
        **inputs, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **settings
    )
    pipeline = setup.pipeline("llava")
    sampling = read_sampling(settings)[0]
    generation = structs.replace(pipeline.bundle.manifest.generation, sampling=sampling.to_json())
    bundle = replace(
        pipeline.bundle, manifest=structs.replace(pipeline.bundle.manifest, generation=generation)
    )
    opened = Pipeline.open(bundle)
    requests = [
        Request(ask(COLOR, 1), image, max_new_tokens=1, budget=1.0, seed=seed) for seed in range(60)
    ]
    answers = opened.generate_batch(requests)
    possible = np.flatnonzero(np.isfinite(drawn.scores[0][0].numpy()))
    assert 1 < len(possible) < 12
    assert {answer.token_ids[0] for answer in answers} == set(possible.tolist())
    ours = warp(answers[0].first_logits.astype(np.float64), sampling)
    theirs = drawn.scores[0][0].numpy()
    assert np.allclose(ours[possible], (theirs - theirs.max())[possible], atol=1e-4)

    greedy = opened.generate_batch([replace(each, temperature=0.0) for each in requests[:4]])
    assert {each.token_ids[0] for each in greedy} == {int(theirs.argmax())}
    assert greedy[0].sampling.describe() == "greedy"


def test_bad_words_are_banned_after_a_space_and_without(setup: Setup) -> None:
    request = Request("what color ?", max_new_tokens=8, min_new_tokens=8)
    pipeline = setup.pipeline("llava")
    words = pipeline.generate(request).text.split()
    answer = pipeline.generate(replace(request, bad_words=[words[0], words[-1]]))
    assert not {words[0], words[-1]} & set(answer.text.split())
    assert [words[0]] != answer.text.split()[:1]
    nothing = pipeline.generate(replace(request, bad_words=[" "]))
    assert nothing.text.split() == words and nothing.sampling.bad_words_ids == ()
    both = pipeline.generate(replace(request, bad_words=[words[0]], bad_words_ids=[[8]]))
    assert [8] in both.sampling.to_json()["bad_words_ids"] and both.sampling.bad_words is None


def test_bad_words_of_a_request_join_those_of_the_bundle(setup: Setup) -> None:
    bundle = setup.pipeline("llava").bundle
    generation = structs.replace(
        bundle.manifest.generation, sampling={"bad_words_ids": [[8], [9, 10]]}
    )
    manifest = structs.replace(bundle.manifest, generation=generation)
    pipeline = Pipeline.open(replace(bundle, manifest=manifest))

    def banned(**options: Any) -> Any:
        request = Request("what color ?", max_new_tokens=1, **options)
        return pipeline.generate(request).sampling.to_json()["bad_words_ids"]

    own = [[8], [9, 10]]
    assert banned() == banned(bad_words=[]) == own
    joined = banned(bad_words=["red"])
    assert joined[:2] == own and len(joined) > 2
    assert banned(bad_words=["red"], bad_words_ids=[]) == joined[2:]
    assert banned(bad_words=["red"], bundle_sampling=False) == joined[2:]


ENGINES = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]


@pytest.mark.parametrize(("dialect", "runtime"), ENGINES)
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_pruned_answers_and_kept_tokens_are_those_of_the_oracle(
    setup: Setup, dialect: str, runtime: str, positions: str
) -> None:
    from trio_deploy.reference.oracle import Row

    if positions == "original" and dialect == "onnx":
        pytest.skip("covered by the other dialects")
    family = "llava_next"
    pipeline = setup.pipeline(family, dialect, positions, runtime)
    for seed, size in ((0, (100, 60)), (1, (40, 90))):
        image = make_picture(*size, seed=seed)
        inputs = inputs_of(setup.checkpoints[family], ask(COLOR), [image])
        row = Row(
            inputs["input_ids"][0].numpy(),
            inputs["pixel_values"][0].numpy(),
            [(image.height, image.width)],
        )
        oracle = setup.oracle(family, positions)
        expected = oracle.generate([row], pipeline.bundle.schedule, max_new_tokens=10).rows[0]
        answer = pipeline.generate(Request(ask(COLOR), [image], max_new_tokens=10))
        assert answer.token_ids == list(expected.token_ids)
        for ours, theirs in zip(answer.kept, expected.kept, strict=True):
            assert np.array_equal(ours, theirs)
        assert answer.keep_counts == list(pipeline.bundle.schedule.resolve(answer.visual_tokens))


def mixed(**common: Any) -> list[Request]:
    """Rows that differ in everything a row may differ in."""
    return [
        Request(ask(COLOR), [make_picture(60, 100, 3)], max_new_tokens=5, **common),
        Request("what is this ?", max_new_tokens=9, **common),
        Request(ask("count", 2), [make_picture(), make_picture(32, 32)], 7, budget=1.0, **common),
        Request(ask("see ."), [make_picture(90, 30, 5)], max_new_tokens=1, budget=0.5, **common),
    ]


@pytest.mark.parametrize(("dialect", "runtime"), ENGINES)
def test_a_row_of_a_batch_gives_what_it_gives_alone(
    setup: Setup, dialect: str, runtime: str
) -> None:
    pipeline = setup.pipeline(dialect=dialect, runtime=runtime)
    requests = mixed()
    for request, together in zip(requests, pipeline.generate_batch(requests), strict=True):
        assert alike(pipeline.generate_batch([request])[0], together)


def test_sampling_in_a_batch_repeats_single_runs_by_their_seeds(setup: Setup) -> None:
    pipeline = setup.pipeline()
    requests = mixed(temperature=1.0, top_p=0.9, seed=7)
    answers = pipeline.generate_batch(requests)
    for request, together in zip(requests, answers, strict=True):
        assert alike(pipeline.generate_batch([request])[0], together)
    other = pipeline.generate_batch(mixed(temperature=1.0, top_p=0.9, seed=8))
    assert [a.token_ids for a in answers] != [a.token_ids for a in other]


def test_a_budget_of_a_request_changes_what_is_kept_and_nothing_else(setup: Setup) -> None:
    pipeline, image = setup.pipeline(), make_picture()
    answers = [
        pipeline.generate(Request(ask(COLOR), [image], max_new_tokens=4, budget=budget))
        for budget in (0.35, 0.6, 1.0)
    ]
    counts = [answer.keep_counts for answer in answers]
    assert counts[0] < counts[1] < counts[2] == [answers[0].visual_tokens] * 2
    for answer in answers:
        text = answer.prompt_tokens - answer.visual_tokens
        assert [tokens for *_, tokens in answer.layer_ranges] == [
            text + visual for visual in (answer.visual_tokens, *answer.keep_counts)
        ]
    assert answers[0].kv_bytes < answers[1].kv_bytes < answers[2].kv_bytes
    with pytest.raises(TrioError, match="budget"):
        pipeline.generate(Request(ask(COLOR), [image], budget=0.01))


def test_the_cache_is_as_large_as_prompt_and_answer_in_each_segment(setup: Setup) -> None:
    answer = setup.pipeline().generate(
        Request(ask(COLOR), [make_picture()], max_new_tokens=6, stop=["~"])
    )
    text = setup.pipeline().bundle.config.text
    token = 2 * text.num_kv_heads * text.head_dim * 4
    capacity = sum((stop - start) * (tokens + 6) for start, stop, tokens in answer.layer_ranges)
    assert answer.kv_bytes_allocated == token * capacity
    # The last token is never fed back, so it takes no place.
    fed = len(answer.token_ids) - 1
    used = sum((stop - start) * (tokens + fed) for start, stop, tokens in answer.layer_ranges)
    assert answer.kv_bytes == token * used


def test_text_streams_in_pieces_that_join_to_the_answer(setup: Setup) -> None:
    request = Request(ask(COLOR), make_picture(), max_new_tokens=12)
    stream = setup.pipeline().stream(request)
    pieces = list(stream)
    answer = stream.generation
    assert "".join(pieces) == answer.text and len(pieces) > 1 and all(pieces)
    assert alike(answer, setup.pipeline().generate(request))
    assert answer.first_token_s > 0 and answer.tokens_per_s > 0
    stages = ["preprocess", "vision", "embed", "prefill_0", "select_1", "prefill_1", "select_2"]
    assert list(answer.timings) == [*stages, "prefill_2", "decode"]


def test_a_stop_string_ends_the_answer_and_is_left_out(setup: Setup) -> None:
    pipeline, image = setup.pipeline(), make_picture()
    whole = pipeline.generate(Request(ask(COLOR), [image], max_new_tokens=12))
    assert whole.finish_reason == "length" and len(whole.token_ids) == 12
    words = whole.text.split(" ")
    stop = " ".join(words[3:5])
    stream = pipeline.stream(Request(ask(COLOR), [image], max_new_tokens=12, stop=stop))
    pieces, answer = list(stream), stream.generation
    assert answer.finish_reason == "stop"
    assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert len(answer.token_ids) < len(whole.token_ids)


def test_end_tokens_stop_the_answer_and_are_not_shown(setup: Setup) -> None:
    pipeline, image = setup.pipeline(), make_picture()
    whole = pipeline.generate(Request(ask(COLOR), [image], max_new_tokens=12)).token_ids
    end = whole[4]
    bundle, tokenizer = pipeline.bundle, Tokenizer.from_file(str(pipeline.bundle.tokenizer_path))
    ending = Pipeline.open(bundle.with_end_tokens([EOS, end]), threads=1)
    answer = ending.generate(Request(ask(COLOR), [image], max_new_tokens=12))
    assert answer.token_ids == whole[: whole.index(end) + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == tokenizer.decode(answer.token_ids[:-1], skip_special_tokens=True)


def test_prompts_and_answers_stay_inside_the_models_context(setup: Setup) -> None:
    pipeline = setup.pipeline("llava")
    context = pipeline.bundle.config.text.max_positions
    words = context - 16 - 10
    answer = pipeline.generate(Request(ask("a " * words), [make_picture()], max_new_tokens=100))
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == context
    with pytest.raises(TrioError, match=rf"{context + 90} tokens \(16 of them visual.*{context}"):
        missing = context + 90 - answer.prompt_tokens
        pipeline.generate(Request(ask("a " * (words + missing)), [make_picture()]))


def test_a_prompt_beyond_the_context_is_refused_before_its_pictures_are_decoded(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = setup.pipeline("llava")
    context = pipeline.bundle.config.text.max_positions
    make_picture().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()

    def decode(*given: object) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(pipeline._preparer._preprocessor, "open_image", decode)
    for picture in (content, tmp_path / "a.png", make_picture()):
        with pytest.raises(TrioError, match=f"of them visual.*context is {context}"):
            pipeline.generate(Request(ask("what ?", context // 16), [picture] * (context // 16)))
        with pytest.raises(TrioError, match=f"context is {context}"):
            pipeline.generate(Request(ask("what is " * context), [picture]))
        with pytest.raises(AssertionError, match="decoded"):
            pipeline.generate(Request(ask("what ?"), [picture]))


def test_what_is_no_request_is_named(setup: Setup) -> None:
    with pytest.raises(TrioError, match="a request must be a Request, got str"):
        setup.pipeline().generate("what ?")  # type: ignore[arg-type]
    with pytest.raises(TrioError, match="max_new_tokens must be a whole number, got '5'"):
        setup.pipeline().generate(Request("what ?", max_new_tokens="5"))  # type: ignore[arg-type]


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"images": [], "prompt": ask("what ?")}, "1 image placeholder.*0 image"),
    ({"images": [make_picture()] * 2, "prompt": ask("what ?")}, "1 image placeholder.*2 image"),
    ({"images": [make_picture()], "prompt": "what <image> ?"}, "placeholder"),
    ({"images": [b"no picture"], "prompt": ask("what ?")}, "image"),
    ({"images": ["no-such-file.png"], "prompt": ask("what ?")}, "no-such-file.png"),
    ({"prompt": "what ?", "max_new_tokens": 0}, "max_new_tokens"),
    ({"prompt": "what ?", "temperature": -1.0}, "temperature"),
    ({"prompt": "what ?", "suppress_tokens": [10**6]}, "suppress_tokens has the token 1000000"),
    ({"prompt": "what ?", "min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
    ({"prompt": "what ?", "stop": [""]}, "stop string"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS)
def test_bad_requests_are_one_clear_error(
    setup: Setup, request_: dict[str, Any], message: str
) -> None:
    pipeline = setup.pipeline()
    with pytest.raises(TrioError, match=message):
        pipeline.generate(Request(**request_))
    with pytest.raises(TrioError, match=message):
        next(pipeline.stream(Request(**request_)))
    with pytest.raises(TrioError, match="^request 1: "):
        pipeline.generate_batch([Request("what ?", max_new_tokens=1), Request(**request_)])


def test_a_selection_that_did_not_settle_is_an_error(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = setup.pipeline()
    engine = pipeline.engine("select_2")
    run = engine.run
    unsettled = {"converged": np.array([True, False])}
    monkeypatch.setattr(engine, "run", lambda feeds, **options: run(feeds, **options) | unsettled)
    with pytest.raises(TrioError, match="select_2 found no set of tokens for row 1"):
        pipeline.generate_batch([Request(ask(COLOR), [make_picture()])] * 2)


def test_a_selection_without_any_spread_is_said_aloud(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it keeps depends on the tokens' order; rows that keep all or none lose nothing by it."""
    pipeline = setup.pipeline()
    engine = pipeline.engine("select_2")
    run = engine.run

    def flat(feeds: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        out = run(feeds, **options)
        return out | {"saliency": np.full_like(out["saliency"], 0.5) * feeds["visual_mask"]}

    requests = [
        Request(ask(COLOR), make_picture(), max_new_tokens=1, keep=keep)
        for keep in ((0.5, 0.2), (8, 8), (8, 0))
    ]
    requests.append(Request("what ?", max_new_tokens=1))  # no visual tokens
    sound = pipeline.generate_batch(requests)
    assert not any("the same score" in text for each in sound for text in each.warnings)
    monkeypatch.setattr(engine, "run", flat)
    broken = pipeline.generate_batch(requests)
    said = [[text for text in each.warnings if "the same score" in text] for each in broken]
    assert [len(each) for each in said] == [1, 0, 0, 0]
    assert said[0][0].startswith("select_2 gave all ") and "trio check" in said[0][0]


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_every_method_tell_tokens_apart(bundles: Bundles, method: str) -> None:
    path = bundles.path("tiny", schedule=f"0:0.5:{method},6:0.1:{method}")
    answer = Pipeline.open(path, threads=1).generate(Request(ask(COLOR), make_picture()))
    assert not any("the same score" in text for text in answer.warnings)


def test_no_requests_are_no_answers(setup: Setup) -> None:
    assert setup.pipeline().generate_batch([]) == []


def test_low_memory_gives_the_same_answer(setup: Setup) -> None:
    low = Pipeline.open(setup.bundle("llava_next"), threads=1, low_memory=True)
    request = Request(ask(COLOR), make_picture(), max_new_tokens=6)
    expected = setup.pipeline().generate(request)
    assert low.generate(request).token_ids == expected.token_ids


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_caches_in_memory_of_the_engines_own_give_the_same_answer(
    setup: Setup, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they cannot be sliced; here ONNX Runtime's own values stand in for its memory."""
    from trio_deploy.runtimes.onnxruntime import OrtEngine

    request = Request(ask(COLOR), make_picture(), max_new_tokens=6)
    expected = setup.pipeline(dialect=dialect).generate(request)

    def empty(engine: OrtEngine, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return engine._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, "cpu", 0)

    monkeypatch.setattr(OrtEngine, "empty", empty)
    answer = setup.pipeline(dialect=dialect).generate(request)
    assert alike(answer, expected)


def test_a_bundle_without_a_chat_template_takes_the_whole_prompt(
    setup: Setup, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(setup.bundle("llava"), folder)
    bundle = Bundle.load(folder)
    del bundle.manifest.files["chat_template.jinja"]
    pipeline = Pipeline.open(bundle, threads=1)
    image, template = make_picture(), setup.pipeline("llava")
    written = pipeline.generate(
        Request(f"USER: <image>\n{COLOR} ASSISTANT:", [image], max_new_tokens=5)
    )
    expected = template.generate(Request(ask(COLOR), [image], max_new_tokens=5))
    assert written.token_ids == expected.token_ids
    raw = template.generate(
        Request(f"USER: <image>\n{COLOR} ASSISTANT:", [image], max_new_tokens=5, raw=True)
    )
    assert raw.token_ids == expected.token_ids
    with pytest.raises(TrioError, match="no chat template"):
        pipeline.generate(Request(ask(COLOR), [image]))


def test_the_picture_dims_what_was_dropped(setup: Setup) -> None:
    white = Image.new("RGB", (100, 60), "white")
    answer = setup.pipeline().generate(Request(ask(COLOR, 2), [white, white], max_new_tokens=1))
    assert sum(len(tokens) for tokens in answer.kept_of_image(0)) > 0
    panels = 1 + len(answer.kept)
    pixels = np.asarray(draw_generation(answer).convert("L"))
    # Two rows of panels, each as wide as the picture is enlarged to.
    strip = pixels[: pixels.shape[0] // 2, : panels * 344]
    lit = [(strip[8:200, 8 + 344 * i : 344 * (i + 1)] > 200).mean() for i in range(panels)]
    assert lit[0] > 0.99 > lit[1] > lit[2] > 0
    with pytest.raises(TrioError, match="no image"):
        draw_generation(setup.pipeline().generate(Request("what ?", max_new_tokens=1)))


def test_a_bfloat16_bundle_runs_on_openvino_and_is_refused_by_onnx_runtime(
    setup: Setup, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    checkpoint = setup.checkpoints["llava"]
    kwargs: dict[str, Any] = {"schedule": SCHEDULE, "dialect": "primitive", "progress": False}
    export_model(checkpoint, out, dtype="bfloat16", target="cpu-openvino", **kwargs)
    pipeline = Pipeline.open(out, threads=1)
    assert pipeline.precision == "bfloat16"
    image = make_picture()
    answer = pipeline.generate(Request(COLOR, [image], max_new_tokens=3))
    assert len(answer.token_ids) >= 1
    (layout,) = pipeline.prepare(Request(COLOR, [image])).processed
    pixels = layout.feeds["pixel_values"]
    whole = setup.pipeline("llava", "primitive", runtime="openvino").engine("vision")
    expected = whole.run({"pixel_values": pixels})["image_features"]
    engine = pipeline.engine("vision")
    rounded = pixels.astype(engine.inputs["pixel_values"].dtype)
    features = engine.run({"pixel_values": rounded})["image_features"].astype(np.float32)
    assert np.abs(features - expected).max() < 0.03 * np.abs(expected).max()
    with pytest.raises(TrioError, match="ONNX Runtime cannot run bfloat16 graphs: .*cpu-openvino"):
        Pipeline.open(out, runtime="onnxruntime")


def test_a_target_of_ones_own_is_carried_by_the_bundle(setup: Setup, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text(
        "runtime: openvino\ndialect: primitive\ndtype: float32\nprecision: bfloat16\n"
    )
    out = tmp_path / "bundle"
    export_model(setup.checkpoints["llava"], out, schedule=SCHEDULE, target=target, progress=False)
    target.unlink()
    bundle = Bundle.load(out)
    assert (bundle.manifest.runtime, bundle.manifest.precision) == ("openvino", "bfloat16")
    chosen = complete_options(bundle, RuntimeOptions(threads=3))
    assert chosen == RuntimeOptions(runtime="openvino", precision="bfloat16", threads=3)
    chosen = complete_options(bundle, RuntimeOptions(runtime="onnxruntime"))
    assert chosen == RuntimeOptions(runtime="onnxruntime")
    chosen = complete_options(bundle, RuntimeOptions(target="cpu-openvino"))
    assert (chosen.runtime, chosen.precision) == ("openvino", "float32")


def test_a_bundle_for_cuda_asks_for_a_gpu_unless_told_otherwise(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    checkpoint = setup.checkpoints["llava"]
    bundle = export_model(
        checkpoint, tmp_path / "b", schedule=SCHEDULE, target="cuda", progress=False
    )
    manifest = bundle.manifest
    assert (manifest.runtime, manifest.provider) == ("onnxruntime", "cuda")
    assert (manifest.dialect, manifest.dtype) == ("ort", "float16")
    chosen = complete_options(bundle, RuntimeOptions())
    assert chosen == RuntimeOptions(runtime="onnxruntime", provider="cuda")
    with pytest.raises(TrioError, match=r"no CUDAExecutionProvider.*\[gpu\].*--provider cpu"):
        Pipeline.open(bundle)
    on_cpu = Pipeline.open(bundle, provider="cpu", threads=1)
    assert on_cpu.generate(Request(COLOR, [make_picture()], max_new_tokens=2)).token_ids


def test_a_picture_that_requests_share_is_seen_once(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = setup.pipeline()
    one, other = make_picture(100, 60), make_picture(40, 90, seed=1)
    questions = [Request(ask(COLOR), [image], max_new_tokens=4) for image in (one, other, one)]
    alone = [pipeline.generate_batch([question])[0] for question in questions]
    engine, tiles = pipeline.engine("vision"), []
    run = engine.run

    def counting(feeds: dict[str, Any], into: Any = None, **options: Any) -> dict[str, Any]:
        tiles.append(len(feeds["pixel_values"]))
        return run(feeds, into, **options)

    monkeypatch.setattr(engine, "run", counting)
    together = pipeline.generate_batch(questions)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert sum(tiles) == sum(len(a.processed[0].feeds["pixel_values"]) for a in alone[:2])


def test_forced_tokens_are_given_back_with_their_probabilities(setup: Setup) -> None:
    pipeline, image = setup.pipeline(), make_picture()
    free = pipeline.generate(Request(ask(COLOR), [image], max_new_tokens=4))
    forced, changed = pipeline.generate_batch(
        [
            Request(ask(COLOR), [image], forced=free.token_ids),
            Request(ask(COLOR), [image], forced=[*free.token_ids[:2], 7]),
        ]
    )
    assert forced.token_ids == free.token_ids and all(forced.greedy)
    assert changed.logprobs[:2] == pytest.approx(forced.logprobs[:2], rel=1e-4)
    first = free.first_logits
    assert first is not None and int(first.argmax()) == free.token_ids[0]
    expected = first[free.token_ids[0]] - np.log(np.exp(first.astype(np.float64)).sum())
    assert forced.logprobs[0] == pytest.approx(expected, rel=1e-4)
    context = pipeline.bundle.config.text.max_positions
    with pytest.raises(TrioError, match="force fewer"):
        pipeline.generate_batch([Request(ask(COLOR), [image], forced=[5] * context)])


def test_a_request_may_say_what_to_keep_at_each_point(setup: Setup) -> None:
    pipeline, image = setup.pipeline(), make_picture()
    own, other = pipeline.generate_batch(
        [
            Request(ask(COLOR), [image], max_new_tokens=3),
            Request(ask(COLOR), [image], max_new_tokens=3, keep=(0.5, 0.1)),
        ]
    )
    assert other.keep_counts[0] == int(0.5 * other.visual_tokens + 0.5) > own.keep_counts[0]
    assert other.keep_counts[1] == int(0.1 * other.visual_tokens + 0.5) < own.keep_counts[1]
    for wrong in ({"keep": (0.5,)}, {"keep": (0.5, 0.2), "budget": 0.5}, {"keep": (0.2, 0.5)}):
        with pytest.raises(TrioError):
            pipeline.generate_batch([Request(ask(COLOR), [image], **wrong)])
