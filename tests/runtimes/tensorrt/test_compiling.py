"""Building in a process of its own, on a stand-in of the bindings that the child imports."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from trio_deploy import TrioError
from trio_deploy.runtimes.tensorrt.bindings import MODULES, BuildOptions
from trio_deploy.runtimes.tensorrt.compiling import Compiled, Job, compile_in_child
from trio_deploy.runtimes.tensorrt.profiles import Bounds, Profile

SIMULATED = """
import sys
from tests.support.fakes.tensorrt.cuda import Cuda
from tests.support.fakes.tensorrt.install import make
print("printed by a library")
module = make("10.15.1", Cuda(name="none", capability=(9, 0), total=1 << 30, multiprocessors=1))
module.says = [(4, "every kernel"), (2, "a warning")]
sys.modules[__name__] = module
"""
#: Ends in the middle of a build, when the compiler is asked for an engine.
DIES = (
    SIMULATED
    + """
import os, signal
def die(*_):
    os.kill(os.getpid(), signal.{signal})
module.Builder.build_serialized_network = die
"""
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """y = x + x of [B,4], by the flavour that needs no driver."""
    ends = [helper.make_tensor_value_info(name, T.FLOAT, ["B", 4]) for name in "xy"]
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "double", ends[:1], ends[1:]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "double.onnx")
    return Job(
        graph=str(tmp_path / "double.onnx"),
        plan=str(tmp_path / "double.engine"),
        profiles=(Profile("default", {"x": Bounds((1, 4), (2, 4), (3, 4))}),),
        timing_cache=str(tmp_path / "timing.cache"),
        flavour="rtx",
    )


def bindings(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let a child of this process import a program as the bindings."""
    there = folder / "bindings"
    there.mkdir()
    (there / f"{MODULES['rtx']}.py").write_text(program)
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (there, root))))


def compiled(job: Job) -> tuple[Compiled, list[tuple[str, str]], list[tuple[str, int, int]]]:
    said: list[tuple[str, str]] = []
    told: list[tuple[str, int, int]] = []
    done = compile_in_child(job, lambda *line: said.append(line), lambda *at: told.append(at))
    return done, said, told


def test_a_child_builds_and_passes_on_what_it_is_told(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings(tmp_path, monkeypatch, SIMULATED)
    done, said, told = compiled(job)
    plan = Path(job.plan).read_bytes()
    assert done.plan_bytes == len(plan) > 0 and done.version == "10.15.1"
    assert done.peak_bytes > 2**20
    assert said == [("WARNING", "a warning"), ("INFO", "built double.onnx")]
    assert told == [("building", at, 2) for at in (0, 1, 2, 2)]
    assert Path(job.timing_cache).read_bytes() == b"+"


def test_verbose_messages_are_passed_on_where_they_are_wanted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings(tmp_path, monkeypatch, SIMULATED)
    options = BuildOptions(dtype="float32")
    wanted = Job(
        graph=job.graph, profiles=job.profiles, options=options, flavour="rtx", verbose=True
    )
    _, said, _ = compiled(wanted)
    assert ("VERBOSE", "every kernel") in said
    assert not Path(job.plan).exists(), "an engine without a file is discarded"


@pytest.mark.parametrize(
    ("signal", "says"),
    [
        ("SIGSEGV", "double.onnx: .* ended by SIGSEGV, which is a fault in TensorRT"),
        ("SIGKILL", "double.onnx: .* ended by SIGKILL, such as by the kernel for lack of memory"),
    ],
)
def test_the_death_of_the_compiler_is_the_failure_of_that_build(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str, says: str
) -> None:
    bindings(tmp_path, monkeypatch, DIES.format(signal=signal))
    with pytest.raises(TrioError, match=f"(?s){says}.*printed by a library"):
        compiled(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bindings", "double.onnx"]


def test_an_error_in_the_child_is_raised_here(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings(tmp_path, monkeypatch, "raise OSError('libnvinfer is no library')")
    with pytest.raises(TrioError, match="TensorRT-RTX is installed, but does not load .libnvinfer"):
        compiled(job)


def test_a_fault_of_the_child_names_its_last_line(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings(tmp_path, monkeypatch, "raise RuntimeError('unforeseen')")
    with pytest.raises(TrioError, match="ended with status 1 .RuntimeError: unforeseen"):
        compiled(job)


def test_an_interrupt_ends_the_child(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = (
        SIMULATED
        + "import time\nmodule.Builder.create_builder_config = lambda _: time.sleep(600)\n"
    )
    bindings(
        tmp_path,
        monkeypatch,
        waits + "module.Builder.__init__ = lambda s, logger: logger.log(2, 'up')\n",
    )

    def interrupt(severity: str, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_in_child(job, interrupt, lambda *_: None)
    assert not Path(job.plan).exists()
