"""A jinja2 environment in which a template can use only so much time and memory.

A chat template is code that came with a checkpoint. jinja2's sandbox keeps it from Python's
internals, not from loops of a billion turns or strings of gigabytes. Here every turn of a loop and
every call of a macro pays for the nodes of its body, every value for its size, and an operation
that multiplies text is refused before it runs. Nothing is computed while a template is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2.compiler
import jinja2.runtime
import jinja2.utils
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import missing

from trio_deploy.checkpoint.template_filters import (
    FILTERS,
    METHODS,
    check_percent,
    check_power,
    metered_test,
    text_method,
)
from trio_deploy.checkpoint.template_meter import CHARACTERS_PER_STEP, METER


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Sends every operation that makes or compares values through the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenate(")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: jinja2.compiler.Frame) -> None:
        self.write("(")
        self._visit_within("read", node.expr, frame)
        for operand in node.ops:
            self.write(f" {jinja2.compiler.operators[operand.op]} ")
            self._visit_within("read", operand.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: jinja2.compiler.Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.take(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: jinja2.compiler.Frame) -> None:
        self._visit_taken(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_List(self, node: nodes.List, frame: jinja2.compiler.Frame) -> None:
        self._visit_taken(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.take({")
        for item in node.items:
            self._visit_within("read", item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("})")

    def _visit_taken(
        self, visit: Callable[..., None], node: Any, frame: Any, taken: bool = True
    ) -> None:
        self.write("environment.take(" if taken else "")
        visit(node, frame)
        self.write(")" if taken else "")

    def _visit_within(self, method: str, node: Any, frame: Any) -> None:
        self.write(f"environment.{method}(")
        self.visit(node, frame)
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox in which templates are metered; see `template_meter.metered`."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, **options: Any) -> None:
        """Args:
        options: of jinja2's environment.
        """
        super().__init__(**options, optimized=False, finalize=_finalize)
        self.filters = dict(FILTERS)
        tests: dict[str, Any] = self.tests
        self.tests = {name: metered_test(name, test) for name, test in tests.items()}
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *names: Any, **options: Any) -> str:
        _count_bodies(source)
        return super()._generate(source, *names, **options)

    def charge(self, steps: int) -> bool:
        """Count work; returns True."""
        return METER.get().spend(steps)

    def read(self, value: Any) -> Any:
        """As `Meter.read`."""
        return METER.get().read(value)

    def take(self, value: Any) -> Any:
        """As `Meter.take`."""
        return METER.get().take(value)

    def concatenate(self, *items: Any) -> str:
        """The operator `~`."""
        meter = METER.get()
        meter.allow(sum(map(meter.size, items)))
        return meter.take("".join(map(str, items)))  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, unless its result would be too large."""
        meter = METER.get()
        if operator == "*":
            for one, count in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(count, int):
                    length = len(one) if isinstance(one, str) else meter.size(one)
                    meter.allow(length * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            check_percent(meter, left, right if isinstance(right, tuple) else (right,))
        elif operator == "+" and not isinstance(left, int):
            meter.allow(meter.size(left) + meter.size(right))
        return meter.take(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or else an item; methods of text come with a check of their results."""
        value = self._attribute(obj, attribute)
        if value is not missing:
            return value
        try:
            return obj[attribute]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or else an attribute."""
        self.read(argument)
        try:
            return self.take(obj[argument]) if isinstance(obj, str) else obj[argument]
        except (TypeError, LookupError):
            value = self._attribute(obj, argument) if isinstance(argument, str) else missing
            return self.undefined(obj=obj, name=argument) if value is missing else value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; its arguments and its result are counted."""
        meter = METER.get()
        if isinstance(getattr(__obj, "__self__", None), str):
            raise SecurityError("a method of text is out of reach here")
        for value in (*args, *kwargs.values()):
            if isinstance(value, (str, tuple)) or not isinstance(__obj, jinja2.runtime.Macro):
                meter.read(value)
        return meter.take(super().call(__context, __obj, *args, **kwargs))

    def _attribute(self, obj: Any, attribute: str) -> Any:
        """An attribute that templates may read, a safe stand-in, or `missing`."""
        try:
            value = getattr(obj, attribute)
        except AttributeError:
            return missing
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                if attribute not in methods:
                    return self.unsafe_undefined(obj, attribute)
                return text_method(self, obj, attribute) if isinstance(obj, str) else value
        if self.is_safe_attribute(obj, attribute, value):
            return value
        return self.unsafe_undefined(obj, attribute)


def _count_bodies(template: nodes.Template) -> None:
    """Put a count of its nodes at the start of what can run more than once."""
    # An attribute of the environment is written into the generated code as it is.
    kinds = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
    found: list[Any] = list(template.find_all(kinds))
    for node in found:
        text = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        steps = sum(1 for _ in node.find_all(nodes.Node)) + text // CHARACTERS_PER_STEP
        charge = nodes.EnvironmentAttribute(f"charge({steps})", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(charge, node.test, lineno=node.lineno)


@jinja2.utils.pass_context  # with the context, so that nothing is computed while compiling
def _finalize(context: Any, value: Any) -> str:
    """Text of a value that is put out."""
    meter = METER.get()
    meter.allow(meter.size(value))
    return meter.take(str(value))  # type: ignore[no-any-return]
