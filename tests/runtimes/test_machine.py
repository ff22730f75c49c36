"""The cores and the memory that a process may use, by its affinity and its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trio_deploy.bench import environment
from trio_deploy.cost.plan import HostMemory, plan
from trio_deploy.runtimes import machine
from trio_deploy.runtimes.machine import cores_to_name, usable_cores, usable_memory

MANY = 64
MUCH = 1 << 36


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
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MUCH // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(
    ("limits", "memory"),
    [
        ({"pod__a__memory_DOT_max": f"{3 * 2**30}\n"}, 3 * 2**30),
        ({"pod__memory_DOT_max": f"{2**30}\n", "pod__a__memory_DOT_max": f"{2**31}\n"}, 2**30),
        ({"memory_DOT_max": f"{2**30}\n"}, 2**30),  # where a container sees its own group
        ({"pod__a__memory_DOT_max": "max\n"}, MUCH),
        ({"pod__a__memory_DOT_max": f"{2 * MUCH}\n"}, MUCH),
        ({}, MUCH),
    ],
)
def test_a_limit_of_version_2_bounds_the_memory(
    tmp_path: Path, limits: dict[str, str], memory: int
) -> None:
    assert usable_memory(system(tmp_path, "0::/pod/a\n", **limits)) == memory


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("inside", ["", "docker__1__"])
def test_a_limit_of_version_1_bounds_the_memory(tmp_path: Path, inside: str) -> None:
    groups = "5:memory:/docker/1\n4:cpu:/docker/1\n"
    files = {f"memory__{inside}memory_DOT_limit_in_bytes": f"{2**31}\n"}
    assert usable_memory(system(tmp_path / "a", groups, **files)) == 2**31
    none = {f"memory__{inside}memory_DOT_limit_in_bytes": "9223372036854771712\n"}
    assert usable_memory(system(tmp_path / "b", groups, **none)) == MUCH


def test_memory_is_unknown_where_no_system_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert usable_memory(tmp_path) is None


def test_plans_and_benchmarks_count_the_memory_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = system(tmp_path, "0::/\n", memory_DOT_max=f"{4 * 2**30}\n")
    monkeypatch.setattr(machine.usable_memory, "__defaults__", (root,))
    assert environment.machine(None)["memory_gib"] == 4
    fit = plan("llava-1.5-7b").fit
    assert isinstance(fit, HostMemory)
    assert "does not fit" in fit.verdict and "this machine's 4 GiB" in fit.verdict


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
    assert unfused and compiled[0][0].get_property("INFERENCE_NUM_THREADS") == 1
