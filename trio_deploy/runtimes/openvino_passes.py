"""Passes over `primitive` graphs that make OpenVINO's CPU plugin faster.

Each pass changes a model before it is compiled; results change by rounding only, which tokens stay
not at all. Shapes: B rows, S new tokens, P = max(C, S) slots of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

_PARTS = 4  # parts of a prompt's queries: 5/8 of the scores are computed instead of all
_END = np.iinfo(np.int64).max  # of a slice
_HUGE = 3e38  # a bound that no bfloat16 activation reaches

_Cut = Callable[[Any, int], Any]
"""Cuts a range out of a value along an axis."""


class Passes:
    """The passes; one object serves all models."""

    def __init__(self) -> None:
        """Needs OpenVINO."""
        from openvino import Type, opset13
        from openvino.preprocess import PrePostProcessor

        self._op, self._type, self._ports = opset13, Type, PrePostProcessor

    def narrow_products(self, model: Any) -> None:
        """Compute products with weights of the checkpoint in bfloat16, all else in float32.

        For select graphs. Products of two activations stay in float32: the backward pass through
        attention subtracts nearly equal numbers, and similarities are compared with a threshold.
        Bodies of Loops stay unchanged, too.
        """
        for product in _of_kind(model, "MatMul"):
            left, right = (product.input_value(i) for i in range(2))
            if self._is_weight(left):
                self._from_the_right(product)
            elif self._is_weight(right):
                y = self._op.matmul(self._narrow(left), self._narrow(right), False, False)
                _replace(product, self._op.convert(y, "f32"))

    def dequantise(self, model: Any) -> None:
        """Replace codes and scales of matrices by the float32 values that they stand for.

        For select graphs: OpenVINO 2026.4 multiplies by compressed weights as they are, [K, N], as
        if they were transposed: wrong numbers, no message.
        """
        for constant in _of_kind(model, "Constant"):
            if not is_coded(constant):
                continue
            scaled, scale = _scaled(constant)
            codes = constant.data.astype(np.float32)
            # The Tensor that a constant is made of without a copy would be freed with its array.
            values = self._op.constant(codes * scale.astype(np.float32), dtype=self._type.f32)
            result = values if scaled.get_element_type() == self._type.f32 else None
            node = result or self._op.convert(values, scaled.get_element_type().get_type_name())
            values.set_friendly_name(scaled.get_friendly_name())
            for target in list(scaled.output(0).get_target_inputs()):
                target.replace_source_output(node.output(0))

    def sort_ranks(self, model: Any) -> None:
        """Sort where a graph compares all tokens with all to rank them, in bodies of Loops too.

        TopK of OpenVINO promises no order of equal scores unless it is told to be stable, which
        takes it as long as comparing all with all. So it sorts twice: scores, then the numbers
        (distinct scores ahead of it) · S + place, no two of which are equal. These are int32, for S
        up to 46,340: comparing would take 10 GB there.
        """
        for loop in _of_kind(model, "Loop"):
            self.sort_ranks(loop.get_function())
        for counted in _of_kind(model, "ReduceSum"):
            score = _ranked(counted)
            if score is not None:
                _replace(counted, self._ranks(score))

    def _ranks(self, score: Any) -> Any:
        """The number of tokens ahead of each, f32 [B,S]."""
        op = self._op
        length = op.gather(op.shape_of(score, "i32"), _at(1), np.int64(0))  # [1]
        count = op.squeeze(length, _at(0))
        best = op.topk(score, count, 1, "max", "value", "i32")
        values = best.output(0)
        before = self._cut(_at(0), _at(-1), values, 1)
        after = self._cut(_at(1), _at(_END), values, 1)
        changes = op.convert(op.not_equal(before, after), "i32")
        changes = op.pad(changes, _at(0, 1), _at(0, 0), "constant", np.int32(0))
        ahead = op.multiply(op.cum_sum(changes, np.int64(1)), length)
        keys = op.topk(op.add(ahead, best.output(1)), count, 1, "min", "value", "i32").output(0)
        order = op.subtract(keys, ahead)
        places = op.range(np.int32(0), count, np.int32(1), "i32")
        places = op.broadcast(places, op.shape_of(order))
        return op.convert(op.scatter_elements_update(order, order, places, np.int64(1)), "f32")

    def narrow_caches(self, model: Any) -> Any:
        """The model with past.* and present.* in bfloat16, as attention computes with them."""
        changed = self._ports(model)
        for ports, prefix, of in (
            (model.inputs, "past.", changed.input),
            (model.outputs, "present.", changed.output),
        ):
            for name in (port.get_any_name() for port in ports):
                if name.startswith(prefix):
                    of(name).tensor().set_element_type(self._type.bf16)
        return changed.build()

    def unfuse_mlps(self, model: Any) -> None:
        """Insert a no-op after each up_proj, so that a layer's MLP is not fused to one operator.

        With one thread the fused operator ends the process (SIGFPE in OpenVINO 2026.4, bfloat16).
        """
        for product in _of_kind(model, "MatMul"):
            if _constant(product.input_value(1)).get_friendly_name().endswith("up_proj.weight"):
                users = list(product.output(0).get_target_inputs())
                same = self._op.clamp(product.output(0), -_HUGE, _HUGE)
                for user in users:
                    user.replace_source_output(same.output(0))

    def split_queries(self, model: Any) -> None:
        """Split causal attention into parts of the queries, each with the keys it attends to.

        softmax(q kᵀ + mask) v over all keys spends half of its time on masked scores. In prefill
        (P = S) the first i queries attend to the first i slots at most. In decode (S = 1)
        the last part has the query and all slots, and the others are empty.
        """
        op = self._op
        shared: dict[str, list[tuple[_Cut, _Cut, Any]]] = {}
        for product in _of_kind(model, "MatMul"):
            softmax = _before_cast(product.input_value(0))
            masked = softmax.input_value(0).get_node()
            if softmax.get_type_name() != "Softmax" or masked.get_type_name() != "Add":
                continue
            scores, mask = _before_cast(masked.input_value(0)), masked.input_value(1)
            q, transpose = scores.input_value(0), scores.input_value(1).get_node()
            k, v = transpose.input_value(0), product.input_value(1)
            name = mask.get_node().get_friendly_name()
            if name not in shared:  # by all layers
                shared[name] = self._parts(mask)
            parts = []
            for queries, slots, hidden in shared[name]:
                keys = op.transpose(slots(k, 2), transpose.input_value(1))
                raw = op.convert(op.matmul(queries(q, 2), keys, False, False), "f32")
                weights = op.softmax(op.add(raw, hidden), -1)
                weights = op.convert(weights, v.get_element_type())
                parts.append(op.matmul(weights, slots(v, 2), False, False))
            _replace(product, op.concat(parts, 2))

    def _parts(self, mask: Any) -> list[tuple[_Cut, _Cut, Any]]:
        """Per part: functions that cut out its queries and its slots, and its mask."""
        op = self._op
        size = op.gather(op.shape_of(mask, "i64"), _at(2), np.int64(0))
        size = op.divide(size, _at(_PARTS))  # the last part also takes the remainder
        starts = [op.multiply(size, _at(number)) for number in range(_PARTS)]
        parts: list[tuple[_Cut, _Cut, Any]] = []
        for start, stop in pairwise(starts):
            queries, slots = partial(self._cut, start, stop), partial(self._cut, _at(0), stop)
            parts.append((queries, slots, slots(queries(mask, 2), 3)))
        queries = partial(self._cut, starts[-1], _at(_END))
        return [*parts, (queries, _whole, queries(mask, 2))]

    def _cut(self, start: Any, stop: Any, value: Any, axis: int) -> Any:
        return self._op.slice(value, start, stop, _at(1), _at(axis))

    def _from_the_right(self, product: Any) -> None:
        """Replace (M xᵀ)ᵀ by x Mᵀ in bfloat16, for M = Wᵀ, or W itself.

        Graphs write x W so for a square W, since OpenVINO confuses the packings of W and Wᵀ if both
        are one constant, and x Wᵀ for the second of two products that are alike. A copy of W with
        its own memory is safe.
        """
        # Rounded here, since OpenVINO truncates; then handed over as float32, which it copies. A
        # Tensor of bfloat16 would share memory that is freed when this function returns.
        weight = _constant(product.input_value(0)).data.astype(ml_dtypes.bfloat16)
        copy = self._op.constant(weight.astype(np.float32), dtype=self._type.bf16)
        x = product.input_value(1).get_node().input_value(0)
        plain = product.input_value(0).get_node().get_type_name() == "Constant"
        y = self._op.convert(self._op.matmul(self._narrow(x), copy, False, plain), "f32")
        for target in product.output(0).get_target_inputs():
            _replace(target.get_node(), y)

    def _is_weight(self, value: Any) -> bool:
        """Whether it is a float32 tensor of the checkpoint, or the transpose of one."""
        node = _constant(value)
        return (
            node.get_type_name() == "Constant"
            and node.get_element_type() == self._type.f32
            and node.get_friendly_name().endswith(".weight")
        )

    def _narrow(self, value: Any) -> Any:
        node = value.get_node()
        if node.get_type_name() == "Transpose":  # narrow the constant itself: that is folded
            narrow = self._op.convert(node.input_value(0), "bf16")
            return self._op.transpose(narrow, node.input_value(1))
        return self._op.convert(value, "bf16")


def is_coded(node: Any) -> bool:
    """Whether a node is the codes of a quantised matrix: the one constant of such a type."""
    return node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in (
        "i8",
        "i4",
    )


def _scaled(constant: Any) -> tuple[Any, np.ndarray]:
    """The node that multiplies a matrix's codes by their scales, and the scales."""
    node = constant
    while node.get_type_name() != "Multiply":
        (target,) = node.output(0).get_target_inputs()
        node = target.get_node()
    other = node.input_value(1).get_node()
    while other.get_type_name() != "Constant":
        other = other.input_value(0).get_node()
    return node, other.data.reshape(constant.get_output_shape(0)[0], -1)


