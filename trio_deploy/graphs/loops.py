"""Loops of a graph whose bodies are written as Python functions.

TensorRT's host waits for the GPU wherever it has to know whether a loop goes on. A loop of a fixed
number of rounds costs no wait. One that depends on data always runs its first round, and has a
constant as its number of rounds: so the host waits once per round, and not before the first. That
constant bounds nothing: the condition of such a loop has to end for every input, values that are no
numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.graphs.values import (
    BOOL,
    FLOAT,
    INT64,
    constant,
    dim,
    dtype_of,
    shape_of,
    typed,
)

_FOR_EVER = 2**30  # rounds that no loop has


def any_of(op: Any, flags: ir.Value) -> ir.Value:
    """Whether any of `flags` holds: bool scalar."""
    return op.Greater(op.ReduceSum(op.Cast(flags, to=FLOAT), keepdims=0), 0.5)


def counted_loop(
    op: Any,
    trips: int,
    states: Sequence[ir.Value],
    body: Callable[..., list[ir.Value]],
    name: str,
) -> list[ir.Value]:
    """Write a Loop of `trips` rounds.

    Args:
        states: loop-carried values; their types and shapes hold through all rounds.
        body: called once as ``body(op, iteration, *states)``; returns the new states.
        name: of the graph of the body, and a prefix of its values.

    Returns:
        The states after the last round.
    """

    def always(inner: Any, iteration: ir.Value, *inside: ir.Value) -> tuple[Any, list[ir.Value]]:
        return inner.Constant(value=ir.tensor(np.array(True))), body(inner, iteration, *inside)

    return _loop(op, trips, None, states, always, name)


def loop_while(
    op: Any,
    states: Sequence[ir.Value],
    body: Callable[..., tuple[ir.Value, list[ir.Value]]],
    name: str,
    most: int = _FOR_EVER,
) -> list[ir.Value]:
    """Write a Loop of at least one round, and at most `most`, that goes on while its body says so.

    Like `counted_loop`, but `body` returns (go on: bool scalar, new states).
    """
    return _loop(op, most, constant(op, np.array(True), "true"), states, body, name)


def _loop(
    op: Any,
    trips: int,
    start: ir.Value | None,
    states: Sequence[ir.Value],
    body: Callable[..., tuple[ir.Value, list[ir.Value]]],
    name: str,
) -> list[ir.Value]:
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
    rounds = constant(op, np.array(trips), f"rounds_{trips}")
    results = list(op.Loop(rounds, start, *states, body=graph, _outputs=len(states)))
    for value, state in zip(results, states, strict=True):
        value.type, value.shape = state.type, state.shape
    return results


def by_blocks(
    op: Any, x: ir.Value, block: int | None, body: Callable[[Any, ir.Value], ir.Value], name: str
) -> ir.Value:
    """Compute body(x) for `block` rows of x at a time: [T, N, S, D] → [T, N, S, D].

    What the body makes on its way is held for one block alone. The last block is filled up with
    copies of the last row, whose results are cut off.

    Args:
        block: None: all rows at once, without a loop.
        body: called once as ``body(op, rows)`` for rows [T, N, block, D]; each row of its result
            depends on the same row of its argument alone.
        name: of the graph of the body, and a prefix of its values.
    """
    if block is None:
        return body(op, x)
    frames, heads, _, size = shape_of(x)
    length = dim(op, x, 2)
    blocks = op.Div(op.Add(length, block - 1), block)
    places = op.Range(0, op.Squeeze(op.Mul(blocks, block), [0]), 1)
    filled = op.Gather(x, op.Min(places, op.Sub(length, 1)), axis=2)
    table = op.Concat(dim(op, x, 0), [heads], blocks, [block, size], axis=0)
    apart = op.Transpose(op.Reshape(filled, table), perm=[2, 0, 1, 3, 4])

    shape = [frames, heads, block, size]

    def trace(inner: Any, number: ir.Value, go: ir.Value) -> list[ir.Value]:
        inner.builder.push_module(name)
        rows = typed(inner.Gather(apart, number, axis=0), dtype_of(x), shape)
        outputs = [inner.Identity(go), inner.Identity(body(inner, rows))]
        inner.builder.pop_module()
        return outputs

    def flag(kind: str) -> ir.Value:
        return ir.Value(name=f"{name}.{kind}", type=ir.TensorType(BOOL), shape=ir.Shape([]))

    number = ir.Value(name=f"{name}.number", type=ir.TensorType(INT64), shape=ir.Shape([]))
    rows_type, rows_shape = ir.TensorType(dtype_of(x)), ir.Shape(shape)
    graph = op.builder.subgraph(
        trace,
        [number, flag("go")],
        [flag("go_on"), ir.Value(name=f"{name}.done", type=rows_type, shape=rows_shape)],
        name=name,
    )
    done = op.Loop(op.Squeeze(blocks, [0]), None, body=graph)
    typed(done, dtype_of(x), [None, frames, heads, block, size])
    joined = op.Concat(dim(op, x, 0), [heads, -1, size], axis=0)
    whole = op.Reshape(op.Transpose(done, perm=[1, 2, 0, 3, 4]), joined)
    return typed(op.Slice(whole, [0], length, [2]), dtype_of(x), shape_of(x))
