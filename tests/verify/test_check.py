"""`trio check` end to end: bundles agree with transformers, and broken ones are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.support.bfloat16 import pretend_bfloat16, round_products
from tests.support.bundles import make_speechless
from tests.support.checkpoints import make_llava, make_llava_next
from trio_deploy import Bundle, Pipeline, Request, Schedule, TrioError, check, export_model
from trio_deploy.cli import main as cli
from trio_deploy.reference.oracle import Oracle, Row
from trio_deploy.reference.restore import restore_model
from trio_deploy.runtimes import openvino_passes
from trio_deploy.schedule.budget import solve
from trio_deploy.verify.check import record
from trio_deploy.verify.compare import TOLERANCES, compare_selection
from trio_deploy.verify.examples import default_examples
from trio_deploy.verify.golden import GOLDEN, load
from trio_deploy.verify.report import format_report

SCHEDULE = "1:0.5,2:0.25,3:0.1"

# model, layout and heads; dialect, type and runtime; probe and positions
CASES = {
    "1.5 grouped": (make_llava, {}, "ort", "float32", "onnxruntime", "last", "renumber"),
    "1.5 llama3 rope, one key a query, biases": (
        make_llava,
        {"kv_heads": 4, "llama3_rope": True, "bias": True, "mlp_bias": True, "layout": "4.52"},
        "primitive",
        "float32",
        "onnxruntime",
        "last",
        "original",
    ),
    "next mistral hub": (
        make_llava_next,
        {"mistral": True, "layout": "hub", "shards": 2},
        "onnx",
        "float32",
        "onnxruntime",
        "shifted",
        "original",
    ),
    "next tied openvino": (
        make_llava_next,
        {"kv_heads": 1, "tie": True},
        "primitive",
        "float32",
        "openvino",
        "shifted",
        "renumber",
    ),
    "1.5 two feature layers, head size": (
        make_llava,
        {"feature_layer": [-3, -2], "head_dim": 32, "projector_bias": False},
        "ort",
        "float32",
        "onnxruntime",
        "shifted",
        "original",
    ),
    "next llama3 fp16": (
        make_llava_next,
        {"llama3_rope": True, "dtype": "float16"},
        "ort",
        "float16",
        "onnxruntime",
        "last",
        "renumber",
    ),
    "1.5 fp16": (
        make_llava,
        {"dtype": "float16"},
        "onnx",
        "float16",
        "onnxruntime",
        "last",
        "original",
    ),
    "1.5 bf16 checkpoint": (
        make_llava,
        {"dtype": "bfloat16", "kv_heads": 4},
        "primitive",
        "float32",
        "openvino",
        "last",
        "renumber",
    ),
}


def make_bundle(tmp: Path, case: str) -> tuple[Path, Path, str]:
    make, options, dialect, dtype, runtime, probe, positions = CASES[case]
    checkpoint = make(tmp / "checkpoint", **options)
    export_model(
        checkpoint,
        tmp / "bundle",
        schedule=SCHEDULE,
        dialect=dialect,
        dtype=dtype,
        probe=probe,
        positions=positions,
        progress=False,
    )
    return checkpoint, tmp / "bundle", runtime


def test_answers_are_compared_without_the_checkpoints_sampling(bundles, llava_checkpoint, tmp_path):
    bundle = make_speechless(bundles.copy(tmp_path / "b", llava_checkpoint, schedule="1:0.5"))
    with pytest.raises(TrioError, match="no token to choose"):
        Pipeline.open(bundle, threads=1).generate(Request("what ?"))
    report = check(bundle, threads=1)
    assert report.passed, format_report(report)


@pytest.mark.parametrize("case", CASES)
def test_graphs_agree_with_transformers(case, tmp_path):
    _, bundle, runtime = make_bundle(tmp_path, case)
    report = check(bundle, runtime=runtime, threads=2)
    assert report.passed, format_report(report)
    stages = [row.stage for row in report.rows]
    assert {"vision", "embed", "prefill_0", "select_3", "prefill_3"} <= set(stages)
    assert any("decode" in stage for stage in stages)
    if CASES[case][3] == "float32":
        assert all(row.tokens_equal is not False for row in report.rows)
        assert all(row.overlap in (None, 1.0) for row in report.rows)


@pytest.mark.parametrize(
    ("head_dim", "dialect", "dtype"),
    [
        (12, "ort", "float32"),
        (20, "ort", "float16"),
        (36, "ort", "float32"),
        (100, "ort", "float32"),
        (20, "onnx", "float32"),
        (36, "primitive", "float32"),
    ],
)
def test_heads_of_sizes_that_a_runtime_does_not_take_are_answered(
    head_dim, dialect, dtype, tmp_path
):
    """GroupQueryAttention takes multiples of 8; others are padded, in the cache as well."""
    checkpoint = make_llava(tmp_path / "checkpoint", head_dim=head_dim, dtype=dtype)
    bundle = export_model(
        checkpoint,
        tmp_path / "bundle",
        schedule="1:0.5,2:0.25",
        dialect=dialect,
        dtype=dtype,
        progress=False,
    )
    report = check(bundle, threads=2)
    assert report.passed, format_report(report)
    caches = {t.shape[3] for t in bundle.stages["prefill_1"].outputs_of("cache")}
    assert caches == {-(-head_dim // 8) * 8 if dialect == "ort" else head_dim}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parity")
    checkpoint, bundle, _ = make_bundle(folder, "1.5 grouped")
    return checkpoint, bundle


def test_a_budget_a_request_keeps_what_the_oracle_keeps(made):
    """One batch of the same question at several budgets, each row against the oracle alone."""
    bundle = Bundle.load(made[1])
    pipeline = Pipeline.open(bundle, threads=2)
    oracle = Oracle(restore_model(bundle))
    example = default_examples()[0]
    budgets = (0.4, 0.9, None, 1.0)
    requests = [
        Request(example.prompt, example.pictures, max_new_tokens=4, budget=budget)
        for budget in budgets
    ]
    prepared = pipeline.prepare(requests[0])
    (picture,) = prepared.processed
    row = Row(prepared.prompt.ids, picture.feeds["pixel_values"], [picture.size])
    ends = bundle.manifest.generation.eos_token_ids
    for budget, answer in zip(budgets, pipeline.generate_batch(requests), strict=True):
        schedule = bundle.schedule
        if budget is not None:
            schedule = solve(budget, bundle.config.text.num_layers, layers=schedule.layers)
        expected = oracle.generate_row(row, schedule, 4, ends)
        assert answer.token_ids == expected.token_ids
        for mine, theirs in zip(answer.kept, expected.kept, strict=True):
            assert mine.tolist() == theirs.tolist()


def test_pruning_before_the_first_layer(made, tmp_path):
    """There is no prefill_0 then: select_1 reads the embeddings."""
    export_model(made[0], tmp_path / "b", schedule="0:0.5,2:0.25", progress=False)
    report = check(tmp_path / "b", threads=2)
    assert report.passed, format_report(report)
    assert "prefill_0" not in [row.stage for row in report.rows]
    assert Schedule.parse("0:0.5,2:0.25") == Bundle.load(tmp_path / "b").schedule


def test_the_processor_is_compared_where_the_checkpoint_is_there(made):
    checkpoint, bundle = made
    report = check(bundle, checkpoint=checkpoint, threads=2)
    assert report.passed, format_report(report)
    assert "processor" in [row.stage for row in report.rows]


def test_a_checkpoint_that_is_not_there_is_not_looked_for_on_the_hub(made, tmp_path):
    for command in (check, record):
        with pytest.raises(TrioError, match="there is no folder .*gone"):
            command(made[1], checkpoint=tmp_path / "gone")


def test_another_checkpoint_is_beyond_tolerance(made, tmp_path, capsys):
    other = make_llava(tmp_path / "other", seed=1)
    _, bundle = made
    assert cli.main(["check", str(bundle), "--checkpoint", str(other), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    failed = {row["stage"] for row in rows if not row["passed"]}
    assert {"vision", "prefill_0", "select_1", "prefill_3", "answer 0"} <= failed


def test_a_recorded_reference_is_compared_without_torch(made, tmp_path):
    _, bundle = made
    with pytest.raises(TrioError, match="--record"):
        check(bundle, golden=True)
    record(bundle)
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers']))\n"
        "from trio_deploy.cli.main import main; sys.exit(main(['check', sys.argv[1], '--golden']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(bundle)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "recorded reference" in run.stdout and "all within" in run.stdout
    with np.load(bundle / GOLDEN, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    (bundle / GOLDEN).write_bytes((bundle / GOLDEN).read_bytes()[:-100] + bytes(100))
    with pytest.raises(TrioError, match="damaged"):
        check(bundle, golden=True)


def test_a_device_is_checked_with_the_provider_that_was_asked_for(made, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for ask in (check, record):
        with pytest.raises(TrioError, match="no CUDAExecutionProvider"):
            ask(made[1], provider="cuda")


def test_without_torch_it_says_what_to_install(made, monkeypatch):
    _, bundle = made
    for name in ("trio_deploy.reference.oracle", "trio_deploy.reference.restore"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TrioError, match=r"trio-deploy\[reference\]"):
        check(bundle, threads=2)

    def export(*args, **kwargs):
        raise AssertionError("it was exported")

    monkeypatch.setattr("trio_deploy.export.job.export_model", export)
    for command in (check, record):
        with pytest.raises(TrioError, match=r"needs torch: .*trio-deploy\[reference\]"):
            command("tiny", threads=2)


def test_selections_that_read_other_weights_in_bfloat16_are_noticed(bundles, tmp_path, monkeypatch):
    """The matrix that the saliency multiplies by from the other side is overwritten."""
    pretend_bfloat16(monkeypatch)
    bundle = record(bundles.copy(tmp_path / "b", "tiny", target="cpu-openvino"), threads=1)
    real = openvino_passes.Passes._from_the_right
    faults = {"none": lambda weight: weight, "zeros": np.zeros_like, "other numbers": np.flipud}

    def failed(fault: str) -> list[str]:
        def spoilt(self, product):
            left = product.input_value(0).get_node()
            if left.get_type_name() != "Transpose":  # of the forward pass
                return real(self, product)
            weight = openvino_passes._constant(product.input_value(0))
            changed = self._op.constant(np.ascontiguousarray(faults[fault](weight.data)))
            order = left.input_value(1)
            product.input(0).replace_source_output(self._op.transpose(changed, order).output(0))
            real(self, product)

        monkeypatch.setattr(openvino_passes.Passes, "_from_the_right", spoilt)
        report = check(bundle, golden=True, precision="bfloat16", threads=1)
        return [row.stage for row in report.rows if not row.passed]

    assert failed("none") == []
    assert failed("zeros") == failed("other numbers") == ["select_3"]


def run_with(model, changed, feeds):
    """Outputs of a graph with other weights by name; optimised, it might not round."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed[tensor.name], tensor.name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    inputs = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))


