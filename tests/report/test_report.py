"""`trio report`: one page, whole, escaped, that asks nothing of the network."""

from __future__ import annotations

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from tests.support.pictures import make_picture
from trio_deploy import Bundle, Schedule, TrioError, export_model
from trio_deploy.bench.measure import BenchOptions, measure
from trio_deploy.bench.table import write
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.cli import main as cli
from trio_deploy.evaluation.results import KindResult, Result, Results
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.files import sha256_of
from trio_deploy.report import gather
from trio_deploy.report.charts import bench_chart
from trio_deploy.report.page import dropped, render
from trio_deploy.report.report import Asked, Wanted, asked_about, write_report

EVIL = '<script>alert(1)</script><img src="https://evil.example/x.png">&"\''
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def bundle(llava_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("report") / "b"
    return export_model(llava_checkpoint, out, schedule="1:8,2:4", progress=False)


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory) -> Path:
    """What `trio bench --out` writes about it."""
    out = tmp_path_factory.mktemp("figures") / "bench"
    options = BenchOptions(
        text_tokens=20, new_tokens=3, runs=2, warm_up=0, baselines=(), memory=False
    )
    result = {"command": "trio bench", **measure(bundle, options, progress=False)}
    return write(result, out, bench_chart(result))[0]


def made_up(bundle, *results, **more) -> Results:
    """Results of (name, share of tokens, retained, schedule, options)."""

    def result(name, share, retained, schedule=None, options=None):
        estimate = Estimate(retained, retained - 0.02, retained + 0.01)
        kind = KindResult(20, retained, 0.1, estimate, estimate)
        return Result(
            name, share, share, schedule, options or {}, kind, estimate, {"colour": kind}, None
        )

    found = [result("unpruned", 1.0, 1.0), *(result(*one) for one in results)]
    return Results(bundle.manifest.model.name, "made up", "exact", {"cpu": "x"}, 20, 5, found,
                   scored=20, **more)  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(bundle, tmp_path_factory) -> Path:
    """What `trio eval` writes, of made-up figures; the bundle's own configuration is the second."""
    results = made_up(
        bundle,
        ("random", 0.4, 0.4, bundle.schedule.with_method("random")),
        ("trio", 0.4, 0.92, bundle.schedule),
        ("trio", 0.6, 0.99, Schedule.parse("1:12,2:4")),
    )
    folder = tmp_path_factory.mktemp("eval")
    results.save(folder)
    return folder / "results.json"


@pytest.fixture(scope="module")
def page(bundle, measured, evaluated, tmp_path_factory) -> Path:
    wanted = Wanted(
        bench=measured,
        evaluation=evaluated,
        asked=[Asked(EVIL, (make_picture(),), "4"), Asked("how many ?", (make_picture(seed=1),))],
        check=False,
    )
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(bundle, out, wanted, progress=False)


def test_it_says_what_was_exported_and_what_it_costs(page, bundle):
    text = Page(page.read_text()).text
    assert bundle.manifest.model.name in text
    for stage in bundle.stages:
        assert stage in text
    assert "by trio" in text and "layers 2 – 3" in text
    assert "KV cache" in text and "no pruning" in text and "2 runs by turns" in text


def test_it_says_what_other_budgets_keep_where_the_recipe_does(bundle):
    manifest = structs.replace(bundle.manifest, budgets={"0.5": [8, 4], "0.7": [12, 8]})
    facts = dict(gather.exported(replace(bundle, manifest=manifest))["facts"])
    assert facts["At a budget of 0.7"] == "1:12, 2:8" and "At a budget of 0.5" not in facts


def test_the_headline_is_the_figure_of_the_bundles_own_configuration(page):
    text = " ".join(Page(page.read_text()).text.split())
    assert "Right answers kept92 %" in text and "at 40.0 % of the tokens" in text
    assert "90.0% – 93.0%" in text and "trio, this bundle 1:8, 2:4" in text
    assert "trio 1:12, 2:4" in text and "None of these" not in text


