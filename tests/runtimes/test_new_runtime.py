"""How to add a runtime: write its module, and name the module in `runtimes.registry.RUNTIMES`.

The module has

- an engine, which runs one graph: the seven members of `runtimes.base.Engine`;
- a runtime, which opens the graphs of a bundle: those of `runtimes.base.Runtime`. `HostRuntime` has
  what is the same in all runtimes whose engines return when they are done;
- at its end `RUNTIME = RuntimeSpec(...)`: the graphs it reads, the options it takes and why it does
  not take the others, the keys of a target's file that are its own, and how it is opened.

Packages that the runtime needs are imported when it is opened, not with the module. Everything else
reads the registry: `trio run --runtime`, help texts, targets, export, servers, benchmarks. A target
in engines/ then says `runtime: NAME`.

This file is such a module. Its runtime is called `shouting`, and hands every graph to ONNX Runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions, TrioError, export_model
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.cli import main as cli
from trio_deploy.config.target import Target
from trio_deploy.runtimes.base import (
    Array,
    Engine,
    Execution,
    HostRuntime,
    RuntimeSpec,
    Step,
    TensorSpec,
)
from trio_deploy.runtimes.registry import RUNTIMES, load_target

QUESTION = "what color is the circle?"
PICTURE = Path(__file__).parents[2] / "examples" / "scene.png"
opened: list[str] = []


class ShoutingEngine:
    """One graph, run by an engine of ONNX Runtime."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        return self._inner.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """By name, in the graph's order."""
        return self._inner.outputs

    @property
    def execution(self) -> Execution:
        """How it runs, as the runtime reports it."""
        return replace(self._inner.execution, device="LOUD")

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Run once."""
        return self._inner.run(feeds, into, host=host)

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """A function that runs on these arrays each time it is called."""
        return self._inner.bind(feeds, into)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Uninitialised memory near the device."""
        return self._inner.empty(shape, dtype)


class ShoutingRuntime(HostRuntime):
    """Opens the graphs of a bundle."""

    def __init__(self, options: RuntimeOptions) -> None:
        from trio_deploy.runtimes.onnxruntime import OrtRuntime

        self._inner = OrtRuntime(threads=options.threads)

    def shares_cache(self, dialect: str) -> bool:
        """Whether past and present of a layer are one buffer in a decode step."""
        return self._inner.shares_cache(dialect)

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        *,
        keep_precision: bool = False,
        shares_weights: bool = False,
    ) -> ShoutingEngine:
        """Load a graph."""
        opened.append(path.name)
        return ShoutingEngine(self._inner.open(path, weights, shares_weights=shares_weights))


def _open(options: RuntimeOptions, bundle: Bundle | None) -> ShoutingRuntime:
    return ShoutingRuntime(options)


def _check_target(target: Target) -> Target:
    """`memory_gib` must be given, for the sake of the example; there are 2 by default."""
    if target.memory_gib == 1:
        raise TrioError("memory_gib 1 is not enough to shout: give it 2")
    return replace(target, memory_gib=target.memory_gib or 2.0)


RUNTIME = RuntimeSpec(
    name="shouting",
    title="Shouting",
    dialects=("ort",),
    dtypes=("float32",),
    options={"threads": ()},
    refusals={"low_memory": "it is never quiet about memory"},
    open=_open,
    target_keys=("memory_gib",),
    check_target=_check_target,
)


# ------------------------------------------------------------------------------------ the proof


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, RUNTIME.name, __name__)
    assert sys.modules[__name__].RUNTIME is RUNTIME


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("targets") / "loud.yaml"
    file.write_text("runtime: shouting\ndtype: float32\n")
    return file


@pytest.fixture
def bundle(target: Path, tmp_path: Path) -> Bundle:
    """The tiny model, exported for the new runtime."""
    return export_model("tiny", tmp_path / "b", budget=0.111, target=target, progress=False)


def test_it_answers_as_the_runtime_that_it_wraps(bundle: Bundle) -> None:
    assert (bundle.manifest.runtime, bundle.manifest.dialect) == ("shouting", "ort")
    question = Request(QUESTION, [PICTURE], max_new_tokens=8)
    opened.clear()
    ours = Pipeline.open(bundle, threads=1).generate(question)
    assert sorted(opened) == sorted({*opened}) and "embed.onnx" in opened
    theirs = Pipeline.open(bundle, runtime="onnxruntime", threads=1).generate(question)
    assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
    assert all(np.array_equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))


def test_the_command_line_runs_it(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(bundle.path), "--image", str(PICTURE), "--prompt", QUESTION]
    opened.clear()
    assert cli.main([*command, "--runtime", "shouting", "--threads", "1"]) == 0
    assert opened and capsys.readouterr().out.startswith("white\n")
    assert cli.main([*command, "--low-memory"]) == 1
    assert "low memory is no option of Shouting: it is never quiet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert "shouting" in capsys.readouterr().out


def test_its_targets_are_checked_by_it(target: Path) -> None:
    assert load_target(target).memory_gib == 2
    for line, says in (
        ("memory_gib: 1", "memory_gib 1 is not enough to shout"),
        ("provider: cpu", "provider belongs to ONNX Runtime, not Shouting"),
        ("dialect: onnx", "Shouting does not read the onnx dialect: choose ort"),
    ):
        wrong = target.with_name("wrong.yaml")
        wrong.write_text(f"{target.read_text()}{line}\n")
        with pytest.raises(TrioError, match=says):
            load_target(wrong)
