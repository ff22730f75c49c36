"""Compile a graph ahead of time with TensorRT-RTX, and say what its compiler said of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from trio_deploy.runtimes.tensorrt.bindings import BuildOptions, Progress
from trio_deploy.runtimes.tensorrt.compiler_log import CompilerLog, CompilerReport
from trio_deploy.runtimes.tensorrt.compiling import Compiled, Job, compile_in_child
from trio_deploy.runtimes.tensorrt.profiles import Profile


class AheadOfTime(msgspec.Struct, frozen=True):
    """An engine that was compiled without a GPU.

    Attributes:
        compiled: its size, and what compiling it took.
        report: its kernels and memory.
    """

    compiled: Compiled
    report: CompilerReport


def compile_ahead(
    graph: Path,
    profiles: Sequence[Profile],
    *,
    dtype: str,
    compute_capabilities: Sequence[str] = (),
    plan: Path | None = None,
    progress: Progress | None = None,
) -> AheadOfTime:
    """Compile one graph in a process of its own; a later call must wait for it.

    Args:
        dtype: the graph's float type.
        compute_capabilities: GPUs to compile for, such as `8.9`; empty: all that the compiler has
            by default.
        plan: file for the engine; None: it is discarded.

    Raises:
        TrioError: TensorRT-RTX is not installed or does not take the graph, its process died, or
            its log is not that of a known compiler.
    """
    log = CompilerLog()
    compiled = compile_in_child(
        Job(
            graph=str(graph),
            plan="" if plan is None else str(plan),
            profiles=tuple(profiles),
            options=BuildOptions(
                dtype=dtype, compute_capabilities=tuple(compute_capabilities), detailed=True
            ),
            flavour="rtx",
            verbose=True,
        ),
        log,
        progress or (lambda *_: None),
    )
    return AheadOfTime(compiled, log.report(compiled.version))