def test_no_headline_where_the_bundles_own_configuration_was_not_measured(bundle):
    """The first configuration of an evaluation may be of any method."""
    other = made_up(bundle, ("fastv@1", 0.11, 0.71, Schedule.parse("1:1:fastv")))
    found = gather._accuracy(other, bundle)
    assert found["headline"] is None and not any(row["own"] for row in found["rows"])
    assert "None of these is this bundle as it is (1:8, 2:4;" in found["without"]
    parts = {
        "bundle": gather.exported(bundle),
        "schedule": gather.schedule(bundle),
        "arithmetic": gather.arithmetic(bundle),
        "accuracy": {**found, "quick": False},
        **{part: {"skipped": "no"} for part in ("cost", "parity", "answers")},
    }
    text = Page(render(parts)).text
    assert "Right answers kept" not in text and "None of these is this bundle" in text


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, True),
        ({"threshold": 0.8}, True),
        ({"threshold": 0.7}, False),
        ({"probe": "shifted"}, False),
        ({"positions": "original"}, False),
    ],
)
def test_another_option_is_another_configuration(bundle, options, own):
    found = gather._accuracy(made_up(bundle, ("x", 0.4, 0.9, bundle.schedule, options)), bundle)
    assert (found["headline"] == (0.9, 0.4)) is own


def test_options_that_an_evaluation_does_not_name_are_the_measured_bundles_or_the_models(bundle):
    ours = replace(bundle, manifest=structs.replace(bundle.manifest, threshold=0.6))
    exported_anew = made_up(ours, ("x", 0.4, 0.9, bundle.schedule))
    assert gather._accuracy(exported_anew, ours)["headline"] is None
    itself = replace(exported_anew, bundle=sha256_of(bundle.path / MANIFEST))
    assert gather._accuracy(itself, ours)["headline"] == (0.9, 0.4)


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
        "bundle": gather.exported(bundle) | {"name": EVIL, "facts": [(EVIL, EVIL)]},
        "schedule": gather.schedule(bundle) | {"points": [{"layer": 1, "keep": 8, "method": EVIL}]},
        "arithmetic": gather.arithmetic(bundle),
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
    wanted = Wanted(check=False, measure=False, scenes=0, asked=[Asked("hi", (make_picture(),))])
    text = Page(write_report(whole, tmp_path / "r.html", wanted, progress=False).read_text()).text
    assert "prunes nothing" in text and "Left out." in text


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
    good, bad = gather.exported(Bundle.load(copy))["engines"]
    assert (good["target"], good["tensorrt"], good["stages"]) == ("orin", "8.6.1", "1")
    assert "Orin" in good["gpu"] and good["size"] == "1 MiB"
    assert bad["target"] == "thor" and "not valid JSON" in bad["problem"]
    wanted = Wanted(check=False, measure=False, scenes=0, asked=[Asked("hi", (make_picture(),))])
    text = Page(write_report(copy, tmp_path / "r.html", wanted, progress=False).read_text()).text
    assert "TensorRT engines" in text and "540.3" in text


def test_parity_comes_from_the_reference_or_the_recorded_one(bundle, monkeypatch):
    from trio_deploy.verify import check as parity
    from trio_deploy.verify.compare import ParityRow

    seen = {}
    rows = [ParityRow("embed"), ParityRow("select_1", overlap=1.0, problem="too far")]

    def check(*args, **kwargs):
        seen.update(kwargs)
        return parity.Report("a check", rows)

    monkeypatch.setattr(parity, "check", check)
    monkeypatch.setattr(gather, "_has_torch", lambda: True)
    found = gather.check(bundle, {"threads": 1})
    assert seen == {"golden": False, "threads": 1}
    assert found["passed"] == 1 and found["rows"][1]["problem"] == "too far"
    monkeypatch.setattr(gather, "_has_torch", lambda: False)
    assert "--record" in gather.check(bundle, {})["skipped"]
    monkeypatch.setattr(gather, "GOLDEN", "manifest.json")  # something that is there
    gather.check(bundle, {})
    assert seen["golden"] is True


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "no measurements"), ("no json", "no measurements"), (None, "no measurements")],
)
def test_figures_that_are_none_are_refused(bundle, tmp_path, content, words):
    file = tmp_path / "f.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrioError, match=words):
        gather.read_bench(file, bundle)


