"""What the page says in words."""

from __future__ import annotations

from trio_deploy import Schedule
from trio_deploy.report.page import dropped


def test_what_a_picture_loses_is_said_by_method():
    def said(text):
        return dropped(
            [{"layer": p.layer, "method": p.method} for p in Schedule.parse(text).points]
        )

    assert (
        said("1:8,2:4") == "What is dropped before layers 1 and 2 (trio) depends on the question."
    )
    blind, reads = said("0:8:divprune,3:6:divprune,8:4").split(" What")
    assert blind == (
        "What is dropped before layers 0 and 3 (divprune) does not depend on the question, which "
        "comes after the picture."
    )
    assert "before layer 8 (trio) depends" in reads
    assert "depends on" not in said("0:8:vscan").replace("not depend on", "")
    assert "layers 1 and 2 (fastv, random) depends" in said("1:8:fastv,2:4:random")
    assert dropped([]) == ""
