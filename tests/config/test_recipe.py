"""Recipes and targets: the shipped ones are sound, wrong ones are named to the key."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2
import pytest
import yaml

from tests.support.checkpoints import make_llava
from trio_deploy import Schedule, TrioError, plan
from trio_deploy.checkpoint.resolve import Source as FoundModel
from trio_deploy.checkpoint.resolve import load_recipe, recipe_for, source_config
from trio_deploy.config.options import ExportOptions, SelectionOptions
from trio_deploy.config.recipe import (
    list_recipes,
    read_schedule,
    recipe_folder,
    with_schedule_file,
)
from trio_deploy.evaluation.configurations import Source, named
from trio_deploy.export.job import resolve_job
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.schedule.budget import is_budget

HUB = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
}
#: Their pictures have any size.
QWEN = {
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "cosmos-reason1-7b": "nvidia/Cosmos-Reason1-7B",
    "cosmos-reason2-2b": "nvidia/Cosmos-Reason2-2B",
    "cosmos-reason2-8b": "nvidia/Cosmos-Reason2-8B",
}


def test_the_shipped_recipes_are_those_promised():
    assert list_recipes() == sorted(["tiny", *HUB, *QWEN])


@pytest.mark.parametrize("name", [*HUB, *QWEN, "tiny"])
def test_a_recipe_is_complete(name):
    recipe = load_recipe(name)
    layers = parse_config(recipe.architecture).text.num_layers
    assert recipe.hub_id == {**HUB, **QWEN}.get(name)
    assert recipe.probe == "last"
    assert recipe.positions == ("renumber" if name in HUB else "original")
    assert recipe.threshold == 0.8
    budgets = {key: s for key, s in recipe.schedules.items() if is_budget(key)}
    small = ["0.075", "0.05"] if name == "tiny" else []
    assert list(budgets) == ["0.333", "0.222", "0.111", *small]
    for budget, schedule in budgets.items():
        schedule.validate(layers)
        # Within what rounding to whole tokens allows.
        assert schedule.average(576, layers) / 576 == pytest.approx(float(budget), abs=0.001)


@pytest.mark.parametrize("name", QWEN)
def test_a_recipe_of_pictures_of_any_size_bounds_their_tokens(name):
    """1280 tokens, and a tower and a language model that need about the same weights as named."""
    recipe = load_recipe(name)
    config = source_config(FoundModel(name, name, None, recipe.architecture, None, recipe))
    assert config.pixels == (recipe.preprocessing["size"]["shortest_edge"], recipe.max_pixels)
    assert request_limits(config).visual_tokens == 1280
    wider = source_config(FoundModel(name, name, None, recipe.architecture, None, recipe), 2**22)
    assert request_limits(wider).visual_tokens > 4000
    weights = sum(math.prod(shape) for shape in canonical_tensors(config).values())
    billions = float(name.rpartition("-")[2].removesuffix("b"))
    assert 0.95 * billions < weights / 1e9 < 1.3 * billions + 0.1
    assert recipe.schedules["0.111"].methods == ("divprune", "trio")
    shown = plan(name, dtype="bfloat16").to_text()
    assert "1280 visual" in shown and "multiply-adds of the vision tower" in shown


def test_a_recipes_most_pixels_must_make_sense(tmp_path):
    for name, value, says in (
        ("qwen3-vl-2b", "many", "whole number of pixels"),
        ("qwen3-vl-2b", 100, "at most 100"),
        ("llava-1.5-7b", 10**6, "no meaning for a llava model"),
    ):
        raw = yaml.safe_load((recipe_folder() / f"{name}.yaml").read_text())
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**raw, "max_pixels": value}))
        with pytest.raises(TrioError, match=says):
            load_recipe(file)
    raw = yaml.safe_load((recipe_folder() / "qwen3-vl-2b.yaml").read_text())
    file.write_text(yaml.safe_dump({**raw, "positions": "renumber"}))
    with pytest.raises(TrioError, match="'renumber' have no meaning"):
        load_recipe(file)


@pytest.mark.parametrize("name", [n for n in HUB if n != "llava-1.5-13b"])
@pytest.mark.parametrize(
    ("budget", "kept", "average"),
    [("0.222", (218, 128, 54), 128), ("0.111", (92, 54, 22), 64)],
)
def test_published_schedules(name, budget, kept, average):
    """The counts of the paper's code at 576 visual tokens; at 2880 five times as many."""
    schedule = load_recipe(name).schedules[budget]
    assert schedule.layers == (1, 10, 15)
    assert schedule.resolve(576) == kept
    assert schedule.average(576, 32) == average
    if budget == "0.111":
        assert schedule.resolve(2880) == (460, 270, 110)


