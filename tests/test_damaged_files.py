"""A file that was damaged at random is read, or refused with one error: never anything else.

Each test damages a valid file of one kind, in its bytes and in its values, and reads it as commands
do. Beyond the reader's errors it finds what comes of values that were let through.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.damage import damaged_bytes, damaged_json, damaged_yaml, limits
from tests.support.limited import limited_python
from tests.support.pictures import make_picture
from trio_deploy import Pipeline, TrioError, export_model
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.describe import inspect
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.processor_files import checkpoint_assets
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.recipe import read_schedule, recipe_folder
from trio_deploy.config.target import list_targets, target_folder
from trio_deploy.evaluation.configurations import Source
from trio_deploy.evaluation.questions import Question, annotate, read_questions
from trio_deploy.evaluation.results import Results
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.files import write_atomically
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.pipeline.prepare import RequestPreparer
from trio_deploy.pipeline.request import Request
from trio_deploy.report.figures import accuracy, cost
from trio_deploy.runtimes.registry import load_target
from trio_deploy.serve.limits import read_settings
from trio_deploy.serve.triton_server.settings import Settings
from trio_deploy.verify.origin import compare_origin

EXAMPLES = 40
TARGETS = ["cpu", *(name for name in list_targets() if name.startswith("jetson"))][:2]

many = settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],  # a damaged file is as good unshrunk
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def works_or_is_refused(read: Callable[[], Any]) -> None:
    """Read within bounds of memory and time; an error is a `TrioError` that can be printed."""
    try:
        with limits():
            read()
    except TrioError as error:
        message = str(error)
        message.encode()
        assert message.strip()
        assert len(message) < 2_000, message[:200]


def damaged_in_place(file: Path, data: st.DataObject, read: Callable[[], Any]) -> None:
    """Damage a JSON file, read it, and put its content back."""
    original = file.read_bytes()
    try:
        rewrite(file, data.draw(damaged_json(json.loads(original))))
        works_or_is_refused(read)
    finally:
        rewrite(file, original)


@pytest.fixture
def bundle(bundles, tmp_path) -> Path:
    return bundles.copy(tmp_path / "bundle", "tiny")


@pytest.fixture
def checkpoint(llava_checkpoint, tmp_path) -> Path:
    """A folder that links to the files of a checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in llava_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def settings_of(side: int) -> dict[str, Any]:
    """An image processor's settings, every one of them given."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }


def rewrite(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


@given(data=st.data())
@many
def test_manifest(bundle, data):
    file = bundle / "manifest.json"

    def read() -> None:
        opened = Bundle.load(bundle)
        inspect(opened)
        opened.schedule_at(0.3)
        canonical_tensors(opened.config)
        RequestPreparer(opened).prepare(Request("what color ?", [make_picture()], 3))

    damaged_in_place(file, data, read)


@pytest.mark.parametrize("name", ["tokens.json", "preprocessor.json"])
@given(data=st.data())
@many
def test_small_files_of_a_bundle(bundle, name, data):
    opened = Bundle.load(bundle)
    file = bundle / name

    def read() -> None:
        fresh = Bundle(opened.path, opened.manifest)
        RequestPreparer(fresh).prepare(Request("what color ?", [make_picture()], 3))

    damaged_in_place(file, data, read)


@pytest.mark.parametrize("kind", ["llava_checkpoint", "llava_next_checkpoint"])
@given(data=st.data())
@many
def test_config_of_a_checkpoint(kind, request, tmp_path, data):
    folder = request.getfixturevalue(kind)
    raw = json.loads((folder / "config.json").read_bytes())
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if not (copy / file.name).exists():
            (copy / file.name).symlink_to(file)
    rewrite(copy / "config.json", data.draw(damaged_json(raw)))

    def read() -> None:
        checkpoint = Checkpoint.from_path(copy)
        config = parse_config(checkpoint.config)
        request_limits(config)
        checkpoint.verify(canonical_tensors(config))
        checkpoint_assets(copy, config, checkpoint.config, preprocessing=None, chat_template=None)

    works_or_is_refused(read)


@pytest.mark.parametrize(
    "name",
    [
        "processor_config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ],
)
@given(data=st.data())
@many
def test_processor_files_of_a_checkpoint(checkpoint, llava_checkpoint, name, data):
    raw_config = json.loads((checkpoint / "config.json").read_bytes())
    config = parse_config(raw_config)
    assets = {
        "generation_config.json": {
            "eos_token_id": [2, 3],
            "pad_token_id": 0,
            "bos_token_id": 1,
            "do_sample": True,
            "temperature": 0.2,
            "repetition_penalty": 1.1,
            "suppress_tokens": [5],
            "bad_words_ids": [[3, 4]],
        },
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "model_max_length": 10**30,
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        },
        "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
        "processor_config.json": {"image_processor": settings_of(config.vision.image_size)},
    }
    file = checkpoint / name
    source = llava_checkpoint / name
    raw = json.loads(source.read_bytes()) if source.is_file() else assets[name]
    rewrite(file, data.draw(damaged_json(raw | assets.get(name, {}))))

    def read() -> None:
        assets = checkpoint_assets(
            checkpoint, config, raw_config, preprocessing=None, chat_template=None
        )
        made = Preprocessor.from_json(json.loads(assets.files["preprocessor.json"]), config)
        made(make_picture())

    works_or_is_refused(read)


@given(data=st.data())
@many
def test_header_of_weights(checkpoint, llava_checkpoint, data):
    source = llava_checkpoint / "model.safetensors"
    whole = source.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = data.draw(damaged_json(json.loads(whole[8 : 8 + length])))
    claimed = data.draw(st.sampled_from([len(header)] * 5 + [0, 7, len(header) + 9, 2**40, 2**63]))
    rewrite(
        checkpoint / "model.safetensors",
        struct.pack("<Q", claimed) + header + whole[8 + length :],
    )

    def read() -> None:
        found = Checkpoint.from_path(checkpoint)
        found.verify(canonical_tensors(parse_config(found.config)))

    works_or_is_refused(read)


@given(data=st.data())
@many
def test_index_of_weights(llava_mistral_checkpoint, tmp_path, data):
    folder = tmp_path / "copy"
    folder.mkdir(exist_ok=True)
    for file in llava_mistral_checkpoint.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    name = "model.safetensors.index.json"
    raw = json.loads((llava_mistral_checkpoint / name).read_bytes())
    rewrite(folder / name, data.draw(damaged_json(raw)))
    works_or_is_refused(lambda: Checkpoint.from_path(folder))


@pytest.mark.parametrize("name", ["llava-1.5-7b", "tiny"])
@given(data=st.data())
@many
def test_recipe(name, tmp_path, data):
    source = recipe_folder() / f"{name}.yaml"
    file = tmp_path / "recipe.yaml"
    file.write_bytes(data.draw(damaged_yaml(source)))
    works_or_is_refused(lambda: load_recipe(str(file)))


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@many
def test_target(name, tmp_path, data):
    file = tmp_path / "target.yaml"
    file.write_bytes(data.draw(damaged_yaml(target_folder() / f"{name}.yaml")))
    works_or_is_refused(lambda: load_target(str(file)))


LIMITS = {
    "budget": 0.3,
    "max_tokens": 512,
    "max_images": 4,
    "max_image_bytes": 10**6,
    "max_timeout_s": 60.5,
    "max_rows": 8,
    "max_kv_bytes": 10**9,
    "prefillers": 1,
    "threads": 2,
    "warm_up": True,
    "low_memory": False,
}


@given(data=st.data())
@many
def test_limits_of_a_server(tmp_path, data):
    source, file = tmp_path / "source.yaml", tmp_path / "limits.yaml"
    source.write_text(yaml.safe_dump(LIMITS))
    Settings.parse({"bundle": "b", **read_settings(source, [])})  # as it is, it is read
    file.write_bytes(data.draw(damaged_yaml(source)))
    works_or_is_refused(lambda: Settings.parse({"bundle": "b", **read_settings(file, [])}))


QUESTIONS = [
    {"question_id": 1, "text": "what?", "image": "a.png", "category": "x", "answer": "yes"},
    {"question_id": "2", "text": "both?", "image": ["a.png", "a.png"], "answers": ["a", "b"]},
    {"id": 3, "conversations": [{"from": "human", "value": "Which?\n<image>"}, {"value": "B"}]},
]


@given(data=st.data())
@many
def test_question_file(tmp_path, data):
    file = tmp_path / "q.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_json(QUESTIONS)))
    else:
        lines = [data.draw(damaged_json(one)).replace(b"\n", b" ") for one in QUESTIONS]
        file.write_bytes(b"\n".join(lines))
    works_or_is_refused(lambda: read_questions(file))


ANNOTATIONS = {
    "vqav2": {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}] * 10}]},
    "textvqa": {"data": [{"image_id": "1", "question": "what?", "answers": ["a"] * 10}]},
    "scienceqa": {"1": {"answer": 1, "choices": ["x", "y"]}},
    "pope": {"label": "yes"},
}


@pytest.mark.parametrize("scorer", ANNOTATIONS)
@given(data=st.data())
@many
def test_annotations(scorer, tmp_path, data):
    questions, source = tmp_path / "q.jsonl", tmp_path / "annotations.json"
    questions.write_text('{"question_id": 1, "text": "what?"}')
    content = data.draw(damaged_json(ANNOTATIONS[scorer]))
    source.write_bytes(content.replace(b"\n", b" "))
    works_or_is_refused(lambda: annotate(read_questions(questions), scorer, source))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@given(data=st.data())
@many
def test_picture(form, tmp_path, data):
    content = io.BytesIO()
    make_picture().save(content, form)
    file = tmp_path / "picture"
    file.write_bytes(data.draw(damaged_bytes(content.getvalue())))
    works_or_is_refused(lambda: Preprocessor.open_image(file))


# The reader of tokenizers is native code, which may end the process: in a child.
TOKENIZERS = """
import json, sys
from pathlib import Path
from hypothesis import HealthCheck, Phase, given, settings
from tests.support.damage import damaged_json
from tests.support.pictures import make_picture
from trio_deploy import Pipeline, TrioError, export_model
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.pipeline.prepare import RequestPreparer
from trio_deploy.pipeline.request import Request
bundle = Bundle.load(sys.argv[1])
file = bundle.path / "tokenizer.json"
read = worked = 0
@given(damaged_json(json.loads(file.read_bytes())))
@settings(
    max_examples=100, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def check(content):
    global read, worked
    file.write_bytes(content)
    read += 1
    try:
        RequestPreparer(bundle).prepare(Request("what color is the circle ?", [make_picture()], 3))
        worked += 1
    except TrioError as error:
        assert len(str(error)) < 2000, str(error)[:200]
check()
print(read, worked)
"""


def test_tokenizer(bundle):
    done = limited_python(TOKENIZERS, bundle, memory_mib=1500, cpu_s=60)
    assert done.rc == 0, done.err[-3000:]
    read, worked = map(int, done.out.split())
    assert read > worked > 0
    assert done.peak_mib < 500


MEASURED = Path(__file__).parents[1] / "docs" / "measurements"


@pytest.mark.parametrize("name", ["eval-budgets", "bench-tiny"])
@given(data=st.data())
@settings(many, max_examples=25)
def test_measurements(name, bundles, tmp_path, data):
    opened = Bundle.load(bundles.path("tiny"))
    file = tmp_path / "measured.json"
    file.write_bytes(data.draw(damaged_json(json.loads((MEASURED / f"{name}.json").read_bytes()))))

    def read() -> None:
        if name == "bench-tiny":
            cost(opened, file, quick=False)
        else:
            Results.load(file).to_text()
            accuracy(opened, file, quick=False)

    works_or_is_refused(read)


TUNED = """\
schedules:
  '0.111':
  - {layer: 1, keep: 0.159722, method: trio}
  - {layer: 5, keep: 0.09375, method: divprune}
probe: shifted
positions: renumber
threshold: 0.8
"""


@given(data=st.data())
@many
def test_schedule_file(tmp_path, data):
    source, file = tmp_path / "source.yaml", tmp_path / "schedule.yaml"
    source.write_text(TUNED)
    read_schedule(source)  # as it is, it is read
    file.write_bytes(data.draw(damaged_yaml(source)))
    works_or_is_refused(lambda: read_schedule(file))


# ------------------------------------------------------------------------------------------ paths


NO_PATHS = {
    "a name of 300 characters": "x" * 300,
    "one with an ending": "x" * 300 + ".yaml",
    "one of a folder": "x" * 300 + "/y",
    "a zero byte": "a\0b",
    "a home of nobody": "~nobody-is-called-this/x.yaml",
}
PATHS: dict[str, Callable[[Bundle, str], Any]] = {
    "a picture": lambda _, path: Preprocessor.open_image(path),
    "the bundle of a pipeline": lambda _, path: Pipeline.open(path),
    "the target of a pipeline": lambda bundle, path: Pipeline.open(bundle, target=path),
    "a bundle": lambda _, path: Bundle.load(path),
    "a model": lambda _, path: export_model(path, "out", progress=False),
    "a chat template": lambda _, path: export_model("tiny", "out", chat_template=path),
    "a schedule": lambda _, path: export_model("tiny", "out", schedule=path),
    "the folder of a checkpoint": lambda _, path: Checkpoint.from_path(path),
    "the checkpoint of a bundle": lambda bundle, path: compare_origin(bundle, Path(path)),
    "a recipe": lambda _, path: load_recipe(path),
    "a target": lambda _, path: load_target(path),
    "a source of answers": lambda _, path: Source.open(path),
    "a question file": lambda _, path: read_questions(Path(path)),
    "annotations": lambda _, path: annotate(
        [Question("a", "what?", (), "p", "text")], "pope", Path(path)
    ),
}


@pytest.mark.parametrize("name", NO_PATHS)
@pytest.mark.parametrize("what", PATHS)
def test_a_path_that_cannot_be_one_is_one_error(what, name, bundles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bundle = Bundle.load(bundles.path("tiny"))
    with pytest.raises(TrioError) as error:
        PATHS[what](bundle, NO_PATHS[name])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["x" * 300, "x" * 250, "x" * 300 + "/y", "a\0b"])
def test_a_path_that_cannot_be_written_is_one_error(path, bundles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: export_model("tiny", path, graphs_only=True, progress=False),
        lambda: write_atomically(Path(path), b"content"),
    ):
        with pytest.raises(TrioError, match="cannot write "):
            write()
    assert not list(tmp_path.iterdir())
