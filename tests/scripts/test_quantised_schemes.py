"""What schemes change: how it is measured, and the page that is made of the figures."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from scripts import quantised_schemes
from scripts.quantised_schemes import OUT, PAGE, compare, measure, page
from trio_deploy.pipeline.request import Generation


def answer(tokens: list[int], kept: list[int]) -> Generation:
    """An answer to a prompt whose tokens 2 to 9 are visual, pruned at one point."""
    return Generation(
        "", tokens, "stop", {}, 0.0, 0.0, 12, np.arange(2, 10), [np.array(kept)], [], 0, 0
    )


def test_text_is_no_agreement_of_kept_tokens() -> None:
    """Text is always kept: of four visual tokens one is the same, of six tokens three."""
    found = compare([answer([5, 6], [0, 1, 2, 3, 4, 5])], [answer([5, 7], [0, 1, 5, 6, 7, 8])])
    assert found == {"overlap": [0.25], "first": 1.0, "answer": 0.0}


def test_every_kind_of_scheme_is_exported_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_schemes, "_EACH", 1)
    asked = {"title": "", "schemes": "int4,fp8", "scenes": 0, "tokens": 32}
    *_, found = measure(argparse.Namespace(model="tiny", schedule="8:0.2", threads=1, **asked))
    assert found["tokens"] == 24
    floats, int4, fp8 = found["rows"]
    assert floats["weights"] == "all in float32"
    assert "in 4 bit" in int4["weights"] and "in 4 bit" not in fp8["weights"]
    perplexities = {row["perplexity"] for row in found["rows"]}
    assert len(perplexities) == 3 and None not in perplexities


def test_the_page_is_made_of_what_is_recorded() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(OUT.read_text(encoding="utf-8")))
