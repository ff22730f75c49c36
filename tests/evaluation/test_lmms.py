"""The adapter against lmms-eval 0.7.3's interface, stood in for by what it uses of it.

The package itself pulls torchvision and CUDA builds of torch, so it is not installed here.
"""

import importlib
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.pictures import make_picture
from tests.support.qwen_checkpoints import shared_checkpoint
from tests.support.qwen_models import FAMILIES
from trio_deploy import Request, TrioError
from trio_deploy.evaluation import scenes

ROOT = Path(__file__).parent.parent.parent


class Lmms:
    """lmms_eval.api.model.lmms, as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arguments: str, additional: dict[str, Any]) -> Any:
        given = dict(pair.split("=") for pair in arguments.split(",") if pair)
        return cls(**given, **{k: v for k, v in additional.items() if v is not None})


@dataclass
class ModelManifest:
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None


@dataclass
class Instance:
    """lmms_eval.api.instance.Instance."""

    args: tuple


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models",
             "lmms_eval.models.registry_v2")  # fmt: skip
    modules = {name: types.ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = Lmms  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "trio_deploy.evaluation.lmms", raising=False)
        yield importlib.import_module("trio_deploy.evaluation.lmms")
    sys.modules.pop("trio_deploy.evaluation.lmms", None)


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return scenes.generate(scenes.TEST_SEEDS[6500])


@pytest.fixture(scope="module")
def model(adapter, scene, bundles) -> Any:
    bundle = bundles.path("tiny", schedule="0:0.4,6:0.2")
    found = adapter.Trio.create_from_arg_string(
        f"bundle={bundle},budget=1.0,threads=1", {"batch_size": 4, "device": None}
    )
    found.task_dict = {"task": {"test": [{"image": scene.image}]}}
    return found


def look(document: dict[str, Any]) -> list[Any]:
    return [document["image"]]


def question(text: str, settings: Any) -> Instance:
    return Instance((text, settings, look, 0, "task", "test"))


def test_the_entry_point_names_a_class_that_lmms_eval_takes(adapter):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entry = re.search(r'\[project.entry-points."lmms_eval.models"\]\ntrio = "(.*):(.*)"', project)
    assert entry is not None
    module, name = entry.groups()
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "trio"
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms) and found.is_simple


def test_questions_are_answered(model, scene):
    settings = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    answers = model.generate_until([question(q.text, settings) for q in scene.questions[:6]])
    assert [text.strip() for text in answers] == [q.answer for q in scene.questions[:6]]


def test_until_ends_an_answer(model, scene):
    plate = next(q for q in scene.questions if q.kind == "plate")
    second = plate.answer.split()[1]
    settings = {"max_new_tokens": 8, "until": [second]}
    (cut,) = model.generate_until([question(plate.text, settings)])
    assert cut.split() == plate.answer.split()[: plate.answer.split().index(second)]


def choices(asked: scenes.Question) -> list[str]:
    return list(scenes.COLOURS) if asked.kind == "color" else ["yes", "no"]


def test_the_right_choice_has_the_smallest_loss_which_lmms_eval_picks(model, scene):
    asked = [q for q in scene.questions if q.kind == "color" or q.answer in ("yes", "no")]
    assert len(asked) >= 5
    for one in asked:
        found = model.loglikelihood([question(one.text, choice) for choice in choices(one)])
        losses = [loss for loss, _ in found]
        # lmms_eval/api/task.py, process_results: pred = np.argmin(lls)
        assert choices(one)[int(np.argmin(losses))] == one.answer
        assert min(losses) >= 0 and [greedy for _, greedy in found].count(True) == 1


def test_a_loss_is_the_mean_over_the_tokens_of_the_continuation(model, scene):
    plate = next(q for q in scene.questions if q.kind == "plate")
    tokens = model.pipeline.tokenize(plate.answer)
    assert len(tokens) > 1
    ((loss, greedy),) = model.loglikelihood([question(plate.text, plate.answer)])
    (given,) = model.pipeline.generate_batch(
        [Request(plate.text, [scene.image], budget=1.0, forced=tokens)]
    )
    assert loss == pytest.approx(-np.mean(given.logprobs), rel=1e-3, abs=1e-6) and greedy
    ((same, _),) = model.loglikelihood([question(plate.text, lambda document: plate.answer)])
    assert same == pytest.approx(loss, rel=1e-3, abs=1e-6)


#: Sizes of the pictures of each document.
SIZES = [[(28, 28)], [(400, 300), (20, 1000)], [(1990, 10)], []]


@pytest.mark.parametrize("family", FAMILIES)
def test_qwen_models_answer_and_weigh_choices_about_pictures_of_any_size(
    family, adapter, bundles, run_folder
):
    bundle = bundles.path(shared_checkpoint(run_folder, family), schedule="0:0.5:divprune,2:0.25")
    model = adapter.Trio(bundle=str(bundle), batch_size="3", threads=1)
    documents = [[make_picture(*size, 3) for size in sizes] for sizes in SIZES]
    model.task_dict = {"task": {"test": documents}}

    def asked(what: Any) -> list[Instance]:
        places = range(len(SIZES))
        return [
            Instance(("what is it ?", what, lambda document: document, place, "task", "test"))
            for place in places
        ]

    answers = model.generate_until(asked({"max_new_tokens": 5}))
    losses = model.loglikelihood(asked("red star"))
    forced = model.pipeline.tokenize("red star")
    for pictures, answer, (loss, greedy) in zip(documents, answers, losses, strict=True):
        alone = model.pipeline.generate(Request("what is it ?", pictures, 5))
        assert answer == alone.text
        given = model.pipeline.generate(Request("what is it ?", pictures, forced=forced))
        assert loss == pytest.approx(-np.mean(given.logprobs), rel=1e-3)
        assert greedy == all(given.greedy)
        assert (alone.visual_tokens > 0) == bool(pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "no bundle is named"), ({"bundle": "b", "colour": 1}, "unknown model argument 'colour'")],
)
def test_wrong_arguments_are_one_clear_error(adapter, arguments, message):
    with pytest.raises(TrioError, match=message):
        adapter.Trio(**arguments)


def test_what_a_bundle_cannot_do_is_said(model):
    with pytest.raises(TrioError, match="beam search"):
        model.generate_until([question("what?", {"num_beams": 4})])
    with pytest.raises(TrioError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(TrioError, match="without a question"):
        model.loglikelihood([Instance(("", " yes"))])
