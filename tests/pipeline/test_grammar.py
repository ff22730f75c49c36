"""Answers of a form keep it, however unlikely the model finds it."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (bfloat16 by its name)
import numpy as np
import pytest

from tests.support.bundles import Bundles
from tests.support.byte_level import byte_level_bundle
from tests.support.pictures import make_picture
from trio_deploy import Batcher, Pipeline, Request, TrioError
from trio_deploy.pipeline.grammar import Grammar, GrammarCompiler, Structure

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def pipeline(bundles: Bundles, run_folder: Path) -> Pipeline:
    return Pipeline.open(byte_level_bundle(bundles, run_folder), threads=1)


def asking(structure: Structure, seed: int = 0, **fields: Any) -> Request:
    given = {"max_new_tokens": 600, "temperature": 1.5, "seed": seed} | fields
    return Request("what?", make_picture(), structure=structure, **given)


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose answers are short."""
    kinds = ["integer", "boolean", "null", "string", "enum", "number"]
    kind = rng.choice(kinds if depth == 2 else [*kinds, "object", "array", "anyOf"])
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 5)}
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": rng.choice([9, 250])}
    if kind == "enum":
        return {"enum": rng.sample(["red", "white", 3, None, True], 3)}
    if kind == "array":
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1), {"type": "null"}]}
    if kind != "object":
        return {"type": kind} if kind != "number" else {"type": "number", "multipleOf": 1,
                                                        "minimum": 0, "maximum": 99}  # fmt: skip
    names = rng.sample(["a", "b", "long name", "d"], rng.randint(1, 3))
    fields = {name: random_schema(rng, depth + 1) for name in names}
    needed = rng.sample(names, rng.randint(1, len(names)))
    return {
        "type": "object",
        "properties": fields,
        "required": needed,
        "additionalProperties": False,
    }


