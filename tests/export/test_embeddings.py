"""The table of embeddings on the host: the same answers, from graphs without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.bundles import Bundles, made_once
from tests.support.engines import KINDS, build, make_target
from tests.support.fakes.tensorrt.install import install
from tests.support.pictures import make_picture
from tests.support.qwen_checkpoints import make_qwen
from trio_deploy import Bundle, Generation, Pipeline, Request, TrioError, export_model
from trio_deploy.bundle.describe import inspect
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.cli.main import main
from trio_deploy.export.attach import attach_weights
from trio_deploy.families.names import EMBEDDINGS
from trio_deploy.serve.triton_server.repository import Options, write_repository

SCHEDULE = "1:0.5,3:0.25"
#: The onnx dialect has a decode graph of its own, the others do not.
ENGINES = [("ort", "onnxruntime"), ("onnx", "onnxruntime"), ("primitive", "openvino")]
MODELS = ("tiny", "llava", "qwen3_vl")


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path, llava_checkpoint: Path):
    """A model by its name; the embeddings of the Qwen model are its head, too."""

    def of(model: str) -> str | Path:
        if model == "qwen3_vl":
            folder = run_folder / "checkpoint-tied"
            return made_once(folder, lambda to: make_qwen(to, "qwen3_vl", tie=True))
        return llava_checkpoint if model == "llava" else model

    return of


@pytest.fixture(scope="module")
def exported(bundles: Bundles, checkpoint):
    def of(model: str, place: str, **options: Any) -> Bundle:
        given = {"schedule": SCHEDULE, "dialect": "ort", **options}
        path = bundles.path(checkpoint(model), embeddings=place, **given)
        return Bundle.load(path).with_end_tokens([])

    return of


def requests() -> list[Request]:
    """Rows of different lengths: one picture, two, none."""
    shown = [[make_picture(90, 60)], [make_picture(40, 90, 1), make_picture(60, 60, 2)], []]
    text = {"type": "text", "text": "what color is the circle ?"}
    return [
        Request(
            [{"role": "user", "content": [*[{"type": "image"}] * len(images), text]}],
            images,
            max_new_tokens=7 + number,
            top_logprobs=0,
        )
        for number, images in enumerate(shown)
    ]


def assert_equal_to_the_last_bit(mine: list[Generation], theirs: list[Generation]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert len(one.token_ids) > 6 and one.token_ids == other.token_ids
        assert np.array_equal(one.first_logits, other.first_logits)
        assert one.token_logprobs == other.token_logprobs  # of every decode step
        assert all(map(np.array_equal, one.kept, other.kept))


def read_graph(bundle: Bundle, stage: str) -> onnx.GraphProto:
    return onnx.load(bundle.graph(stage), load_external_data=False).graph


@pytest.mark.parametrize(("dialect", "runtime"), ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_a_table_in_the_graphs(exported, model, dialect, runtime) -> None:
    pipelines = [
        Pipeline.open(exported(model, place, dialect=dialect), runtime=runtime, threads=1)
        for place in ("host", "device")
    ]
    together = [pipeline.generate_batch(requests()) for pipeline in pipelines]
    assert_equal_to_the_last_bit(*together)
    alone = [[pipeline.generate(requests()[1])] for pipeline in pipelines]
    assert_equal_to_the_last_bit(*alone)


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_no_graph_that_looks_tokens_up_holds_the_table(exported, dialect: str) -> None:
    bundle = exported("tiny", "host", dialect=dialect)
    for stage in bundle.manifest.stages:
        assert EMBEDDINGS not in stage.tensors
        assert EMBEDDINGS not in {each.name for each in read_graph(bundle, stage.name).initializer}
    embed = bundle.only("embed")
    assert [each.name for each in embed.inputs] == [
        "token_embeddings",
        "image_features",
        "source_index",
    ]
    assert embed.looked_up == (EMBEDDINGS,)
    same = exported("tiny", "device", dialect=dialect)
    assert bundle.manifest.tensors == same.manifest.tensors  # the table keeps its place
    assert not same.only("embed").looked_up


def test_a_head_that_is_the_table_stays_in_its_graph(exported) -> None:
    bundle = exported("qwen3_vl", "host")
    users = [stage.name for stage in bundle.manifest.stages if EMBEDDINGS in stage.tensors]
    assert users == ["select_1", "select_2", "prefill_2"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_have_the_type_of_the_graphs(exported, dtype: str) -> None:
    """In bfloat16 on OpenVINO, since ONNX Runtime has no such arrays."""
    answers = []
    for place in ("host", "device"):
        bundle = exported("llava", place, dtype=dtype, target="cpu-openvino", dialect="primitive")
        answers.append(Pipeline.open(bundle, threads=1).generate_batch(requests()))
    assert_equal_to_the_last_bit(*answers)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids="-".join)
def test_engines_get_looked_up_rows_at_every_step(
    kind: tuple[str, str, str], llava_checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    simulation = install(monkeypatch, kind[0])
    target = make_target(tmp_path, *kind)
    target.write_text(target.read_text() + "embeddings: host\n")
    bundle = export_model(
        llava_checkpoint, tmp_path / "out", target=target, schedule=SCHEDULE, progress=False
    )
    assert bundle.only("embed").looked_up == (EMBEDDINGS,)
    build(bundle, target, simulation)
    two = requests()[::2]
    answers = [
        Pipeline.open(bundle.with_end_tokens([]), runtime=runtime).generate_batch(two)
        for runtime in ("tensorrt", "onnxruntime")
    ]
    for mine, theirs in zip(*answers, strict=True):
        assert len(mine.token_ids) > 6 and mine.token_ids == theirs.token_ids


def test_weights_may_be_inputs_or_codes_beside_it(exported) -> None:
    for options in ({"dialect": "onnx", "weights": "inputs"}, {"quantize": "int8"}):
        answers = [
            Pipeline.open(exported("tiny", place, **options), threads=1).generate_batch(requests())
            for place in ("host", "device")
        ]
        assert_equal_to_the_last_bit(*answers)


@pytest.mark.parametrize(
    ("dialect", "runtime", "dtype"),
    [
        ("ort", "onnxruntime", "float32"),
        ("ort", "onnxruntime", "float16"),
        ("primitive", "openvino", "float32"),
    ],
)
def test_rows_of_a_table_in_codes_are_dequantised(
    exported, dialect: str, runtime: str, dtype: str
) -> None:
    """One that is the head, which is quantised, in blocks (`ort`) and with a scale per row."""
    bundles = [
        exported("qwen3_vl", place, quantize="int4", dialect=dialect, dtype=dtype)
        for place in ("host", "device")
    ]
    codes = f"{EMBEDDINGS}.int8"
    assert bundles[0].only("embed").looked_up == (codes, f"{codes}.scale")
    assert not bundles[0].only("embed").tensors
    answers = [
        Pipeline.open(each, runtime=runtime, threads=1).generate_batch(requests())
        for each in bundles
    ]
    assert_equal_to_the_last_bit(*answers)


def test_weights_are_attached_or_linked(exported, checkpoint, tmp_path: Path) -> None:
    given, model = {"schedule": SCHEDULE, "embeddings": "host", "progress": False}, "qwen3_vl"
    export_model(checkpoint(model), tmp_path / "graphs", graphs_only=True, **given)
    attached = attach_weights(tmp_path / "graphs", checkpoint(model), progress=False)
    linked = export_model(checkpoint(model), tmp_path / "linked", link_weights=True, **given)
    expected = Pipeline.open(exported(model, "host"), threads=1).generate_batch(requests())
    for bundle in (attached, linked):
        bundle.check(verify=True)
        bundle.check_places()
        got = Pipeline.open(bundle.with_end_tokens([]), threads=1).generate_batch(requests())
        assert_equal_to_the_last_bit(got, expected)


def test_the_oracle_finds_no_difference(exported, capsys: pytest.CaptureFixture[str]) -> None:
    for dialect in ("ort", "onnx"):
        assert main(["check", str(exported("llava", "host", dialect=dialect).path)]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert any(row.startswith("embed ") and row.endswith("ok") for row in rows)


def test_the_oracle_finds_rows_of_another_table(
    exported, checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the pipeline looks up is compared, not only what the graph makes of it."""
    folder = shutil.copytree(exported("llava", "host").path, tmp_path / "bundle")
    raw = json.loads((folder / MANIFEST).read_bytes())
    raw["tensors"][EMBEDDINGS] = raw["tensors"]["lm_head.weight"]
    (folder / MANIFEST).write_text(json.dumps(raw))
    assert main(["check", str(folder), "--checkpoint", str(checkpoint("llava"))]) != 0
    rows = capsys.readouterr().out.splitlines()
    assert not next(row for row in rows if row.startswith("embed ")).endswith("ok")


