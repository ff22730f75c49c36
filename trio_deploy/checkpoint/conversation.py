"""Conversations: messages that are checked, in the form that a chat template takes.

Some templates write a message's content as it is, some walk over its items, and some do one for the
system message and the other for the rest. One that gets the other form mostly fails in silence: the
question is missing in what it makes, or Python's notation of a list is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trio_deploy.checkpoint.chat_template import ChatTemplate, Message
from trio_deploy.errors import TrioError, shown
from trio_deploy.files import require_unicode

NO_TEXT = "the prompt has no text: write something to ask"

_KEY = "zqkeyxk"  # of items, where their notation is looked for
_MAX_SHAPES = 256  # of conversations whose form is remembered


def contents(message: Message) -> tuple[int, list[str]]:
    """Number of image items of a message, and its texts.

    Raises:
        TrioError: it is not a message in Hugging Face's format, or a text is no Unicode.
    """
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise TrioError('a message must be {"role": ..., "content": ...}')
    if not isinstance(message["role"], str):
        raise TrioError(f"a message's role must be a text, got {shown(message['role'])}")
    require_unicode(message["role"], "a message's role")
    content = message["content"]
    if isinstance(content, str):
        return 0, [require_unicode(content, "a message's content")]
    if not isinstance(content, list | tuple):
        raise TrioError("a message's content must be a string or a list of items")
    images, texts = 0, []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "image":
            images += 1
        elif kind == "text" and isinstance(item.get("text"), str):
            texts.append(require_unicode(item["text"], "a message's text"))
        else:
            raise TrioError(
                'a content item must be {"type": "image"} or {"type": "text", "text": "..."}, '
                f"got {shown(item)}"
            )
    return images, texts


def texts_of(prompt: str | Sequence[Message]) -> list[str]:
    """What a prompt says, message by message."""
    if isinstance(prompt, str):
        return [prompt]
    return [text for message in prompt for text in contents(message)[1]]


def require_text(texts: Sequence[str], image_token: str = "") -> None:
    """Check that a prompt asks something.

    Args:
        texts: what it says.
        image_token: a placeholder, which is nothing said.

    Raises:
        TrioError: it does not.
    """
    said = (text.replace(image_token, "") if image_token else text for text in texts)
    if not any(text.strip() for text in said):
        raise TrioError(NO_TEXT)


def as_messages(prompt: str | Sequence[Message], images: int) -> Sequence[Message]:
    """A conversation; of a plain question, a user message after its images."""
    if not isinstance(prompt, str):
        return prompt
    items = [{"type": "image"}] * images
    return [{"role": "user", "content": [*items, {"type": "text", "text": prompt}]}]


def check_template(template: ChatTemplate, image_token: str) -> str | None:
    """Check that a question reaches the model, with and without a picture.

    Args:
        image_token: what the template writes for an image.

    Returns:
        A sentence about questions that the template refuses, or leaves out where there is no
        picture; None where it takes all.

    Raises:
        TrioError: it leaves out a question about a picture, in whatever form it gets the message.
    """
    renderer = Renderer(template, image_token)
    alone, pictured = (as_messages("What is this?", images) for images in (0, 1))
    if renderer.left_out(pictured):
        raise TrioError(
            "the chat template leaves out the text of a question about a picture, so the model "
            "would not see it: pass --chat-template FILE with the one that the model was trained "
            "with, or --chat-template none for a base model, which takes raw prompts alone"
        )
    for messages, what in ((alone, "a question"), (pictured, "a question about a picture")):
        try:
            renderer.render(messages)
        except TrioError as error:
            return f"{what} alone cannot be asked, since {error}"
    if renderer.left_out(alone):
        return (
            "a question without a picture would not reach the model, since the chat template "
            "leaves out its text"
        )
    return None


class Renderer:
    """Renders conversations with a chat template, in a form in which it leaves out nothing."""

    def __init__(self, template: ChatTemplate, image_token: str) -> None:
        """Args:
        image_token: what the template writes for an image.
        """
        self._template = template
        self._image_token = image_token
        self._forms: dict[Any, _Form] = {}

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation.

        Raises:
            TrioError: as `ChatTemplate.render`.
        """
        return self._template.render(_changed(messages, self._form(messages), self._image_token))

    def left_out(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Numbers of the messages of which the template leaves out some text."""
        return self._form(messages).left_out

    def _form(self, messages: Sequence[Message]) -> _Form:
        """The form for a conversation; it depends on roles and items, not on the texts."""
        shape = _shape(messages)
        if shape is None:
            return self._find(messages)
        if shape not in self._forms:
            if len(self._forms) >= _MAX_SHAPES:
                self._forms.clear()
            self._forms[shape] = self._find(messages)
        return self._forms[shape]

    def _find(self, messages: Sequence[Message]) -> _Form:
        best, least = _Form("as given", "as given", ()), None
        for system, others in _FORMS:
            form = _Form(system, others, ())
            faults, left_out = self._try(messages, form)
            if least is None or faults < least:
                best, least = _Form(system, others, left_out), faults
            if not any(least):
                break
        return best

    def _try(
        self, messages: Sequence[Message], form: _Form
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Render with a word of its own for each text: faults, and the messages left out."""
        marks: list[tuple[int, str]] = []

        def mark(number: int, text: str) -> str:
            if not text.strip():
                return text
            marks.append((number, f"zq{len(marks)}xk"))
            return marks[-1][1]

        marked = [
            _with_texts(message, lambda text, number=number: mark(number, text))  # type: ignore[misc]
            for number, message in enumerate(messages)
        ]
        try:
            changed = _changed(marked, form, self._image_token)
            text = self._template.render(changed)
        except TrioError:
            return (1, 0, 0, 0), ()
        images = sum(contents(message)[0] for message in messages)
        wrong = int(text.count(self._image_token) != images)
        notation = int(self._writes_notation(changed))
        text = text.casefold()
        left_out = dict.fromkeys(number for number, word in marks if word not in text)
        return (0, wrong, notation, len(left_out)), tuple(left_out)

    def _writes_notation(self, messages: Sequence[Message]) -> bool:
        """Whether a list of items, or an item, is written out in Python's notation or as JSON.

        A template may change its letters and quotes, so a key is looked for that the items get for
        this alone: a template may compare them whole.
        """
        if all(isinstance(message["content"], str) for message in messages):
            return False
        try:
            return _KEY in self._template.render(list(map(_with_key, messages))).casefold()
        except TrioError:  # it refuses the key
            return False


@dataclass(frozen=True)
class _Form:
    """How contents are changed for a template: of the system message, and of the others.

    Attributes:
        left_out: numbers of the messages of which the template still leaves out some text.
    """

    system: str
    others: str
    left_out: tuple[int, ...]


_GIVEN, _ITEMS, _TEXT = "as given", "items", "text"
_FORMS = (
    (_GIVEN, _GIVEN),
    (_ITEMS, _ITEMS),
    (_GIVEN, _ITEMS),
    (_ITEMS, _GIVEN),
    (_TEXT, _TEXT),
    (_TEXT, _GIVEN),
    (_TEXT, _ITEMS),
    (_GIVEN, _TEXT),
    (_ITEMS, _TEXT),
)


def _shape(messages: Sequence[Message]) -> Any:
    """Roles and kinds of items, if these are all there is."""
    shape = []
    for message in messages:
        content = message["content"]
        if set(message) != {"role", "content"}:
            return None
        if isinstance(content, str):
            items: tuple[str, ...] | None = None if content.strip() else ("",)
        else:
            items = tuple("" if _is_blank(item) else item["type"] for item in content)
        shape.append((message["role"], items))
    return tuple(shape)


def _is_blank(item: Mapping[str, Any]) -> bool:
    return item["type"] == "text" and not item["text"].strip()


def _with_texts(message: Message, change: Callable[[str], str]) -> Message:
    """A message with its texts changed."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    items = [{**i, "text": change(i["text"])} if i["type"] == "text" else i for i in content]
    return {**message, "content": items}


def _with_key(message: Message) -> Message:
    """A message whose items have a key more."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [{**item, _KEY: ""} for item in content]}


def _changed(messages: Sequence[Message], form: _Form, image_token: str) -> list[Message]:
    return [
        _in_form(message, form.system if message["role"] == "system" else form.others, image_token)
        for message in messages
    ]


def _in_form(message: Message, form: str, image_token: str) -> Message:
    content = message["content"]
    if form == _ITEMS and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if form == _TEXT and not isinstance(content, str):
        parts = [f"{image_token}\n" if i["type"] == "image" else i["text"] for i in content]
        return {**message, "content": "".join(parts)}
    return message
