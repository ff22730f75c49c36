"""The cores that a process may use, by its affinity and its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trio_deploy.runtimes.cores import cores_to_name, usable_cores

MANY = 64


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: MANY)


def system(root: Path, groups: str, **files: str) -> Path:
    """A file system with these files; `__` stands for `/` in their names below sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("100000 100000", 1), ("50000 100000", 1), ("250000 100000", 3), ("max 100000", MANY)],
)
def test_a_quota_of_version_2_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(system(tmp_path, "0::/\n", cpu_DOT_max=f"{quota}\n")) == cores


def test_the_tightest_of_nested_groups_bounds_the_cores(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "0::/pod/container\n",
        pod__cpu_DOT_max="200000 100000\n",
        pod__container__cpu_DOT_max="700000 100000\n",
    )
    assert usable_cores(root) == 2


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize("inside", ["", "docker__1__"])  # where a container sees its own group
def test_a_quota_of_version_1_bounds_the_cores(tmp_path: Path, folder: str, inside: str) -> None:
    files = {
        f"{folder}__{inside}cpu_DOT_cfs_quota_us": "400000\n",
        f"{folder}__{inside}cpu_DOT_cfs_period_us": "100000\n",
    }
    root = system(tmp_path, "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n", **files)
    assert usable_cores(root) == 4


def test_no_quota_and_no_groups_leave_what_the_affinity_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = {"cpu__cpu_DOT_cfs_quota_us": "-1\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}
    assert usable_cores(system(tmp_path / "a", "4:cpu:/\n", **none)) == MANY
    assert usable_cores(tmp_path / "b") == MANY
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(tmp_path / "b") == 1


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    yield


@pytest.mark.usefixtures("one_core")
def test_runtimes_are_told_of_a_smaller_share_than_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cores_to_name() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert cores_to_name() is None


@pytest.mark.usefixtures("one_core")
def test_one_core_counts_as_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the fused operator of an MLP ends the process in bfloat16."""
    pytest.importorskip("openvino")
    from tests.support.small_graphs import write_product
    from trio_deploy.runtimes import openvino

    unfused = []
    monkeypatch.setattr(openvino.Passes, "unfuse_mlps", lambda _, model: unfused.append(model))
    runtime = openvino.OvRuntime()
    runtime._precision = "bfloat16"  # as on a CPU that has it
    compiled = []
    monkeypatch.setattr(
        openvino, "OvEngine", lambda _, compile_model: compiled.append(compile_model())
    )
    runtime.open(write_product(tmp_path)[0])
    assert unfused and compiled[0].get_property("INFERENCE_NUM_THREADS") == 1
