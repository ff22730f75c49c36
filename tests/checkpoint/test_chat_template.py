"""Chat templates render as in transformers, and an unsound one is one error, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.limited import limited_python
from trio_deploy import TrioError
from trio_deploy.checkpoint.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages | tojson(indent=2) }} {{ eos_token }}",
    "{% set ns = namespace(found=false, no=none) %}{% for m in messages %}"
    "{% set ns.found = true %}{% endfor %}{{ ns.found }}{{ ns.no is none }}"
    "{{ messages[0]['content'].split(' ')[-1] | trim }}",
    "{{ strftime_now('%Y') }}{% if tools is none %}no tools{% endif %}",
    "{% macro say(m, end='.') %}{{ m.role|capitalize ~ ': ' + m['content']|string + end }}"
    "{% endmacro %}{{ say(messages[0]) }}{{ say(messages[1:][0], end='!') }}",
    "{% for role, group in messages|groupby('role') %}{{ role }}{{ group|length }}{% endfor %}"
    "{% for g in messages|groupby('role') %}{{ g.grouper, g.list|length }}{% endfor %}",
    "{{ '{} and {:>5}'.format(1, 'a') }}{{ '%s 2026 %5d' % ('x', 3) }}{{ '%s'|format(3) }}"
    "{{ '{{\"a\": {}}}'.format(2) }}{{ 'ab'.replace('a', 'bb') }}{{ ','.join(['a', 'b']) }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ [1, 2]|sum }}{{ 1.25|round(1) }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ {'a': (1, 2)}.a }}",
    "{{ 'a\nb'|indent(2) }}{{ messages[0].content|replace('b', 'c')|upper }}{{ messages[-1] }}"
    "{% for k, v in messages[0].items() if k != 'role' %}{{ loop.index }}{{ k, v }}{% endfor %}",
    "{% for x in [1, [2, 3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    "{% filter upper %}a{{ 2 ** 10 // 3 % 7 - 1 }}{% endfilter %}{{ 'b' in 'abc' }}{{ 1 < 2 < 3 }}",
    "{% set x %}<b>{{ '<i>'|e }}{% endset %}{{ x + '<a>'|safe }}{{ none }}{{ missing }}{{ 0.1 }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "user", "content": "is <b> it 'ä' ?"},
        {"role": "assistant", "content": "no"},
    ]
    expected, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **TOKENS
    )
    assert ChatTemplate(template, TOKENS).render(messages) == expected[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only one message') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages[0].nothing.at_all }}",
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_an_error(template: str) -> None:
    with pytest.raises(TrioError, match="chat template refused"):
        ChatTemplate(template, TOKENS).render([{"role": "user", "content": "x"}])


def test_a_template_never_sees_the_images_themselves() -> None:
    picture = Image.new("RGB", (2, 2))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    text = ChatTemplate("{{ messages[0].content[0].image }}", TOKENS).render(messages)
    assert text == "<Image>"


NS = "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
LONG = "{% set a = 'x' * 900000 %}{% set b = 'x' * 900000 %}{% for i in range(99999) %}"
TOO_LARGE = {
    "times": "{{ 'x' * 4000000000 }}",
    "times a list": "{{ [0] * 400000000 }}",
    "doubled by ~": NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled lists": NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubled keys": NS + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "deep lists": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "views": "{% set d = {'a': 'x' * 900000} %}{{ d.values() ~ d.values() }}",
    "replace": NS + "{% set ns.x = ns.x.replace('x', 'xxx') %}{% endfor %}",
    "the filter replace": NS + "{% set ns.x = ns.x|replace('x', 'xxx') %}{% endfor %}",
    "join": "{{ range(99999)|join('x' * 10000) }}",
    "the method join": "{{ ('x' * 10000).join(('a' * 99999)|list) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of ten": "{{ 10 ** 4000000 }}",
    "ljust": "{{ 'x'.ljust(4000000000) }}",
    "% width": "{{ '%4000000000d' % 3 }}",
    "% width of a name": "{{ '%(a(b))4000000000d' % {'a(b)': 3} }}",
    "% width by value": "{{ '%*d' % (1000000000, 3) }}",
    "format width": "{{ '{:>4000000000}'.format(3) }}",
    "format width by value": "{{ '{:{}}'.format(3, 1000000000) }}",
    "the filter format": "{{ '%4000000000d'|format(3) }}",
    "format of an attribute": "{% set ns = namespace(x='x' * 900000) %}"
    "{{ ('{0.x}' * 1000).format(ns) }}",
    "indent": "{{ ('a\n' * 100000)|indent(1000000000) }}",
    "indent by text": "{{ ('a\n' * 100000)|indent('x' * 1000) }}",
    "tojson": "{{ messages|tojson(indent=1000000000) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "a method in disguise": "{{ (['ab']|map(attribute='ljust')|first)(1000000000) }}",
}
TOO_LONG = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a condition": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "comparisons": LONG + "{% if a == b %}{% endif %}{% endfor %}",
    "searches": LONG + "{% if 'y' in a %}{% endif %}{% endfor %}",
    "slices": LONG + "{% set c = a[1:] %}{% endfor %}",
    "searches from the end": "{{ ('a' * 900000).rfind('b' + 'a' * 400000) }}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 + 'a') }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "text": "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "a macro's text": "{% macro f() %}{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}"
    "{% endmacro %}{{ f()|length }}",
}
FAILS = {
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "division": "{{ 1 // 0 }}",
    "a wrong format": "{{ '%d' % 'x' }}",
    "none + 1": "{{ none + 1 }}",
    "infinity": "{{ 1e999 }}",
    "a call of text": "{{ 'x'() }}",
    "a date of half a character": "{{ strftime_now('\\ud800') }}",
    "a date that is no text": "{{ strftime_now(3) }}",
}
REFUSES = {
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "encode": "{{ 'x'.encode() }}",
    "a long date": "{{ strftime_now('%Y' * 1000) }}",
    "a long reason": "{{ raise_exception('x\n' * 1000) }}",
    "a reason that is no text": "{{ raise_exception(messages) }}",
    "the sum of lists": "{{ ([[1]] * 1000)|sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "nothing to call": "{{ foo() }}",
}
NO_TEMPLATE = {
    "a number": "{{ " + "9" * 5000 + " }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "a sum": "{{ " + "1+" * 30000 + "1 }}",
    "many loops": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "many conditions": "{% if a %}" * 150 + "{% endif %}" * 150,
    "center": "{{ 'x'|center(4000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "syntax": "{% for %}",
}
UNSOUND = [
    (TOO_LARGE, "makes a value of more than|digits|pads text|width|nests lists"),
    (TOO_LONG, "takes too many steps"),
    (FAILS, "the chat template failed: "),
    (REFUSES, "the chat template refused the messages: "),
    (NO_TEMPLATE, "the chat template does not parse: "),
    ({"half a character": "{{ '\\ud800' }}"}, "not valid Unicode"),
    ({"length": "x" * 200_000}, "has 200000 characters"),
]


def test_an_unsound_template_is_one_error_in_little_time_and_memory(tmp_path: Path) -> None:
    """All in one child, which dies where one of them takes too much."""
    templates = {name: template for group, _ in UNSOUND for name, template in group.items()}
    (tmp_path / "templates.json").write_text(json.dumps(templates))
    child = """
