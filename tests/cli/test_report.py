"""`trio report`: its options."""

from __future__ import annotations

from pathlib import Path

from trio_deploy import RuntimeOptions
from trio_deploy.cli import main as cli
from trio_deploy.report.examples import Asked
from trio_deploy.report.gather import ReportOptions


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
    assert (bundle, out) == ("b", Path("p.html"))
    assert wanted == ReportOptions(
        Path("f.json"), Path("e.json"), [Asked("hi", (Path("a.png"),))], False, False, 0,
        RuntimeOptions("openvino", threads=2),
    )  # fmt: skip
    assert capsys.readouterr().out == "p.html\n"