@pytest.mark.parametrize("name", sorted(HUB))
def test_schedules_with_a_stage_at_the_encoder(name):
    """A sixth at the encoder and a third of that halfway: the average of the paper's 11.1 %."""
    recipe = load_recipe(name)
    depth = parse_config(recipe.architecture).text.num_layers
    for key, method in (("encoder-0.111", "vscan"), ("encoder-divprune-0.111", "divprune")):
        schedule = recipe.schedules[key]
        assert schedule.layers == (0, depth // 2) and schedule.methods == (method, "trio")
        assert schedule.resolve(576) == (96, 32) and schedule.resolve(2880) == (480, 160)
        assert schedule.average(576, depth) == 64


def test_thirteen_billion_has_forty_layers():
    recipe = load_recipe("llava-1.5-13b")
    assert parse_config(recipe.architecture).text.num_layers == 40
    assert recipe.schedules["0.111"].layers == (1, 13, 19)


def test_tiny_brings_its_checkpoint():
    recipe = load_recipe("tiny")
    assert recipe.checkpoint is not None
    assert (recipe.checkpoint / "model.safetensors").is_file()
    schedules = recipe.schedules.values()
    assert {(s.layers, s.methods) for s in schedules} == {
        ((0, 3, 8), ("divprune", "divprune", "trio"))
    }


@pytest.mark.parametrize("name", HUB)
def test_a_hub_id_finds_its_recipe(name):
    found = recipe_for(HUB[name])
    assert found is not None and found.name == name
    assert recipe_for("someone/else") is None


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("llava-1.5-7b", "USER: <image>\nWhat? ASSISTANT:"),
        ("llava-1.5-13b", "USER: <image>\nWhat? ASSISTANT:"),
        (
            "llava-next-7b",
            "A chat between a curious human and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the human's questions. "
            "USER: <image>\nWhat? ASSISTANT:",
        ),
        ("llava-next-mistral-7b", "[INST] <image>\nWhat? [/INST]"),
    ],
)
def test_chat_templates_give_the_prompt_the_model_knows(name, prompt):
    template = load_recipe(name).chat_template
    assert template is not None
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    rendered = jinja2.Template(template).render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert rendered == prompt


def test_a_copied_recipe_is_loaded_from_its_path(tmp_path: Path):
    copy = tmp_path / "mine.yaml"
    copy.write_text((recipe_folder() / "llava-next-7b.yaml").read_text())
    assert load_recipe(copy).name == "mine"
    assert load_recipe(str(copy)).schedules == load_recipe("llava-next-7b").schedules


def test_a_recipe_may_name_a_local_checkpoint(tmp_path: Path):
    make_llava(tmp_path / "weights", layers=2)
    file = tmp_path / "mine.yaml"
    file.write_text('checkpoint: weights\nschedules: {"0.5": [{layer: 1, keep: 0.3}]}\n')
    recipe = load_recipe(file)
    assert recipe.checkpoint == tmp_path / "weights"
    assert parse_config(recipe.architecture).text.num_layers == 2
    assert recipe.preprocessing["size"] == {"shortest_edge": 32}


class TestBadRecipes:
    @pytest.fixture
    def broken(self, tmp_path: Path):
        """Writes llava-1.5-7b with changes, and returns the file."""

        def write(**changes) -> Path:
            raw = yaml.safe_load((recipe_folder() / "llava-1.5-7b.yaml").read_text())
            file = tmp_path / "broken.yaml"
            file.write_text(yaml.safe_dump({**raw, **changes}))
            return file

        return write

    def test_unknown_recipe(self):
        with pytest.raises(TrioError, match="llava-next-7'.*did you mean 'llava-next-7b'.*tiny"):
            load_recipe("llava-next-7")

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(TrioError, match="no recipe file"):
            load_recipe(tmp_path / "x.yaml")

    @pytest.mark.parametrize(
        ("key", "nearest"),
        [("schedule", "schedules"), ("treshold", "threshold"), ("hub", "hub_id")],
    )
    def test_unknown_key(self, broken, key, nearest):
        with pytest.raises(TrioError, match=f"unknown key '{key}'.*did you mean '{nearest}'"):
            load_recipe(broken(**{key: 1}))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"probe": "first"}, "probe cannot be 'first'.*last, shifted"),
            ({"positions": "keep"}, "positions cannot be 'keep'"),
            ({"threshold": 1.5}, "threshold.*1.5"),
            ({"threshold": True}, "threshold"),
            ({"hub_id": 3}, "hub_id must be text"),
            ({"schedules": []}, "`schedules` is not a mapping"),
            ({"schedules": {"2x": []}}, "'2x'"),
            ({"schedules": {"2": []}}, "'2'"),
            ({"schedules": {"0.1": [{"layer": 1}]}}, "schedule 0.1"),
            ({"schedules": {"0.1": [{"layer": 1, "keep": 0.1, "kep": 1}]}}, "kep"),
            ({"schedules": {"0.1": [{"layer": 32, "keep": 0.1}]}}, "32"),
            (
                {"schedules": {"0.1": [{"layer": 5, "keep": 0.1}, {"layer": 3, "keep": 0.1}]}},
                "increas",
            ),
            (
                {"schedules": {"0.1": [{"layer": 3, "keep": 0.1}, {"layer": 5, "keep": 0.2}]}},
                "keep",
            ),
            ({"architecture": None}, "`architecture` and `preprocessing` are not mappings"),
            ({"architecture": {"model_type": "bert"}}, "'bert'"),
            ({"preprocessing": {"crop_size": 10}}, "takes 336 x 336"),
            ({"checkpoint": "nowhere"}, "no checkpoint folder"),
        ],
    )
    def test_wrong_value(self, broken, changes, says):
        with pytest.raises(TrioError, match=f"broken.yaml.*{says}"):
            load_recipe(broken(**changes))

    @pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
    def test_no_yaml_mapping(self, tmp_path: Path, text):
        file = tmp_path / "x.yaml"
        file.write_text(text)
        with pytest.raises(TrioError, match="x.yaml"):
            load_recipe(file)


