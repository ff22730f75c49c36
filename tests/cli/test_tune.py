"""`trio tune`: what it writes and prints."""

import shlex

import pytest
import yaml

from trio_deploy import Bundle, Schedule
from trio_deploy.cli.main import main
from trio_deploy.cli.tune import tuned_text
from trio_deploy.config.options import DEFAULT_THRESHOLD
from trio_deploy.evaluation.configurations import Configuration
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.evaluation.tune import Candidate, Ranked, Search, Tuned


@pytest.mark.parametrize("options", ["--budget 0", "--budget 1.5", "--candidates 0", "--points 9"])
def test_a_search_that_cannot_be_begun_writes_nothing(options, tmp_path, capsys):
    assert main(f"tune tiny --out {tmp_path / 'out'} --scenes 1 {options}".split()) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_searches_and_prints_the_command_that_exports_what_it_found(tmp_path, capsys):
    arguments = f"tune tiny --out {tmp_path} --scenes 1 --candidates 2 --points 1 --threads 1"
    assert main([*arguments.split(), "--runtime", "openvino", "--methods", "trio"]) == 0
    captured = capsys.readouterr()
    assert "schedules:" in captured.out and "same answer" in captured.out
    assert "wrote schedule.yaml" in captured.err
    command = captured.out.splitlines()[-1].replace("BUNDLE", str(tmp_path / "exported"))
    assert main(shlex.split(command)[1:]) == 0
    written = yaml.safe_load((tmp_path / "schedule.yaml").read_text(encoding="utf-8"))
    manifest = Bundle.load(tmp_path / "exported").manifest
    assert manifest.schedule == written["schedules"]["0.111"] and manifest.target == "cpu-openvino"
    assert manifest.threshold == written["threshold"]
    assert main(f"tune tiny --out {tmp_path} --budget 0.0001 --scenes 1 --threads 1".split()) == 1
    assert "no schedule of this model reaches" in capsys.readouterr().err


def test_a_file_to_start_with_keeps_what_its_schedule_was_found_with(tmp_path, monkeypatch):
    begun = []

    def begin(self, limit, start):
        begun.extend(self._known[key] for key in first(self, limit, start))
        return []

    first = Search.begin
    monkeypatch.setattr("trio_deploy.evaluation.tune.Tuner", lambda *_: None)
    monkeypatch.setattr(Search, "begin", begin)
    file = tmp_path / "found.yaml"
    file.write_text(
        'schedules:\n  "0.111":\n    - {layer: 3, keep: 0.02, method: trio}\n'
        "threshold: 0.65\nprobe: shifted\npositions: original\n"
    )
    arguments = f"tune tiny --out {tmp_path} --scenes 1 --candidates 1 --budget 0.3"
    assert main([*arguments.split(), "--start", str(file), "--start", "3:0.02:trio"]) == 1
    expected = [(0.65, "shifted", "original"), (DEFAULT_THRESHOLD, None, None)]
    found = [one for _, one in begun[1:]]
    assert [(one.threshold, one.probe, one.positions) for one in found] == expected


def test_the_table_has_how_far_finalists_are_behind_the_best():
    losses = (0.1, 0.1, 0.3, 0.3)
    ranking = [
        Ranked(
            Configuration(f"0:{keep}", Schedule.parse(f"0:{keep}"), 0.1, threshold=0.7),
            loss,
            0.5,
            10,
            Candidate(((0, 1.0, "trio"),), 0.7, None, None),
        )
        for keep, loss in enumerate(losses, 20)
    ]
    behind = [Estimate(0.0, 0.0, 0.0), Estimate(0.0, -0.1, 0.1)] + [Estimate(0.2, 0.1, 0.3)] * 2
    tuned = Tuned(0.1, ranking, Estimate(0.1, 0.05, 0.2), [(9, 5), (4, 10)], behind, "schedules:")
    first, _, *lines = tuned_text(tuned).splitlines()
    assert first == "schedules:" and len(lines) == len(losses)
    assert ["(level)" in line for line in lines] == [False, True, False, False]
    assert lines[1].count("+0.0000 (level)") == 1
    assert " +0.2000 (+0.1000 to +0.3000) " in lines[-1] and lines[-1].endswith("0:23  τ=0.7")
