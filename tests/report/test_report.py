"""`trio report`: one page, whole, escaped, that asks nothing of the network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.page import EVIL, Page
from tests.support.pictures import make_picture
from trio_deploy import TrioError, export_model
from trio_deploy.report.examples import Asked
from trio_deploy.report.facts import arithmetic, exported, schedule
from trio_deploy.report.gather import ReportOptions
from trio_deploy.report.page import render
from trio_deploy.report.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip


def test_it_says_what_was_exported_and_what_it_costs(page, bundle):
    text = Page(page.read_text()).text
    assert bundle.manifest.model.name in text
    for stage in bundle.stages:
        assert stage in text
    assert "by trio" in text and "layers 2 – 3" in text
    assert "KV cache" in text and "no pruning" in text and "2 runs by turns" in text


def test_the_headline_is_the_figure_of_the_bundles_own_configuration(page):
    text = " ".join(Page(page.read_text()).text.split())
    assert "Right answers kept92 %" in text and "at 40.0 % of the tokens" in text
    assert "90.0% – 93.0%" in text and "trio, this bundle 1:8, 2:4" in text
    assert "trio 1:12, 2:4" in text and "None of these" not in text


def test_pictures_are_inside_the_page_a_panel_a_pruning_point(page):
    images = Page(page.read_text()).all("img")
    assert len(images) == 2 * 3
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert [image["alt"] for image in images[:3]] == [
        "all: 16 tokens", "from layer 1: 8 of 16", "from layer 2: 4 of 16",
    ]  # fmt: skip


def test_nothing_is_loaded_and_nothing_runs(page):
    found = Page(page.read_text())
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form", "a", "audio"}
    assert [link for link in found.all("link") if link] == []
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    styles = re.search(r"<style>(.*)</style>", page.read_text(), re.DOTALL)[1]
    assert "url(" not in styles and "@import" not in styles
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for key in ("src", "href", "srcset", "data", "action", "background"):
            assert str(attributes.get(key, "data:")).startswith("data:")


def test_what_bundles_and_users_say_is_escaped(page, bundle):
    content = page.read_text()
    assert "<script" not in content and '<img src="https' not in content
    assert EVIL in Page(content).text
    parts = {
        "bundle": exported(bundle) | {"name": EVIL, "facts": [(EVIL, EVIL)]},
        "schedule": schedule(bundle) | {"points": [{"layer": 1, "keep": 8, "method": EVIL}]},
        "arithmetic": arithmetic(bundle),
        **{part: {"skipped": EVIL} for part in ("cost", "parity", "accuracy", "answers")},
    }
    content = render(parts)
    assert "<script" not in content and "https://evil.example" in Page(content).text
    assert [tag for tag, _ in Page(content).tags if tag == "img"] == []


def test_graphs_alone_make_a_page_that_says_what_is_missing(tmp_path, llava_checkpoint):
    planned = export_model(
        llava_checkpoint, tmp_path / "b", schedule="1:8", graphs_only=True, progress=False
    )
    text = Page(write_report(planned, tmp_path / "r.html", progress=False).read_text()).text
    assert "no weights yet" in text and "select_1" in text and "KV cache" in text


def test_a_bundle_that_prunes_nothing_has_a_page(tmp_path, llava_checkpoint):
    from trio_deploy import Schedule

    whole = export_model(llava_checkpoint, tmp_path / "b", schedule=Schedule(), progress=False)
    wanted = ReportOptions(
        check=False, measure=False, scenes=0, asked=[Asked("hi", (make_picture(),))]
    )
    text = Page(write_report(whole, tmp_path / "r.html", wanted, progress=False).read_text()).text
    assert "prunes nothing" in text and "Left out." in text


def test_a_page_is_there_wholly_or_not_at_all(bundle, tmp_path, monkeypatch):
    wanted = ReportOptions(
        check=False, measure=False, scenes=0, asked=[Asked("hi", (Path("none.png"),))]
    )
    with pytest.raises(TrioError):
        write_report(bundle, tmp_path / "r.html", wanted, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrioError, match="folder that exists"):
        write_report(bundle, tmp_path / "none" / "r.html", wanted, progress=False)
    with pytest.raises(TrioError, match="folder that exists"):
        write_report(bundle, tmp_path, wanted, progress=False)
    with pytest.raises(TrioError, match="lies in the bundle"):
        write_report(bundle, bundle.path / "manifest.json", wanted, progress=False)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_cuts_nothing_off(bundle, page, tmp_path, width):
    """In a frame of that width, since a browser's window cannot be as narrow as a telephone."""
    measure = """<script>onload = () => {
      const all = (s) => [...document.querySelectorAll(s)], seen = (e) => e.getClientRects().length;
      const wide = (e) => e.scrollWidth > e.clientWidth + 1;
      const plots = "svg.chart.retention";
      const labels = all(plots + " text.x").filter(seen).map((e) => e.getBoundingClientRect());
      parent.document.title = JSON.stringify({
        page: document.documentElement.scrollWidth,
        plots: all(plots).filter(seen).map((e) => e.getBoundingClientRect().width),
        text: labels.map((r) => r.height),
        touching: labels.some((r, i) => i && r.left < labels[i - 1].right),
        arithmetic: wide(document.querySelector("table.fits").parentNode),
        hints: all(".scroll").filter(wide).every(
          (e) => getComputedStyle(e).backgroundImage.split("linear-gradient").length === 5),
      });
    };</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", measure)
    frame = tmp_path / "frame.html"
    source = html.escape(text, quote=True)
    frame.write_text(f'<title>x</title><iframe width={width} height=900 srcdoc="{source}" '
                     'style="border:0"></iframe>')  # fmt: skip
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1200,900", frame.as_uri()]  # fmt: skip
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "LANG": "C"}
    )
    title = re.search(r"<title>(.*?)</title>", out.stdout, re.DOTALL)
    seen = json.loads(html.unescape(title[1]))
    assert seen["page"] <= width  # nothing but tables scrolls sideways
    assert len(seen["plots"]) == 1 and seen["plots"][0] <= width
    assert seen["text"] and min(seen["text"]) >= 11  # and yet can be read
    assert not seen["touching"] and not seen["arithmetic"] and seen["hints"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_shows_it_and_asks_for_nothing_else(page, tmp_path, width):
    log = tmp_path / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        f"--log-net-log={log}", "--net-log-capture-mode=Default",
        f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "LANG": "C"}
    )
    assert out.returncode == 0, out.stderr
    shown = Page(out.stdout)
    assert len(shown.all("h2")) == 6 and len(shown.all("img")) == 6
    assert EVIL in shown.text and not shown.all("script")
    assert "violates the following Content Security Policy" not in out.stderr
    asked = set(re.findall(r'"url":\s*"(https?://[^"]+)"', log.read_text())) if log.exists() else ()
    assert not [url for url in asked if "evil" in url]
    assert (tmp_path / "page.png").stat().st_size > 10_000
