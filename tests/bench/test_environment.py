"""Figures say what they were measured on, and nothing else about the machine."""

from __future__ import annotations

from trio_deploy.bench.environment import machine, machine_text


def test_the_machine_is_described_without_names_and_paths():
    on = machine(3)
    assert on["threads"] == 3 and on["versions"]["numpy"]
    text = machine_text(on, 0.5, 1.0)
    assert "3 threads used" in text and "0.50, 1.00" in text
    assert "/" not in text.replace("trio-deploy", "")
    assert "by the runtime" in machine_text(machine(None), None, None)
