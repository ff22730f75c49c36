"""Filters, tests and methods of text as chat templates get them: metered, their results foreseen.

jinja2's filters that multiply text or lists and that chat templates do not use are left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from string import Formatter
from typing import Any

import jinja2.filters
import jinja2.utils
from jinja2.sandbox import (
    SandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
    SecurityError,
)
from markupsafe import Markup

from trio_deploy.checkpoint.template_meter import MAX_BITS, METER, Meter
from trio_deploy.errors import TrioError

_NARROW = 1 << 10  # most characters that text is padded or indented to

# jinja2's filters but those that chat templates do not use and that multiply text or lists.
_NAMES = (
    "abs capitalize count d default dictsort e escape first float format groupby indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select "
    "selectattr sort string sum title trim truncate unique upper urlencode wordcount"
).split()
_SMALL_FILTERS = {"count", "d", "default", "first", "last", "length", "map", "safe"}  # read no text
_COMPARING_TESTS = set("== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in".split())
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find format index isalnum isalpha isascii "
        "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
        "ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
        "zfill".split()
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index", "grouper", "list"}),  # the last two of `groupby`
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
}
"""Attributes of plain values that templates may read; jinja2 judges those of other types."""

# The work of these is the product of the lengths of text and argument.
_SLOW_METHODS = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}


def text_method(environment: SandboxedEnvironment, text: str, name: str) -> Callable[..., Any]:
    """A method of text that checks what its result can be before it is made."""
    method = getattr(text, name)

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        if name == "format":
            _check_braces(meter, text, (*args, *kwargs.values()))
            if isinstance(text, Markup):
                formatter: Formatter = SandboxedEscapeFormatter(environment, escape=text.escape)
            else:
                formatter = SandboxedFormatter(environment)
            return type(text)(formatter.vformat(text, args, kwargs))
        if name == "join":
            return _joined(meter, text, *args)
        if name == "replace":
            _check_replace(meter, text, *args)
        if name in ("center", "ljust", "rjust", "zfill"):
            _check_narrow(*args[:1])
        if name in _SLOW_METHODS:
            _spend_product(meter, text, *args)
        meter.read(text)
        return method(*args, **kwargs)

    return checked


def _metered_filter(name: str) -> Callable[..., Any]:
    function = jinja2.filters.FILTERS[name]

    @functools.wraps(function)
    def metered_filter(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.spend(1)
        if name not in _SMALL_FILTERS:
            for value in (*args, *kwargs.values()):
                meter.read(value)
        return meter.take(function(*args, **kwargs))

    return metered_filter


def metered_test(name: str, test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that counts the work of comparing its values."""

    @functools.wraps(test)
    def metered_test(*args: Any, **kwargs: Any) -> Any:
        if name in _COMPARING_TESTS:
            for value in args:
                METER.get().read(value)
        return test(*args, **kwargs)

    return metered_test


# ---------------------------------------------------- filters whose results have to be foreseen


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    meter = METER.get()
    check_percent(meter, str(value), (*args, *kwargs.values()))
    return meter.take(jinja2.filters.do_format(value, *args, **kwargs))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    meter, text = METER.get(), str(s)
    if isinstance(width, str):
        _check_narrow(len(width))
    else:
        _check_narrow(width)
    added = len(width) if isinstance(width, str) else width
    meter.allow(len(text) + (len(text.splitlines()) + 1) * added)
    return meter.take(jinja2.filters.do_indent(meter.read(text), width, first, blank))