def test_figures_of_another_model_are_refused(bundle, measured, evaluated, tmp_path):
    raw = json.loads(measured.read_text())
    raw["model"]["name"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match="about another"):
        gather.read_bench(tmp_path / "bench.json", bundle)
    raw = json.loads(evaluated.read_text()) | {"model": "another"}
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match="about another"):
        gather.accuracy(bundle, tmp_path / "results.json", 0, {}, progress=False)


def test_a_sweep_is_not_what_a_page_shows(bundle, measured, tmp_path):
    raw = json.loads(measured.read_text())
    del raw["cases"]
    (tmp_path / "sweep.json").write_text(json.dumps(raw | {"points": []}))
    with pytest.raises(TrioError, match="no measurements of trio bench"):
        gather.read_bench(tmp_path / "sweep.json", bundle)


def test_questions_and_pictures_go_together():
    a, b = Path("a.png"), Path("b.png")
    assert [(q.images, q.prompt) for q in asked_about([a, b], ["x"])] == [((a,), "x"), ((b,), "x")]
    assert [q.prompt for q in asked_about([a], ["x", "y"])] == ["x", "y"]
    assert asked_about([], []) == []
    for images, prompts in (([a], []), ([], ["x"]), ([a, b, a], ["x", "y"])):
        with pytest.raises(TrioError, match="do not go together"):
            asked_about(images, prompts)


def test_a_quick_accuracy_is_that_of_the_bundles_own_schedule(bundle, monkeypatch):
    asked = {}

    def evaluate(source, questions, configurations, out, **options):
        asked.update(configurations=configurations, questions=questions, **options)
        raise TrioError("enough")

    monkeypatch.setattr(gather, "evaluate", evaluate)
    with pytest.raises(TrioError, match="enough"):
        gather.accuracy(bundle, None, 2, {"threads": 1}, progress=False)
    assert asked["options"].threads == 1
    own, *more = asked["configurations"]
    assert own.schedule == bundle.schedule and len(asked["questions"]) == 32
    assert own.budget == pytest.approx((16 + 8 + 2 * 4) / 4 / 16)
    assert all(other.budget > own.budget and other.schedule is None for other in more)
    assert "skipped" in gather.accuracy(bundle, None, 0, {}, progress=False)


def test_the_default_questions_are_about_the_test_split():
    from trio_deploy.evaluation.scenes import TEST_SEEDS

    asked = gather.default_questions()
    assert len(asked) == 4 and asked[0].images == asked[1].images
    assert asked[0].prompt != asked[1].prompt and all(q.truth for q in asked)
    assert all(seed in TEST_SEEDS for seed, _, _ in gather._SCENES)


def test_a_page_is_there_wholly_or_not_at_all(bundle, tmp_path, monkeypatch):
    wanted = Wanted(check=False, measure=False, scenes=0, asked=[Asked("hi", (Path("none.png"),))])
    with pytest.raises(TrioError):
        write_report(bundle, tmp_path / "r.html", wanted, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrioError, match="folder that is there"):
        write_report(bundle, tmp_path / "none" / "r.html", wanted, progress=False)
    with pytest.raises(TrioError, match="folder that is there"):
        write_report(bundle, tmp_path, wanted, progress=False)
    with pytest.raises(TrioError, match="lies in the bundle"):
        write_report(bundle, bundle.path / "manifest.json", wanted, progress=False)


def test_the_command_hands_on_what_was_asked(monkeypatch, capsys):
    from trio_deploy.report import report

    seen = {}
    monkeypatch.setattr(
        report, "write_report", lambda *args: seen.update(args=args) or Path("p.html")
    )
    command = (
        "report b --out p.html --bench f.json --eval e.json --image a.png --prompt hi --scenes 0 "
        "--no-check --no-bench --runtime openvino --threads 2"
    )
    assert cli.main(command.split()) == 0
    bundle, out, wanted = seen["args"]
    assert (bundle, out) == (Path("b"), Path("p.html"))
    assert wanted == Wanted(
        Path("f.json"), Path("e.json"), [Asked("hi", (Path("a.png"),))], False, False, 0,
        "openvino", None, 2,
    )  # fmt: skip
    assert capsys.readouterr().out == "p.html\n"


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
