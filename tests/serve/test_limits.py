"""Limits of a service, from text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trio_deploy import TrioError
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.families.pixels import MAX_PIXELS
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.serve import limits
from trio_deploy.serve.limits import ServiceLimits, parse_settings, setting_kinds

KINDS = setting_kinds(ServiceLimits, BatcherLimits)
DOCUMENT = Path(__file__).parents[2] / "docs" / "triton.md"


def test_settings_are_the_fields_of_the_limits() -> None:
    assert KINDS["budget"] == "float" and KINDS["max_kv_bytes"] == "int"
    assert "batcher" not in KINDS


def test_values_are_read_from_text_and_sorted_into_the_limits() -> None:
    given = {
        "max_tokens": "64",
        "budget": "0.2",
        "max_rows": "3",
        "prefillers": "0",
        "max_stop": "",
    }
    values = parse_settings(given, KINDS)
    assert values == {"max_tokens": 64, "budget": 0.2, "max_rows": 3, "prefillers": 0}
    assert ServiceLimits.from_settings(values) == ServiceLimits(
        max_tokens=64, default_max_tokens=64, budget=0.2, batcher=BatcherLimits(max_rows=3)
    )


@pytest.mark.parametrize(
    "make", [ServiceLimits, lambda **values: ServiceLimits.from_settings(values)]
)
def test_the_default_length_of_an_answer_follows_the_greatest_however_limits_are_made(make) -> None:
    assert make(max_tokens=64).default_max_tokens == 64
    assert make(max_tokens=4096).default_max_tokens == 128
    with pytest.raises(TrioError, match="default_max_tokens must be at most max_tokens = 64"):
        make(max_tokens=64, default_max_tokens=65)


def test_without_settings_they_are_the_defaults() -> None:
    assert ServiceLimits.from_settings({}) == ServiceLimits()


@pytest.mark.parametrize(
    ("text", "kind", "value"), [("True", "bool", True), ("false", "bool", False), ("x", "str", "x")]
)
def test_flags_and_texts_are_read(text: str, kind: str, value: Any) -> None:
    assert parse_settings({"name": text}, {"name": kind}) == {"name": value}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_image": "3"}, "unknown parameter 'max_image'"),
        ({"other": "1", "max_image": "3"}, "unknown parameter 'max_image': there are budget, "),
        ({"budget": "half"}, "cannot read the budget 'half'"),
        ({"prefillers": "300"}, "prefillers must be at most 256"),
        ({"preparers": "300"}, "preparers must be at most 256"),
        ({"max_images": "5000"}, "max_images must be at most 4096"),
        ({"max_rows": "0"}, "max_rows must be 1 or more"),
        ({"max_rows": "1.5"}, "max_rows must be a whole number"),
        ({"prefillers": "-1"}, "prefillers must be 0 or more"),
        ({"budget": "nan"}, "a budget of nan is not possible"),
        ({"budget": "11"}, "a budget of 11 is not possible: .* did you mean 0.11"),
        ({"budget": "11%"}, "a budget of 11% is not possible: .* did you mean 0.11"),
        ({"max_image_pixels": str(MAX_PIXELS + 1)}, "max_image_pixels must be at most"),
        ({"default_max_tokens": "2000"}, "default_max_tokens must be at most"),
        ({"max_queue_bytes": "0"}, "max_queue_bytes must be 1 or more"),
        ({"max_rows": "5000"}, "max_rows must be at most 4096, got 5000"),
        ({"max_queue": "1000000"}, "max_queue must be at most 65536"),
        ({"max_timeout_s": "1e9"}, "max_timeout_s must be at most 86400, got 1000000000"),
        ({"max_timeout_s": "86400.5"}, "max_timeout_s must be at most 86400, got 86400.5"),
        ({"max_timeout_s": "0"}, "max_timeout_s must be above 0, got 0"),
        ({"max_timeout_s": "-1"}, "max_timeout_s must be above 0, got -1"),
        ({"max_timeout_s": "inf"}, "max_timeout_s must be above 0, got inf"),
        ({"max_tokens": "1" * 5000}, "max_tokens must be a whole number"),
        ({"max_tokens": str(2**63)}, "max_tokens must be 1 or more"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        ServiceLimits.from_settings(parse_settings(settings, KINDS))


@pytest.mark.parametrize("name", sorted(limits._MAXIMA))
def test_the_greatest_value_of_a_limit_is_taken_and_nothing_above_it(name: str) -> None:
    greatest = limits._MAXIMA[name]
    kinds = KINDS | setting_kinds(RuntimeOptions)
    assert parse_settings({name: str(greatest)}, kinds) == {name: greatest}
    above = greatest + (1 if kinds[name] == "int" else 0.001)
    with pytest.raises(TrioError, match=f"{name} must be at most {greatest}, got "):
        parse_settings({name: str(above)}, kinds)


def test_no_count_but_those_that_turn_something_off_may_be_zero() -> None:
    kinds = KINDS | setting_kinds(RuntimeOptions)
    for name in (name for name, kind in kinds.items() if kind == "int"):
        least = 0 if name in ("prefillers", "vision_cache_bytes") else 1
        assert parse_settings({name: str(least)}, kinds) == {name: least}
        with pytest.raises(TrioError, match=f"{name} must be {least} or more, got {least - 1}"):
            parse_settings({name: str(least - 1)}, kinds)


def test_a_limit_without_a_maximum_may_be_as_large_as_a_signed_integer_of_64_bits() -> None:
    assert parse_settings({"max_tokens": str(2**63 - 1)}, KINDS) == {"max_tokens": 2**63 - 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_timeout_s": 0}, "max_timeout_s must be 1 or more, got 0"),
        ({"max_timeout_s": 0.0}, "max_timeout_s must be above 0, got 0.0"),
        ({"max_timeout_s": float("nan")}, "max_timeout_s must be above 0, got nan"),
        ({"max_timeout_s": 1e9}, "max_timeout_s must be at most 86400"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"max_tokens": "64"}, "max_tokens must be a whole number, got '64'"),
        ({"max_tokens": 64.0}, "max_tokens must be a whole number, got 64.0"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"budget": [0.2]}, r"budget must be a number, got \[0.2\]"),
        ({"budget": 1.5}, "a budget of 1.5 is not possible: .* above 0 and at most 1"),
        ({"budget": 0}, "a budget of 0 is not possible"),
        ({"max_images": 10**30}, "max_images must be 1 or more"),
    ],
)
def test_limits_made_in_python_are_checked_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        ServiceLimits(**values)


def test_limits_of_the_batch_are_whole_numbers() -> None:
    for wrong in ("3", 2.5, True, [1]):
        with pytest.raises(TrioError, match="max_rows must be 1 or more, got"):
            BatcherLimits(max_rows=wrong)  # type: ignore[arg-type]


def test_as_many_pixels_as_are_decoded_may_be_allowed() -> None:
    limits = ServiceLimits.from_settings(
        parse_settings({"max_image_pixels": str(MAX_PIXELS)}, KINDS)
    )
    assert limits.max_image_pixels == MAX_PIXELS


def documented_defaults() -> dict[str, int | None]:
    """Defaults of the table of settings, None where it names no number."""
    units = {"": 1, "KiB": 2**10, "MiB": 2**20, "million": 10**6}
    table = DOCUMENT.read_text(encoding="utf-8").partition("\n| setting | default |")[2]
    defaults: dict[str, int | None] = {}
    for row in re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.M):
        names, texts = (cell.split(", ") for cell in row)
        for name, text in zip(names, texts, strict=False):
            number = re.fullmatch(r"(\d+) ?(\w*)", text)
            defaults[name.strip("`")] = int(number[1]) * units[number[2]] if number else None
    return defaults


def test_the_defaults_are_those_of_the_documents_table() -> None:
    limits, documented = ServiceLimits(), documented_defaults()
    actual = {
        name: getattr(limits, name) if hasattr(limits, name) else getattr(limits.batcher, name)
        for name in KINDS
    }
    assert {name: documented[name] for name in KINDS} == actual