def _ranked(counted: Any) -> Any | None:
    """The scores [B,S] whose ranks a ReduceSum counts, as `Dialect.ranks` writes it; or None."""
    chosen = counted.input_value(0).get_node()
    if chosen.get_type_name() != "Select":
        return None
    either = chosen.input_value(0).get_node()
    if either.get_type_name() != "LogicalOr":
        return None
    greater, tied = (either.input_value(i).get_node() for i in range(2))
    if (greater.get_type_name(), tied.get_type_name()) != ("Greater", "LogicalAnd"):
        return None
    equal = tied.input_value(0).get_node()
    same = [greater.input_value(i) == equal.input_value(i) for i in range(2)]
    if equal.get_type_name() != "Equal" or not all(same):
        return None
    other, own = (greater.input_value(i).get_node() for i in range(2))
    return other.input_value(0) if other.input_value(0) == own.input_value(0) else None


def _of_kind(model: Any, kind: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def _constant(value: Any) -> Any:
    """The node that produces a value, skipping a Transpose: a Constant for a weight."""
    node = value.get_node()
    return node.input_value(0).get_node() if node.get_type_name() == "Transpose" else node


def _before_cast(value: Any) -> Any:
    """The node that produces a value, skipping a Convert."""
    node = value.get_node()
    return node.input_value(0).get_node() if node.get_type_name() == "Convert" else node


def _whole(value: Any, axis: int) -> Any:
    return value


def _at(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _replace(node: Any, by: Any) -> None:
    by.set_friendly_name(node.get_friendly_name())
    for target in list(node.output(0).get_target_inputs()):
        target.replace_source_output(by.output(0))