def test_inspect_says_who_looks_tokens_up(exported) -> None:
    assert f"rows of {EMBEDDINGS}, which the host looks up" in inspect(exported("tiny", "host"))
    assert "looks up" not in inspect(exported("tiny", "device"))


def test_a_token_beyond_the_table_is_named(exported) -> None:
    from trio_deploy.pipeline.token_table import TokenTable

    table = TokenTable.of(exported("tiny", "host"))
    assert table is not None
    with pytest.raises(TrioError, match="token 61 has no embedding, .* has 61 rows"):
        table.rows(np.array([3, 61]))
    # Placeholders of pictures may be beyond it.
    found = table.rows_for_text(np.array([[3, 999]]), np.array([[0, 2]]))
    assert np.array_equal(found[0], [*table.rows(np.array([3])), np.zeros(table.size)])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"looked_up": ["nothing.weight"]}, "the tensor nothing.weight of embed has no place"),
        ({"looked_up": ["language_model.norm.weight"]}, r"language_model.norm.weight is float32 "),
    ],
)
def test_a_manifest_that_names_another_table_is_refused(
    exported, tmp_path: Path, change: dict[str, Any], error: str
) -> None:
    folder = shutil.copytree(exported("tiny", "host").path, tmp_path / "bundle")
    raw = json.loads((folder / MANIFEST).read_bytes())
    next(stage for stage in raw["stages"] if stage["name"] == "embed").update(change)
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(TrioError, match=error):
        Pipeline.open(folder)


def test_triton_is_not_given_stages_that_need_rows_with_each_request(
    exported, tmp_path: Path
) -> None:
    bundle = exported("tiny", "host")
    with pytest.raises(TrioError, match="bring its token embeddings: leave out --stages"):
        write_repository(bundle, tmp_path / "out", Options(stages=True))
    assert write_repository(bundle, tmp_path / "out") == ["trio_vlm"]


def test_another_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrioError, match="unknown embeddings 'cpu': choose one of device, host"):
        export_model("tiny", tmp_path / "out", embeddings="cpu", progress=False)
    target = tmp_path / "mine.yaml"
    target.write_text("runtime: onnxruntime\ndtype: float32\nembeddings: hosts\n")
    with pytest.raises(TrioError, match=r"embeddings cannot be 'hosts' \(did you mean 'host'"):
        export_model("tiny", tmp_path / "out", target=target, progress=False)
