"""Children with limits: what they may not exceed, and what they say of themselves."""

from __future__ import annotations

import signal

from tests.support.limited import limited_python, run_limited


def test_a_command_that_works_tells_what_it_took(tmp_path):
    done = run_limited("--version")
    assert done.rc == 0
    assert 5 < done.peak_mib < 500
    assert 0 < done.cpu_s < 20


def test_the_error_of_a_command_is_its_one_line(tmp_path):
    assert "nothing" in run_limited("inspect", tmp_path / "nothing").one_error()


def test_memory_beyond_the_limit_is_not_there():
    done = limited_python("b'x' * (400 << 20)", memory_mib=300)
    assert done.rc == 1
    assert "MemoryError" in done.err
    assert limited_python("b'x' * (100 << 20)", memory_mib=300).rc == 0


def test_a_child_that_takes_too_much_time_is_killed():
    done = limited_python("while True: pass", cpu_s=1)
    assert done.rc in (-signal.SIGXCPU, -signal.SIGKILL)
    assert done.cpu_s is None
