"""Loops of a graph whose bodies are written as Python functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from trio_deploy.graphs.values import BOOL, FLOAT, INT64


def any_of(op: Any, flags: ir.Value) -> ir.Value:
    """Whether any of `flags` holds: bool scalar."""
    return op.Greater(op.ReduceSum(op.Cast(flags, to=FLOAT), keepdims=0), 0.5)


def loop(
    op: Any,
    trips: ir.Value,
    start: ir.Value,
    states: Sequence[ir.Value],
    body: Callable[..., tuple[ir.Value, list[ir.Value]]],
    name: str,
) -> list[ir.Value]:
    """Write a Loop of at most `trips` rounds that goes on while its body says so.

    Args:
        trips: int64 scalar.
        start: bool scalar, whether the first round runs.
        states: loop-carried values; their types and shapes hold through all rounds.
        body: called once as ``body(op, iteration, *states)``; returns (go on, new states).
        name: of the graph of the body, and a prefix of its values.

    Returns:
        The states after the last round.
    """

    def trace(inner: Any, iteration: ir.Value, _go: ir.Value, *inside: ir.Value) -> list[ir.Value]:
        inner.builder.push_module(name)  # its values must not share names with the outer graph's
        go_on, after = body(inner, iteration, *inside)
        outputs = [inner.Identity(value) for value in (go_on, *after)]
        inner.builder.pop_module()
        return outputs

    def carried(kind: str) -> list[ir.Value]:
        return [
            ir.Value(name=f"{name}.{kind}.{i}", type=s.type, shape=s.shape)
            for i, s in enumerate(states)
        ]

    graph = op.builder.subgraph(
        trace,
        [
            ir.Value(name=f"{name}.round", type=ir.TensorType(INT64), shape=ir.Shape([])),
            ir.Value(name=f"{name}.go", type=ir.TensorType(BOOL), shape=ir.Shape([])),
            *carried("in"),
        ],
        [
            ir.Value(name=f"{name}.go_on", type=ir.TensorType(BOOL), shape=ir.Shape([])),
            *carried("out"),
        ],
        name=name,
    )
    results = list(op.Loop(trips, start, *states, body=graph, _outputs=len(states)))
    for value, state in zip(results, states, strict=True):
        value.type, value.shape = state.type, state.shape
    return results
