"""What the mutation tester says of a mutant, and that it leaves no process behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from scripts import mutation_test as script


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("a = 2\nb = 2\n", (1, "a = 1", "a = 2")),
        ("a = 1\nb = 3\n", (2, "b = 2", "b = 3")),
        ("a = 1\nb = 2\npass\n", (3, "", "pass")),
        ("a = 1\n", (2, "b = 2", "")),
    ],
)
def test_a_mutant_is_placed_where_it_differs_at_the_end_too(code, found):
    assert script.first_difference("a = 1\nb = 2\n", code) == found


def test_a_mutant_that_is_the_same_program_is_none():
    assert script.same_program("a = -1e30\n", "a = - 1e+30")
    assert not script.same_program("a = 1\n", "a = 2\n")


@pytest.mark.parametrize("ends", ["sleep 100", "exit 0"])
def test_what_the_tests_start_does_not_outlive_them(tmp_path, monkeypatch, ends):
    def tests(copy, tests):
        if (own := os.fork()) == 0:
            os.execvp("sleep", ["sleep", "100"])
        (copy / "pid").write_text(str(own))
        os.execvp("sh", ["sh", "-c", ends])

    monkeypatch.setattr(script, "run_tests", tests)
    monkeypatch.setattr(script, "MAX_WAIT_S", 1)
    assert script.noticed(tmp_path, [], 10.0) is (ends != "exit 0")
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    for _ in range(1000):
        try:
            text = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if "State:\tZ" in text:  # nobody has waited for it
            return
        time.sleep(0.01)
    raise AssertionError("it still runs")