TUNED = """\
# trio tune: a comment
schedules:
  "0.05":
    - {layer: 0, keep: 0.07, method: divprune}
    - {layer: 11, keep: 0.02, method: trio}
threshold: 0.7
probe: shifted
"""


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    (tmp_path / "schedule.yaml").write_text(TUNED)
    return tmp_path / "schedule.yaml"


def test_a_schedule_file_is_taken_wherever_a_schedule_is(tuned: Path):
    expected = Schedule.parse("0:0.07:divprune,11:0.02")
    assert plan("tiny", schedule=str(tuned)).schedule == expected
    named_so = named(Source.open("tiny"), f"mine={tuned}")
    assert (named_so.name, named_so.schedule) == ("mine", expected)
    assert (named_so.threshold, named_so.probe, named_so.positions) == (0.7, "shifted", None)
    job = resolve_job("tiny", tuned.with_name("b"), ExportOptions(schedule=str(tuned)))
    assert (job.schedule, job.graphs.threshold, job.graphs.probe) == (expected, 0.7, "shifted")


def test_options_that_are_given_go_before_a_schedule_files(tuned: Path):
    asked = ExportOptions(schedule=str(tuned), selection=SelectionOptions(threshold=0.9))
    found = with_schedule_file(asked).selection
    assert (found.threshold, found.probe, found.positions) == (0.9, "shifted", None)
    assert with_schedule_file(ExportOptions(schedule="1:0.5")) == ExportOptions(schedule="1:0.5")


def test_a_recipe_can_name_schedule_files(tuned: Path):
    file = tuned.with_name("mine.yaml")
    recipe = "checkpoint: package:data/tiny\npositions: original\n"
    file.write_text(recipe + 'schedules: {"0.05": schedule.yaml, "0.5": [{layer: 1, keep: 0.5}]}\n')
    found = load_recipe(file)
    assert found.schedules["0.05"] == Schedule.parse("0:0.07:divprune,11:0.02")
    assert found.schedules["0.5"] == Schedule.parse("1:0.5")
    assert (found.threshold, found.probe, found.positions) == (0.7, "shifted", "original")
    file.write_text(recipe + 'threshold: 0.8\nschedules: {"0.05": schedule.yaml}\n')
    with pytest.raises(TrioError, match=r"found with threshold 0\.7 .* one threshold .* here 0\.8"):
        load_recipe(file)
    file.write_text(recipe + 'schedules: {"0.05": gone.yaml}\n')
    with pytest.raises(TrioError, match=r"there is no file .*gone\.yaml"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("schedules: {}", "has 0 schedules: a schedule file has one"),
        (TUNED + "hub_id: a/b\n", "unknown key 'hub_id'"),
        (TUNED.replace("0.7\n", "x\n"), "threshold must be a cosine"),
        (TUNED.replace("shifted", "first"), "probe cannot be 'first'"),
        (TUNED.replace("layer: 0", "layer: x"), "`layer` must be an integer"),
    ],
)
def test_what_is_wrong_in_a_schedule_file_is_named(tuned: Path, content: str, words: str):
    tuned.write_text(content)
    with pytest.raises(TrioError, match=words):
        read_schedule(tuned)
