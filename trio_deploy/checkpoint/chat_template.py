"""Chat templates: a conversation as the text that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils

from trio_deploy.checkpoint.template_limits import LimitedEnvironment
from trio_deploy.checkpoint.template_meter import Meter, metered
from trio_deploy.errors import TrioError
from trio_deploy.files import require_unicode

Message = Mapping[str, Any]

MAX_SOURCE = 1 << 17  # characters; the longest in use have some 30,000
# What a rendering may take, in nodes of the template; the second and third are what long templates
# take for a message and for each of its characters, several times over.
_STEPS, _STEPS_PER_MESSAGE, _STEPS_PER_CHARACTER = 1_000_000, 20_000, 16
_MAX_VALUE = 1 << 20  # characters of any text, or items, beyond four times the messages'
_MAX_REASON = 300
_MAX_DATE = 100


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _TemplateNamespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that reach into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _TemplateNamespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _TemplateNamespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # without the values, of which there may be any number

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else type(message).__name__)


class ChatTemplate:
    """A checkpoint's chat template, rendered as transformers renders it.

    A template is code that came with a checkpoint, so it runs in jinja2's immutable sandbox, within
    limits on time and memory, and sees plain data only.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`; `tokens` are the special tokens a template may name (`bos_token`, …).

        Raises:
            TrioError: the template is too long, or does not parse.
        """
        if len(source) > MAX_SOURCE:
            raise TrioError(
                f"the chat template has {len(source)} characters, but at most {MAX_SOURCE} are "
                "read: correct it"
            )
        self._tokens = dict(tokens)
        environment = LimitedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["namespace"] = _TemplateNamespace
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # also Python's own, of the code that jinja2 makes of it
            raise TrioError(f"the chat template does not parse: {_reason(error)}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for these messages, ending where the assistant's answer begins.

        Raises:
            TrioError: the template refuses the messages, fails, does too much or makes no Unicode.
        """
        try:
            plain = [_plain(message) for message in messages]
        except RecursionError:
            raise TrioError("the messages nest too deeply") from None
        characters = sum(map(_characters, plain))
        meter = Meter(
            _STEPS + _STEPS_PER_MESSAGE * len(plain) + _STEPS_PER_CHARACTER * characters,
            _MAX_VALUE + 4 * characters,
        )

        def render() -> str:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )

        try:
            text = metered(meter, render)
        except TrioError:
            raise
        except jinja2.TemplateError as error:
            raise TrioError(f"the chat template refused the messages: {_reason(error)}") from error
        except Exception as error:  # whatever its code raises
            raise TrioError(f"the chat template failed: {_reason(error)}") from error
        require_unicode(text, "what the chat template made of the messages")
        return text


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_DATE:
        raise jinja2.TemplateError("a form of a date is too long")
    return datetime.now().strftime(form)


def _characters(value: Any) -> int:
    """Characters of all texts in a plain value."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0


def _reason(error: Exception) -> str:
    """An error as one short line."""
    if isinstance(error, RecursionError):
        return "it nests or calls itself too deeply"
    if isinstance(error, MemoryError):
        return "out of memory"
    try:
        text = " ".join(str(error).split())
    except Exception:  # a message of the template's own that has no text
        text = ""
    kind = "" if text and isinstance(error, jinja2.TemplateError) else type(error).__name__
    return ": ".join(filter(None, (kind, text[:_MAX_REASON])))


def _plain(value: Any) -> Any:
    """Reduce a message to JSON types; any other value becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