import json, sys
from trio_deploy import TrioError
from trio_deploy.checkpoint.chat_template import ChatTemplate
for name, template in json.load(open(sys.argv[1])).items():
    try:
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}])
    except TrioError as error:
        print(json.dumps([name, str(error)]), flush=True)
"""
    done = limited_python(child, tmp_path / "templates.json", memory_mib=1024)
    assert done.rc == 0, (done.out[-200:], done.err[-2000:])
    errors = dict(map(json.loads, done.out.splitlines()))
    for group, words in UNSOUND:
        for name in group:
            assert name in errors, f"{name} was rendered"
            assert any(each in errors[name] for each in words.split("|")), (name, errors[name])
            assert len(errors[name]) < 500 and "\n" not in errors[name], name


def test_long_conversations_are_rendered() -> None:
    template = (
        "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line|trim ~ '\n' }}"
        "{% endfor %}{{ loop.index0 }}{{ messages|length }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a line of text\n" * 500}] * 300
    text = ChatTemplate(template, TOKENS).render(messages)
    assert text.count("a line of text\n") == 150_000
    messages = [{"role": "user", "content": "x" * 4_000_000}]
    template = "{% for m in messages %}{{ '<' + m['content'] | trim + '>' }}{% endfor %}"
    assert len(ChatTemplate(template, TOKENS).render(messages)) == 4_000_002


def test_messages_that_contain_themselves_are_an_error() -> None:
    content: list = []
    content.append(content)
    with pytest.raises(TrioError, match="nest too deeply"):
        ChatTemplate("{{ messages }}", TOKENS).render([{"role": "user", "content": content}])