@jinja2.utils.pass_eval_context
def _join(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    meter = METER.get()
    if attribute is not None:
        getter = jinja2.filters.make_attrgetter(eval_ctx.environment, attribute)
        value = map(getter, value)
    return meter.take(_joined(meter, str(d), map(str, _checked(meter, value))))


def _joined(meter: Meter, separator: str, items: Iterable[Any]) -> str:
    texts, size = [], 0
    for item in meter.counted(items):
        size += meter.size(item) + len(separator)
        meter.allow(size)
        texts.append(item)
    return separator.join(texts)


def _checked(meter: Meter, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        meter.allow(meter.size(item))
        yield item


@jinja2.utils.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise SecurityError("the filter sum adds numbers alone")
    meter = METER.get()
    items = meter.counted(iterable)
    return meter.take(jinja2.filters.FILTERS["sum"](environment, items, attribute, start))


@jinja2.utils.pass_eval_context
def _replace(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> Any:
    meter = METER.get()
    _check_replace(meter, str(s), str(old), str(new))
    return meter.take(jinja2.filters.do_replace(eval_ctx, meter.read(s), old, new, count))


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    _check_narrow(abs(precision))
    return METER.get().take(jinja2.filters.do_round(value, precision, method))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates make it, without jinja2's escapes for HTML."""
    meter = METER.get()
    wide = max(indent or 0, *map(len, separators or ("", "")))
    _check_narrow(wide)
    meter.allow(meter.size(value) * (1 + wide * meter.depth(value)))
    text = json.dumps(
        meter.read(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return meter.take(text)  # type: ignore[no-any-return]


def _trim(value: Any, chars: str | None = None) -> Any:
    meter = METER.get()
    _spend_product(meter, str(value), chars)
    return meter.take(jinja2.filters.do_trim(meter.read(value), chars))


# ------------------------------------------------------------------------------------- checks


def _check_replace(meter: Meter, text: str, old: Any, new: Any, *count: Any) -> None:
    times = text.count(str(old))
    meter.allow(len(text) + times * len(str(new)))


def _check_narrow(width: Any) -> None:
    if isinstance(width, int) and width > _NARROW:
        raise TrioError(f"the chat template pads text to {width} characters: correct it")


def check_power(base: int, exponent: int) -> None:
    """Check that a power can be computed."""
    if base.bit_length() * exponent > 2 * MAX_BITS:
        raise TrioError("the chat template computes a number of over 1,200 digits: correct it")


def check_percent(meter: Meter, form: str, values: Sequence[Any]) -> None:
    """Check what `form % values` can make."""
    # A name may itself have brackets, so with names every number in the text counts as a width.
    digits = _NUMBER.findall(form) if "%(" in form else [*itertools.chain(*_PERCENT.findall(form))]
    _check_fields(meter, form, digits, "*" in form and _STAR.search(form) is not None, values)


def _check_braces(meter: Meter, form: str, values: Sequence[Any]) -> None:
    """Check what `form.format(*values)` can make."""
    fields = [
        (name, spec or "") for _, name, spec, _ in Formatter().parse(form) if name is not None
    ]
    digits = [number for _, spec in fields for number in _NUMBER.findall(spec)]
    reaching = any("{" in spec or "." in name or "[" in name for name, spec in fields)
    _check_fields(meter, form, digits, reaching, values)


def _check_fields(
    meter: Meter, form: str, digits: Sequence[str], computed: bool, values: Sequence[Any]
) -> None:
    """Check widths and precisions, and whether one is a value itself."""
    if computed or any(len(number) > 4 for number in digits):
        raise TrioError("the chat template formats text to a width that is too large: correct it")
    longest = max((meter.size(value) for value in values), default=0)
    fields = form.count("%") + form.count("{")
    meter.allow(len(form) + fields * longest + sum(int(number or 0) for number in digits))


_NUMBER = re.compile(r"[0-9]+")
_PERCENT = re.compile(r"%[-+ #0]*([0-9]*)(?:\.([0-9]*))?")
_STAR = re.compile(r"%[-+ #0-9.]*\*")


def _spend_product(meter: Meter, text: str, *args: Any) -> None:
    for each in args:
        if isinstance(each, str):
            meter.spend(len(text) * len(each) // 64)


FILTERS: dict[str, Callable[..., Any]] = {name: _metered_filter(name) for name in _NAMES} | {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _tojson,
    "trim": _trim,
}
"""The filters that chat templates have, by name."""
