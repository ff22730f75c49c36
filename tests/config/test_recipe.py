"""Recipes and targets: the shipped ones are sound, wrong ones are named to the key."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import yaml

from tests.support.checkpoints import make_llava
from trio_deploy import TrioError
from trio_deploy.checkpoint.resolve import load_recipe, recipe_for
from trio_deploy.config.recipe import list_recipes, recipe_folder
from trio_deploy.config.target import (
    GRAPH_DTYPES,
    list_targets,
    load_target,
    target_folder,
    tensorrt_dialects,
)
from trio_deploy.families.registry import parse_config
from trio_deploy.schedule.budget import is_budget

HUB = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
}


def test_the_shipped_recipes_are_those_promised():
    assert list_recipes() == sorted(["tiny", *HUB])


@pytest.mark.parametrize("name", [*HUB, "tiny"])
def test_a_recipe_is_complete(name):
    recipe = load_recipe(name)
    layers = parse_config(recipe.architecture).text.num_layers
    assert recipe.hub_id == HUB.get(name)
    assert recipe.probe == "last"
    assert recipe.positions == ("original" if name == "tiny" else "renumber")
    assert recipe.threshold == 0.8
    budgets = {key: s for key, s in recipe.schedules.items() if is_budget(key)}
    assert list(budgets) == ["0.333", "0.222", "0.111"]
    for budget, schedule in budgets.items():
        schedule.validate(layers)
        # Within what rounding to whole tokens allows.
        assert schedule.average(576, layers) / 576 == pytest.approx(float(budget), abs=0.001)


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
        with pytest.raises(TrioError, match="llava-next-7'.*Did you mean 'llava-next-7b'.*tiny"):
            load_recipe("llava-next-7")

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(TrioError, match="no recipe file"):
            load_recipe(tmp_path / "x.yaml")

    @pytest.mark.parametrize(
        ("key", "nearest"),
        [("schedule", "schedules"), ("treshold", "threshold"), ("hub", "hub_id")],
    )
    def test_unknown_key(self, broken, key, nearest):
        with pytest.raises(TrioError, match=f"unknown key '{key}'.*Did you mean '{nearest}'"):
            load_recipe(broken(**{key: 1}))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"probe": "first"}, "probe 'first'.*last, shifted"),
            ({"positions": "keep"}, "positions 'keep'"),
            ({"threshold": 1.5}, "threshold.*1.5"),
            ({"threshold": True}, "threshold"),
            ({"hub_id": 3}, "hub_id must be text"),
            ({"schedules": []}, "map budgets"),
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
            ({"architecture": None}, "must be mappings"),
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


_TENSORRT = 'runtime: tensorrt\ntensorrt: "10.3"\ndtype: float16\n'


class TestTargets:
    def test_the_shipped_ones(self):
        assert {"cpu", "cpu-openvino"} <= set(list_targets())
        cpu, openvino = load_target("cpu"), load_target("cpu-openvino")
        assert (cpu.runtime, cpu.dialect, cpu.dtype) == ("onnxruntime", "ort", "float32")
        assert (openvino.runtime, openvino.dialect) == ("openvino", "primitive")
        assert openvino.precision == "float32"
        assert load_target("cpu-openvino-bf16").precision == "bfloat16"
        assert all(load_target(name).description for name in list_targets())
        cuda = load_target("cuda")
        assert (cuda.runtime, cuda.provider, cuda.dtype) == ("onnxruntime", "cuda", "float16")
        assert (cpu.provider, openvino.provider) == ("cpu", None)
        for name in list_targets():
            target = load_target(name)
            assert target.dtype in GRAPH_DTYPES[target.runtime]

    def test_targets_with_tensorrt_say_what_they_are_built_for(self):
        names = {name for name in list_targets() if load_target(name).runtime == "tensorrt"}
        assert names == {
            "a100",
            "h200",
            "jetson-agx-orin-64gb",
            "jetson-orin-nano-8gb",
            "jetson-orin-nx-16gb",
            "jetson-thor",
            "l4",
            "rtx-4090",
        }
        for target in map(load_target, names):
            assert target.usable_gib and 0 < target.usable_gib < target.memory_gib
            assert target.dialect in tensorrt_dialects(target.tensorrt)
            assert target.compute_capability and target.decode_layout in ("shared", "separate")
            assert target.limits.typical_visual_tokens <= target.limits.max_visual_tokens
        orin = load_target("jetson-agx-orin-64gb")
        assert (orin.tensorrt, orin.dialect, orin.compute_capability) == (
            "10.3",
            "primitive",
            "8.7",
        )
        assert load_target("h200").dialect == "onnx"

    @pytest.mark.parametrize(
        ("version", "dialects"),
        [
            ("8.6", ("primitive",)),
            ("8.6.1.post1", ("primitive",)),
            ("10.14.1", ("primitive",)),
            ("10.15", ("onnx", "primitive")),
            ("11.0", ("onnx", "primitive")),
        ],
    )
    def test_the_dialect_follows_from_the_version(self, version, dialects, tmp_path: Path):
        assert tensorrt_dialects(version) == dialects
        file = tmp_path / "board.yaml"
        file.write_text(f'runtime: tensorrt\ntensorrt: "{version}"\ndtype: float16\n')
        target = load_target(file)
        assert target.dialect == dialects[0]
        assert target.decode_layout == ("separate" if dialects[0] == "onnx" else "shared")

    def test_what_is_typical_is_never_more_than_what_is_allowed(self, tmp_path: Path):
        file = tmp_path / "board.yaml"
        limits = "limits: {max_text_tokens: 32, max_visual_tokens: 0}\n"
        file.write_text(f'runtime: tensorrt\ntensorrt: "10.3"\ndtype: float16\n{limits}')
        assert load_target(file).limits.typical_text_tokens == 32
        assert load_target(file).limits.typical_visual_tokens == 0

    def test_a_copy_is_loaded_from_its_path(self, tmp_path: Path):
        copy = tmp_path / "board.yaml"
        copy.write_text((target_folder() / "cpu.yaml").read_text())
        assert load_target(copy).name == "board"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("runtime: onnxruntime\ndialect: ort\n", "'dtype' is missing"),
            ("runtime: onnxrutime\n", "Did you mean 'onnxruntime'"),
            ("runtime: openvino\ndialect: ort\ndtype: float32\n", "dialect 'ort'.*primitive"),
            ("runtime: openvino\ndtipe: float32\n", "unknown key 'dtipe'.*'dtype'"),
            ("runtime: openvino\ndialect: primitive\ndtype: int8\n", "'int8'"),
            (
                "runtime: onnxruntime\nprovider: cude\ndialect: ort\ndtype: float16\n",
                "provider 'cude'.*Did you mean 'cuda'",
            ),
            (
                "runtime: openvino\nprovider: cuda\ndialect: primitive\ndtype: float32\n",
                "a provider belongs to ONNX Runtime",
            ),
            (
                "runtime: openvino\ntensorrt: '10.3'\ndialect: primitive\ndtype: float32\n",
                "tensorrt belongs to TensorRT, not to openvino",
            ),
            ("runtime: tensorrt\ndtype: float16\n", "'tensorrt' must give a version in quotes"),
            ("runtime: tensorrt\ntensorrt: 10.3\ndtype: float16\n", "in quotes.*not 10.3"),
            ("runtime: tensorrt\ntensorrt: new\ndtype: float16\n", "'new' is no version"),
            (_TENSORRT.replace("10.3", "8.5"), "8.5 is too old; 8.6 is the oldest"),
            (_TENSORRT + "provider: cuda\n", "a provider belongs to ONNX Runtime"),
            (_TENSORRT + "dialect: onnx\n", "10.3 does not read the onnx dialect.*10.15"),
            (
                _TENSORRT.replace("10.3", "10.15") + "decode_layout: shared\n",
                "onnx dialect decodes with an engine of its own",
            ),
            (_TENSORRT + "decode_layout: split\n", "decode_layout 'split'"),
            (_TENSORRT + "compute_capability: 8.7\n", "compute_capability must be in quotes"),
            (_TENSORRT + "memory_gib: lots\n", "memory_gib must be a number"),
            (_TENSORRT + "memory_gib: 4\nreserved_gib: 4\n", "leaves nothing of 4 GiB"),
            (
                _TENSORRT + "workspace_gib: 0\n",
                "workspace_gib 0 leaves no scratch memory: leave it",
            ),
            (_TENSORRT + "limits: 4\n", "`limits` must be a mapping"),
            (_TENSORRT + "limits: {max_bach: 4}\n", "'max_bach'.*Did you mean 'max_batch'"),
            (_TENSORRT + "limits: {max_batch: 0}\n", "max_batch must be a positive"),
            (_TENSORRT + "limits: {max_budget: 2}\n", "max_budget must be above 0"),
            (
                _TENSORRT + "limits: {max_batch: 2, typical_batch: 3}\n",
                "typical_batch 3 exceeds max_batch 2",
            ),
        ],
    )
    def test_wrong_ones_are_named(self, tmp_path: Path, text, says):
        file = tmp_path / "board.yaml"
        file.write_text(text)
        with pytest.raises(TrioError, match=says):
            load_target(file)

    def test_unknown_target(self):
        with pytest.raises(TrioError, match="target called 'gpu'.*cpu"):
            load_target("gpu")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("jetson-agx-orin", "'jetson-agx-orin-64gb'"),
            ("agx_orin", "'jetson-agx-orin-64gb'"),
            ("Orin", "'jetson-agx-orin-64gb' or 'jetson-orin-nano-8gb' or 'jetson-orin-nx-16gb'"),
            ("4090", "'rtx-4090'"),
            ("jetson-thro", "'jetson-thor'"),
        ],
    )
    def test_a_part_of_a_targets_name_finds_it(self, name: str, meant: str):
        with pytest.raises(TrioError, match=rf"Did you mean {meant}\?"):
            load_target(name)

    def test_scratch_memory_has_no_ceiling_unless_a_target_says_so(self, tmp_path: Path):
        file = tmp_path / "board.yaml"
        file.write_text(_TENSORRT)
        assert load_target(file).workspace_gib is None
        file.write_text(_TENSORRT + "workspace_gib: 1.5\n")
        assert load_target(file).workspace_gib == 1.5
