"""Selections that are cut at the output head give what they gave whole."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from scripts import probe_head
from scripts.probe_head import Selections, cut, feeds_of, write_parts
from tests.support.bundles import Bundles
from trio_deploy import Bundle

SCHEDULE = "2:0.5,6:0.3"


@pytest.mark.parametrize(
    ("dialect", "quantize"), [("ort", "none"), ("ort", "int4"), ("primitive", "int8")]
)
def test_parts_with_one_head_give_the_outputs_of_the_whole(
    dialect: str, quantize: str, bundles: Bundles, tmp_path
) -> None:
    options = {"schedule": SCHEDULE, "dialect": dialect, "quantize": quantize}
    bundle = Bundle.load(bundles.path("tiny", **options))
    paths = write_parts(bundle, tmp_path)
    feeds = dict.fromkeys(paths, feeds_of(bundle, 100))
    whole = dict(Selections(paths, "onnxruntime", ("whole",)).run(feeds))
    parts = Selections(paths, "onnxruntime", ("before", "head", "after"))
    assert len({id(engines[1]) for engines in parts.engines.values()}) == 1 < len(parts.engines)
    for stage, values in parts.run(feeds):
        for name in onnx.load(paths[stage]["whole"], load_external_data=False).graph.output:
            np.testing.assert_array_equal(values[name.name], whole[stage][name.name])
    for stage in paths:
        for part in ("before", "after"):
            model = onnx.load(paths[stage][part], load_external_data=False)
            assert not any(t.name.startswith("lm_head") for t in model.graph.initializer)


def test_a_selection_without_a_head_is_refused(bundles: Bundles) -> None:
    bundle = Bundle.load(bundles.path("tiny", schedule="2:0.5:divprune"))
    stage = next(iter(bundle.of_kind("select")))
    with pytest.raises(ValueError, match="has 0 products with the head"):
        cut(onnx.load(bundle.graph(stage.name), load_external_data=False))


def test_the_command_prints_what_it_compared(bundles: Bundles, monkeypatch, capsys) -> None:
    path = bundles.path("tiny", schedule=SCHEDULE)
    command = ["probe_head.py", str(path), "--tokens", "50", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", command)
    probe_head.main()
    printed = capsys.readouterr().out
    assert "all outputs of the parts are those of the whole to the bit: yes" in printed
    assert printed.count("memory, ") == 2 and "parts take" in printed