def keeps(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema of the generator's."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    if "anyOf" in schema:
        return any(keeps(value, each) for each in schema["anyOf"])
    match schema["type"]:
        case "object":
            fields = schema["properties"]
            return (
                isinstance(value, dict)
                and {*schema["required"]} <= {*value} <= {*fields}
                and all(keeps(each, fields[name]) for name, each in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and 1 <= len(value) <= schema["maxItems"]
                and all(keeps(each, schema["items"]) for each in value)
            )
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer" | "number":
            whole = type(value) is int or (type(value) is float and value.is_integer())
            return whole and 0 <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
    return value is None


def test_answers_that_end_are_of_their_schema_alone_and_together(pipeline: Pipeline) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(200)]
    requests = [asking(Structure(json.dumps(schema)), seed) for seed, schema in enumerate(schemas)]
    with Batcher(pipeline, max_rows=16, max_queue=200) as batcher:
        handles = [batcher.submit(request) for request in requests]
        answers = [handle.result(300) for handle in handles]
    ended = [n for n, answer in enumerate(answers) if answer.finish_reason == "stop"]
    assert len(ended) > 150
    for number in ended:
        assert keeps(json.loads(answers[number].text), schemas[number]), schemas[number]
    for number in ended[:5]:
        assert pipeline.generate(requests[number]).text == answers[number].text


def test_choices_and_expressions_are_kept_too(pipeline: Pipeline) -> None:
    choices = ("red", 'a "quoted" one', "two\\three")
    said = {pipeline.generate(asking(Structure(choices=choices), n)).text for n in range(12)}
    assert said <= {*choices} and len(said) > 1
    expression = "[a-c]{3}-[0-9]{2}"
    for seed in range(4):
        text = pipeline.generate(asking(Structure(regex=expression), seed)).text
        assert re.fullmatch(expression, text)
    greedy = pipeline.generate(asking(Structure(regex=expression), temperature=0.0))
    assert re.fullmatch(expression, greedy.text) and greedy.finish_reason == "stop"
    anything = pipeline.generate(asking(Structure('{"type": "object"}'), max_new_tokens=20))
    assert anything.text.startswith("{")


def test_an_end_comes_only_where_the_form_may_end(pipeline: Pipeline) -> None:
    bundle = pipeline.bundle
    (end,) = bundle.manifest.generation.eos_token_ids
    vocabulary = bundle.config.text.vocab_size
    compiler = GrammarCompiler(bundle.tokenizer_path.read_text, vocabulary, [end])
    grammar = compiler.grammar(Structure(regex="ab?"))
    logits = np.zeros(vocabulary, np.float32)

    def allowed() -> set[int]:
        return {int(token) for token in np.flatnonzero(grammar.mask(logits) == 0)}

    a, b = pipeline.tokenize("ab")
    assert allowed() == {a}
    grammar.take(a)
    assert allowed() == {b, end}
    grammar.take(b)
    assert allowed() == {end}
    other = compiler.grammar(Structure(regex="ab?"))  # at its beginning, though it was compiled
    grammar = other
    assert allowed() == {a} and not logits.any()


WRONG = {
    "not": '{"not": {"type": "string"}}',
    "Invalid type": '{"type": "nonsense"}',
    "does not exist": '{"$ref": "#/nowhere"}',
    "deep": "[" * 5000,
    "nested": '{"type": "array", "items": ' * 300 + "{}" + "}" * 300,
    "no JSON": "{",
    "number": "5",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_is_none_is_refused_at_once(pipeline: Pipeline, name: str) -> None:
    began = time.perf_counter()
    with pytest.raises(TrioError, match="structure: .") as caught:
        pipeline.generate(asking(Structure(WRONG[name])))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.perf_counter() - began < 60  # it ends


def test_what_would_take_for_ever_is_refused_or_ends(pipeline: Pipeline) -> None:
    many = {"enum": [f"{n:0>60}" for n in range(1000)]}
    with pytest.raises(TrioError, match="structure"):
        pipeline.generate(asking(Structure(regex="[a-")))
    for structure in (
        Structure(regex="(a|b|ab){1,500}(c|d){1,500}" * 50),
        Structure(regex="(a{1,1000}){1,1000}"),
        Structure(json.dumps(many)),
    ):
        try:
            assert len(pipeline.generate(asking(structure, max_new_tokens=2)).token_ids) <= 2
        except TrioError as error:
            assert "structure" in str(error)


def test_a_loop_of_references_ends(pipeline: Pipeline) -> None:
    try:
        answer = pipeline.generate(asking(Structure('{"$ref": "#"}'), max_new_tokens=5))
    except TrioError as error:
        assert "structure" in str(error)
    else:
        assert len(answer.token_ids) <= 5


def test_tokens_without_a_form_in_bytes_are_told(bundles: Bundles) -> None:
    tiny = Pipeline.open(bundles.path("tiny"), threads=1)
    with pytest.raises(TrioError, match="tokenizer has no byte form"):
        tiny.generate(asking(Structure("{}")))
    endless = Pipeline.open(tiny.bundle.with_end_tokens([]), threads=1)
    with pytest.raises(TrioError, match="no end token"):
        endless.generate(asking(Structure("{}")))


def test_a_form_ends_by_itself() -> None:
    for fields in ({"ignore_eos": True}, {"forced": [1]}):
        with pytest.raises(TrioError, match="ends by itself"):
            asking(Structure("{}"), **fields).check()
    with pytest.raises(TrioError, match="structure must be"):
        Request("?", structure="{}").check()  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("width", [1, 8, 61, 1003])
def test_a_mask_leaves_the_logits_that_may_come_and_no_others(width: int, dtype: str) -> None:
    """At each step by itself, whatever the step before it allowed."""

    class Matcher:
        allowed: np.ndarray

        def compute_bitmask(self) -> bytes:
            padded = np.append(self.allowed, [False] * (-width % 32))  # llguidance's words
            return np.packbits(padded, bitorder="little").tobytes()

        def is_error(self) -> bool:
            return False

    matcher, generator = Matcher(), np.random.default_rng(width)
    grammar = Grammar(matcher, "structure")
    for share in (0.5, 0.0, 1.0, 0.1):
        matcher.allowed = generator.random(width) < share
        logits = generator.standard_normal(width).astype(dtype)
        logits[generator.random(width) < 0.1] = -np.inf  # tokens that are suppressed
        before = logits.copy()
        expected = [x if may else -np.inf for x, may in zip(logits, matcher.allowed, strict=True)]
        np.testing.assert_array_equal(grammar.mask(logits), np.array(expected, np.float64))
        np.testing.assert_array_equal(logits, before)
