"""What a bundle says of itself."""

from __future__ import annotations

import shutil
from dataclasses import replace

import msgspec

from tests.support.page import Page
from tests.support.pictures import make_picture
from trio_deploy import Bundle
from trio_deploy.report.examples import Asked
from trio_deploy.report.facts import exported
from trio_deploy.report.gather import ReportOptions
from trio_deploy.report.report import write_report


def test_it_says_what_other_budgets_keep_where_the_recipe_does(bundle):
    manifest = msgspec.structs.replace(bundle.manifest, budgets={"0.5": [8, 4], "0.7": [12, 8]})
    facts = dict(exported(replace(bundle, manifest=manifest))["facts"])
    assert facts["At a budget of 0.7"] == "1:12, 2:8" and "At a budget of 0.5" not in facts


def test_engines_are_those_that_the_build_recorded(bundle, tmp_path):
    from trio_deploy.config.target import Limits
    from trio_deploy.runtimes.tensorrt.record import Gpu, Record, StageRecord

    copy = shutil.copytree(bundle.path, tmp_path / "b")
    folder = copy / "engines" / "orin"
    folder.mkdir(parents=True)
    stage = StageRecord("vision.engine", "0" * 64, 2**20, "0" * 64, "0" * 64, ())
    limits = Limits(max_batch=1, max_text_tokens=64, max_visual_tokens=576, max_new_tokens=64)
    Record("orin", "8.6.1", Gpu("Orin", "8.7", "540.3"), "primitive", "float16", "separate",
           limits, {"vision": stage}).save(folder)  # fmt: skip
    (copy / "engines" / "thor").mkdir()
    (copy / "engines" / "thor" / "record.json").write_text("{")
    good, bad = exported(Bundle.load(copy))["engines"]
    assert (good["target"], good["library"], good["stages"]) == ("orin", "TensorRT 8.6.1", "1")
    assert "Orin" in good["gpu"] and good["size"] == "1 MiB"
    assert bad["target"] == "thor" and "not valid JSON" in bad["problem"]
    wanted = ReportOptions(
        check=False, measure=False, scenes=0, asked=[Asked("hi", (make_picture(),))]
    )
    text = Page(write_report(copy, tmp_path / "r.html", wanted, progress=False).read_text()).text
    assert "TensorRT engines" in text and "540.3" in text
