"""`trio tune`: what it writes and prints."""

import shlex

import pytest
import yaml

from trio_deploy import Bundle, Schedule
from trio_deploy.cli.main import main
from trio_deploy.cli.tune import tuned_text
from trio_deploy.evaluation.configurations import Configuration
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.evaluation.tune import Candidate, Ranked, Tuned


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
