"""Bundles that prune before the first layer: no prefill_0, and scores that the encoder gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import Bundles
from tests.support.checkpoints import make_llava_next
from tests.support.waiting import WAIT_S
from trio_deploy import Batcher, Pipeline, Request
from trio_deploy.pipeline.prefill import _per_token
from trio_deploy.pipeline.prompt import Batch
from trio_deploy.verify.examples import default_examples, picture

KINDS = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_next(tmp_path_factory.mktemp("encoder") / "checkpoint")


def opened(
    checkpoint: Path, bundles: Bundles, dialect: str, runtime: str, schedule: str
) -> Pipeline:
    out = bundles.path(checkpoint, schedule=schedule, dialect=dialect)
    return Pipeline.open(out, runtime=runtime, threads=1)


def requests(count: int) -> list[Request]:
    examples = default_examples()
    return [
        Request(
            examples[n % 3].prompt,
            examples[n % 3].pictures,
            max_new_tokens=4 + n,
            budget=(None, 0.3, 1.0)[n % 3 if n < 3 else 0],
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(("dialect", "runtime"), KINDS)
def test_rows_of_a_continuous_batch_give_what_they_give_alone(
    checkpoint: Path, bundles: Bundles, dialect: str, runtime: str
) -> None:
    pipeline = opened(checkpoint, bundles, dialect, runtime, "0:0.3:vscan,2:0.1")
    assert list(pipeline.bundle.stages)[:4] == ["vision", "embed", "select_1", "prefill_1"]
    asked = requests(6)
    alone = [pipeline.generate_batch([request])[0] for request in asked]
    together = pipeline.generate_batch(asked)
    with Batcher(pipeline, max_rows=3, prefill_rows=2) as batcher:
        handles = [batcher.submit(request) for request in asked]
        joined = [handle.result(WAIT_S) for handle in handles]
    for one, other, third in zip(alone, together, joined, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert [k.tolist() for k in one.kept] == [k.tolist() for k in third.kept]
        assert one.layer_ranges[0][0] == 0


def test_a_later_point_goes_by_the_encoder_too(checkpoint: Path, bundles: Bundles) -> None:
    """The scores follow the tokens that an earlier point kept."""
    schedule = "0:0.5:cls-attention,2:0.2:cls-attention"
    twice = opened(checkpoint, bundles, "ort", "onnxruntime", schedule)
    once = opened(checkpoint, bundles, "ort", "onnxruntime", "0:0.2:cls-attention")
    asked = [Request("read this", (picture(200, 300, 3),), max_new_tokens=1)]
    assert twice.generate_batch(asked)[0].kept[1].tolist() == (
        once.generate_batch(asked)[0].kept[0].tolist()
    )


def test_a_token_gets_the_score_of_its_image_row_and_a_newline_none() -> None:
    # S = 5, image rows 0 … 3, newline 4
    source = np.array([[0, 5 + 2, 5 + 4, 5 + 0, 4], [0, 1, 5 + 3, 3, 4]])
    visual = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
    batch = Batch(source, source, source, np.array([5, 4]), visual)
    scores = _per_token(batch, np.array([1.0, 2, 3, 4], np.float32))
    assert scores.tolist() == [[0, 3, 0, 1, 0], [0, 0, 4, 0, 0]]