ATTENTION_AND_HEAD = tuple(
    f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
)


def test_half_of_a_weight_overwritten_is_noticed_in_bfloat16(bundles, tmp_path):
    """Sound scores differ in their proportions, too, but an order of magnitude less."""
    options = {"schedule": "0:0.6:divprune,3:0.4,8:0.2", "dialect": "primitive"}
    bundle = record(bundles.copy(tmp_path / "b", "tiny", **options), threads=1)
    # By this alone: the others notice some of the faults, and not all.
    tolerance = replace(TOLERANCES["bfloat16"], overlap=0.0, relative=np.inf)
    for name in ("select_2", "select_3"):
        stage, model = load(bundle).stages[name], onnx.load(bundle.graph(name))
        round_products(model)
        faults = {"none": {}}
        for tensor in model.graph.initializer:
            if tensor.name.endswith(ATTENTION_AND_HEAD):
                weight = onnx.numpy_helper.to_array(tensor)
                half = np.split(weight, 2, axis=1)[1]
                faults[tensor.name] = {tensor.name: np.concatenate([half, half], axis=1)}
        assert len(faults) == 1 + len(ATTENTION_AND_HEAD)
        for fault, changed in faults.items():
            got = run_with(model, changed, stage.inputs)
            row = compare_selection(name, stage, got, tolerance, 0.8)
            assert row.passed is (fault == "none"), (name, fault, row)
            assert row.passed or "beside a factor common to all tokens" in row.problem
