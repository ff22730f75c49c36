"""A template gets conversations in a form in which it leaves out nothing, or it is said aloud."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat_templates import KNOWN, TOKENS
from trio_deploy.checkpoint.chat_template import ChatTemplate
from trio_deploy.checkpoint.conversation import Renderer, check_template
from trio_deploy.errors import TrioError

IMAGE = {"type": "image"}
ITEMS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'image' %}"
    "<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}|{% endfor %}"
)
TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
JOINED = "{% for m in messages %}{{ m.role + ': ' + m.content + '|' }}{% endfor %}"
SYSTEM_TEXT = "{% if messages[0].role == 'system' %}<<{{ messages[0].content }}>>{% endif %}" + (
    ITEMS.replace("in messages", "in messages if m.role != 'system'")
)
SYSTEM_ITEMS = (
    "{% if messages[0].role == 'system' %}<<{{ messages[0].content[0].text }}>>{% endif %}"
    + TEXTS.replace("in messages", "in messages if m.role != 'system'")
)


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*content: Any) -> dict[str, Any]:
    alone = len(content) == 1 and isinstance(content[0], str)
    return {"role": "user", "content": content[0] if alone else list(content)}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (ITEMS, [user("what ?")], "user: what ?|"),
        (ITEMS, [user(IMAGE, text("what ?"))], "user: <image>what ?|"),
        (TEXTS, [user("what ?")], "user: what ?|"),
        (TEXTS, [user(IMAGE, text("what ?"))], "user: <image>\nwhat ?|"),
        (JOINED, [user(IMAGE, text("what ?"))], "user: <image>\nwhat ?|"),
        (ITEMS, [system("be brief"), user("what ?")], "system: be brief|user: what ?|"),
        (SYSTEM_TEXT, [system("be brief"), user("what ?")], "<<be brief>>user: what ?|"),
        (SYSTEM_TEXT, [system([text("be brief")]), user("what ?")], "<<be brief>>user: what ?|"),
        (SYSTEM_ITEMS, [system("be brief"), user("what ?")], "<<be brief>>user: what ?|"),
        (
            SYSTEM_ITEMS,
            [system([text("be brief")]), user(IMAGE, text("what ?"))],
            "<<be brief>>user: <image>\nwhat ?|",
        ),
    ],
)
def test_contents_take_the_form_that_the_template_reads(
    template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    renderer = Renderer(ChatTemplate(template, {}), "<image>")
    assert renderer.render(messages) == expected
    assert renderer.left_out(messages) == ()
    assert renderer.render(messages) == expected, "the remembered form differs"


@pytest.mark.parametrize(
    "change",
    [
        "m.content | upper | trim",
        "m.content | trim | title",
        "m.content | tojson",
        "m.content | e",
        "m.content.split('</think>')[-1]",
        "'%-30s' % m.content",
    ],
)
@pytest.mark.parametrize("said", ['  is "it" <b>\n', "thinking </think> so", "a", "ẞ ?"])
def test_a_template_that_changes_texts_leaves_nothing_out(change: str, said: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ " + change + " }}{% endfor %}", {})
    renderer = Renderer(template, "<image>")
    messages = [system("be brief"), user(said), {"role": "assistant", "content": said}, user(said)]
    assert renderer.left_out(messages) == ()
    assert renderer.render(messages) == template.render(messages), "it was given another form"


@pytest.mark.parametrize(
    "change",
    [
        "m['content']",
        "m['content'] | upper",
        "m['content'] | title",
        "m['content'] | e",
        "m['content'] | tojson",
        "m['content'] | string | replace(\"'\", '`')",
        "m['content'] | string | replace(' ', '') | lower",
    ],
)
def test_pythons_notation_of_items_does_not_reach_the_model(change: str) -> None:
    """However the template changes it."""
    template = ChatTemplate("{% for m in messages %}{{ " + change + " }}{% endfor %}", {})
    renderer = Renderer(template, "<image>")
    for said, content in (("what ?", [text("what ?")]), ("<image>\na", [IMAGE, text("a")])):
        messages = [system([text("be brief")]), user(*content)]
        assert renderer.left_out(messages) == ()
        assert renderer.render(messages) == template.render([system("be brief"), user(said)])


def test_items_that_a_template_compares_whole_are_as_given() -> None:
    source = "{% for m in messages %}{% if {'type': 'image'} in m.content %}<image>{% endif %}"
    source += "{{ m.content | selectattr('text', 'defined') | map(attribute='text') | join }}"
    renderer = Renderer(ChatTemplate(source + "{% endfor %}", {}), "<image>")
    assert renderer.render([user(IMAGE, text("a"), text("b"))]) == "<image>ab"


@pytest.mark.parametrize("name", KNOWN)
def test_templates_that_models_come_with_take_questions_with_and_without_pictures(
    name: str,
) -> None:
    known = KNOWN[name]
    template = ChatTemplate(known.source, TOKENS)
    assert check_template(template, known.image_token) is None
    renderer = Renderer(template, known.image_token)
    question = user(IMAGE, text("What is this?"))
    assert renderer.render([question]) == known.asked
    assert renderer.render([user("What is this?")]).count("What is this?") == 1
    for content in ("Be brief.", [text("Be brief.")]):
        if known.told is None:
            with pytest.raises(TrioError, match="the chat template refused the messages"):
                renderer.render([system(content), question])
        else:
            assert renderer.render([system(content), question]) == known.told


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.content is not string and m.content[0].type == 'image' %}"
        "<image>{{ m.content[1].text }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if 'image' in m.content | string %}<image>"
        "{{ m.content[1].text }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_for_pictures_alone_is_no_error(source: str) -> None:
    note = check_template(ChatTemplate(source, {}), "<image>")
    assert note is not None and note.startswith("a question without a picture would not reach the")


def test_what_a_template_leaves_out_in_every_form_is_told() -> None:
    only_user = TEXTS.replace("in messages", "in messages if m.role == 'user'")
    renderer = Renderer(ChatTemplate(only_user, {}), "<image>")
    messages = [system("a"), user("a"), {"role": "assistant", "content": "a"}, user("a")]
    assert renderer.left_out(messages) == (0, 2)
    assert renderer.render(messages) == "user: a|user: a|"
    assert renderer.left_out([system(" "), user("a")]) == (), "a blank text is nothing left out"
    half = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    renderer = Renderer(ChatTemplate(half, {}), "<image>")
    assert renderer.left_out([user(text("a"), text("b"))]) == (0,), "the second text is missing"
    assert renderer.render([user(text("a"), text("b"))]) == "a"


def test_more_than_role_and_content_reaches_the_template() -> None:
    renderer = Renderer(ChatTemplate("{{ messages[0].name }}: {{ messages[0].content }}", {}), "")
    for name in ("ada", "alan"):
        assert renderer.render([user("hi") | {"name": name}]) == f"{name}: hi"
