"""A Qwen model from a repository that `trio triton` wrote, with a stand-in for Triton."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.qwen_checkpoints import shared_checkpoint
from tests.support.qwen_models import FAMILIES
from tests.support.tensors import file, text, texts
from tests.support.triton_models import ask
from tests.support.waiting import wait_for
from trio_deploy import Pipeline, Request
from trio_deploy.cli.main import main

QUESTION = "what color is the star ?"
SCHEDULE = "1:0.5,3:0.25"

#: What stands in a message: pictures of some sizes, and texts.
CONTENTS: list[list[tuple[int, int] | str]] = [
    [QUESTION],
    [(200, 130), QUESTION],
    ["what is in this picture ?", (40, 300)],
    [(28, 28), (90, 120), "and", (900, 20), "count the red ones", (90, 120)],
]


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(
    request: pytest.FixtureRequest,
    run_folder: Path,
    bundles: Bundles,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The bundle inside a repository."""
    checkpoint = shared_checkpoint(run_folder, request.param)
    made = bundles.path(checkpoint, schedule=SCHEDULE, dialect="ort")
    out = tmp_path_factory.mktemp("repository") / "models"
    assert main(["triton", str(made), "--out", str(out), "--link"]) == 0
    return out / "trio_vlm" / "1" / "bundle"


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.open(bundle, threads=1)


def test_messages_with_pictures_anywhere_are_answered_as_by_the_pipeline(
    load: Callable[..., Any], pipeline: Pipeline
) -> None:
    model = load(max_rows="3")
    asked = []
    for number, parts in enumerate(CONTENTS):
        content = [text(part) if isinstance(part, str) else {"type": "image"} for part in parts]
        messages = [{"role": "user", "content": content}]
        files = [file(*part) for part in parts if not isinstance(part, str)]
        tensors = {"images": texts(*files)} if files else {}
        sent = ask(model, messages=json.dumps(messages), max_tokens=3 + number, **tensors)
        asked.append((sent, Request(messages, files, max_new_tokens=3 + number)))
    for sent, request in asked:
        expected = pipeline.generate(request)
        assert sent.token_ids() == expected.token_ids
        timings = json.loads(sent.outputs()[-1]["timings"][0])
        assert timings["visual_tokens"] == expected.visual_tokens
        assert timings["kept_tokens"] == expected.keep_counts
    narrow = ask(model, messages=json.dumps(messages), images=texts(*[file(2010, 10)] * 4))
    assert "too long and narrow" in narrow.error()[1]
    wait_for(lambda: model._service.used_bytes == 0)
