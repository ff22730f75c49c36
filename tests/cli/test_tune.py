"""`trio tune`: what it writes and prints."""

import pytest

from trio_deploy.cli.main import main


@pytest.mark.parametrize("options", ["--budget 0", "--budget 1.5", "--candidates 0", "--points 9"])
def test_a_search_that_cannot_be_begun_writes_nothing(options, tmp_path, capsys):
    assert main(f"tune tiny --out {tmp_path / 'out'} --scenes 1 {options}".split()) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_searches(tmp_path, capsys):
    arguments = f"tune tiny --out {tmp_path} --scenes 1 --candidates 2 --points 1 --threads 1"
    assert main(arguments.split()) == 0
    captured = capsys.readouterr()
    assert "schedules:" in captured.out and "same answer" in captured.out
    assert "wrote schedule.yaml" in captured.err
    assert main(f"tune tiny --out {tmp_path} --budget 0.0001 --scenes 1 --threads 1".split()) == 1
    assert "no schedule of this model reaches" in capsys.readouterr().err
