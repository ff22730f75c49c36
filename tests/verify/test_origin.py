"""`trio check --checkpoint`: a bundle against the files that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_llava
from trio_deploy import Bundle, TrioError, check, export_model
from trio_deploy.bundle.describe import inspect
from trio_deploy.cli import main as cli
from trio_deploy.export.attach import attach_weights
from trio_deploy.verify.check import record
from trio_deploy.verify.origin import compare_origin
from trio_deploy.verify.report import format_report

SCHEDULE = "1:0.5"
HEAD = "language_model.lm_head.weight"
TABLE = "language_model.model.embed_tokens.weight"


def _reweigh(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors[HEAD] = torch.randn(tensors[TABLE].shape, generator=generator) * 0.2


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A checkpoint that config.json ties and that holds no head."""
    return make_llava(tmp_path_factory.mktemp("tied") / "c", tie=True, layers=2)


@pytest.fixture(scope="module")
def own_head(tied, tmp_path_factory) -> Path:
    """The same configuration, with a head of its own among the weights."""
    folder = Path(shutil.copytree(tied, tmp_path_factory.mktemp("own") / "c"))
    _reweigh(folder, _other_head)
    return folder


@pytest.fixture(scope="module")
def bundle(tied, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export_model(tied, out, schedule=SCHEDULE, progress=False).path


def _failed(bundle: Path, checkpoint: Path, capsys) -> dict[str, str]:
    assert cli.main(["check", str(bundle), "--checkpoint", str(checkpoint), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    return {row["stage"]: row["problem"] for row in rows if not row["passed"]}


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_a_head_of_its_own_answers_as_transformers_does(own_head, tmp_path, capsys, dialect):
    it = export_model(own_head, tmp_path / "b", schedule=SCHEDULE, dialect=dialect)
    assert "that head is used, as transformers does" in capsys.readouterr().err
    assert "lm_head.weight" in it.manifest.tensors
    assert not it.config.text.tie_word_embeddings
    assert "output head: its own tensor" in inspect(it)
    for checkpoint in (own_head, None):  # transformers' load, and the bundle's own weights
        report = check(it, checkpoint=checkpoint, threads=1)
        assert report.passed, format_report(report)


def test_a_head_without_embeddings_serves_as_both(tied, tmp_path):
    folder = Path(shutil.copytree(tied, tmp_path / "c"))
    _reweigh(folder, lambda tensors: tensors.update({HEAD: tensors.pop(TABLE)}))
    it = export_model(folder, tmp_path / "b", schedule=SCHEDULE, progress=False)
    report = check(it, checkpoint=folder, threads=1)
    assert report.passed, format_report(report)


def test_a_bundle_with_the_wrong_head_fails_in_its_logits(bundle, own_head, capsys):
    failed = _failed(bundle, own_head, capsys)
    assert failed.keys() >= {"headers of weights", "output head", "prefill_1"}
    assert "answer 0" in failed
    assert failed["headers of weights"].endswith("model.safetensors")
    assert failed["output head"] == (
        "the output head is a tensor of its own there and the embeddings in the bundle"
    )
    assert "config.json" not in failed


def test_without_a_checkpoint_the_check_says_so(bundle, tied, capsys):
    assert cli.main(["check", str(bundle), "--threads", "1"]) == 0
    assert "not compared with the checkpoint" in capsys.readouterr().out
    assert cli.main(["check", str(bundle), "--checkpoint", str(tied), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "not compared" not in text
    assert {"config.json", "headers", "output"} <= {
        line.split()[0] for line in text.split("\n") if line
    }


def test_a_recorded_reference_says_that_no_weights_of_the_checkpoint_were_compared(
    bundle, tied, tmp_path
):
    other = Path(shutil.copytree(tied, tmp_path / "c"))
    _reweigh(other, lambda tensors: tensors[TABLE].mul_(2))
    recorded = record(shutil.copytree(bundle, tmp_path / "b"), threads=1)
    report = check(recorded, golden=True, checkpoint=other, threads=1)
    assert report.passed  # on the weights of another checkpoint
    assert report.title.endswith("; of the checkpoint only config.json and headers compared")
    assert "only config.json" not in check(recorded, checkpoint=tied, threads=1).title


def test_a_config_json_that_was_edited_is_seen_but_not_its_layout(bundle, tied, tmp_path):
    folder = Path(shutil.copytree(tied, tmp_path / "c"))
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    loaded = Bundle.load(bundle)
    file.write_text(json.dumps(raw, indent=7))
    assert all(row.passed for row in compare_origin(loaded, folder))
    file.write_text(json.dumps(raw | {"pad_token_id": 2}))
    assert [row.stage for row in compare_origin(loaded, folder) if not row.passed] == [
        "config.json"
    ]


def test_a_bundle_of_before_has_config_json_and_the_head_to_compare(bundle, tied, own_head):
    loaded = Bundle.load(bundle)
    older = Bundle(loaded.path, msgspec.structs.replace(loaded.manifest, checkpoint=None))
    assert [row.stage for row in compare_origin(older, tied)] == ["config.json", "output head"]
    assert [row.passed for row in compare_origin(older, own_head)] == [True, False]


def test_inspect_names_what_was_left_out(bundle):
    loaded = Bundle.load(bundle)
    assert "output head: the embeddings" in inspect(loaded)
    assert "left out" not in inspect(loaded)
    assert loaded.manifest.checkpoint is not None
    info = msgspec.structs.replace(loaded.manifest.checkpoint, unused=("a.bias", "b.bias"))
    changed = Bundle(bundle, msgspec.structs.replace(loaded.manifest, checkpoint=info))
    assert "left out, without a use in config.json: a.bias and 1 more" in inspect(changed)


def test_a_checkpoint_of_another_model_is_refused(bundle, llava_checkpoint):
    with pytest.raises(TrioError, match=r"is not a checkpoint of .*num_layers is 4 there and 2"):
        check(bundle, checkpoint=llava_checkpoint)


def test_weights_with_a_head_of_their_own_do_not_fit_graphs_that_tie_it(tied, own_head, tmp_path):
    planned = export_model(
        tied, tmp_path / "b", schedule=SCHEDULE, graphs_only=True, progress=False
    )
    with pytest.raises(TrioError, match="the output head is a tensor of its own there"):
        attach_weights(planned, own_head, progress=False)
    it = attach_weights(planned, tied, progress=False)
    assert it.manifest.checkpoint is not None
    assert it.manifest.checkpoint.tied


def test_graphs_alone_take_the_head_that_the_weights_at_hand_have(own_head, tmp_path):
    planned = export_model(
        own_head, tmp_path / "b", schedule=SCHEDULE, graphs_only=True, progress=False
    )
    assert "lm_head.weight" in planned.manifest.tensors
    assert attach_weights(planned, own_head, progress=False).manifest.weights == "copied"
