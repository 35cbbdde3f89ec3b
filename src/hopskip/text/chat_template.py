"""Chat templates: from messages to the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hopskip.errors import CheckpointError, ConfigError, PromptError, shown


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for inference its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. It is a program that comes with a checkpoint, so it runs in a sandbox, as in
    transformers.

    Raises:
        CheckpointError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise CheckpointError(f"the model's chat template is a {type(source).__name__}; give a plain prompt")
        self.source = source
        try:
            self._template, self.variables = _compile(source)
            """Names that the template takes from outside: `messages`, perhaps `tools`, ..."""
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template is not valid ({error}); give a plain prompt") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a chat.

        Raises:
            PromptError: the messages are not a list of mappings with a role, or the template refuses them.
        """
        check_messages(messages)
        # templates test for a key, not for None
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from None


class ChatTemplates:
    """The chat templates of a model: mostly one, sometimes one for plain chats and one for those with tools.

    Args:
        sources: by name: `default`, `tool_use`. Others have uses that are not known here.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.default = ChatTemplate(sources.get("default", next(iter(sources.values()))))
        self.for_tools = ChatTemplate(sources["tool_use"]) if "tool_use" in sources else self.default
        self.variables = self.default.variables | self.for_tools.variables
        self.source = "\n".join(dict.fromkeys((self.default.source, self.for_tools.source)))
        """Of all of them."""

    @property
    def knows_tools(self) -> bool:
        return "tools" in self.for_tools.variables

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a chat: see `ChatTemplate.render`."""
        template = self.for_tools if variables.get("tools") else self.default
        return template.render(messages, **variables)


def read_template(given: str | Path) -> str:
    """A chat template that a user gives: the name of a file, or the template itself.

    Raises:
        ConfigError: the file cannot be read, or is no template.
    """
    source, name = given, "the chat template"
    if not isinstance(given, str | Path):
        raise ConfigError(f"chat_template is {shown(given)}; give a file, or the text of a template")
    if isinstance(given, Path) or not ("{" in given or "\n" in given):
        name = f"the chat template {str(given)!r}"
        try:
            source = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"{name} cannot be read ({reason}); give a file with a Jinja template") from None
    try:
        _compile(str(source))
    except jinja2.TemplateError as error:
        raise ConfigError(f"{name} is not valid Jinja: {error}") from None
    return str(source)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises PromptError: they are not a list of mappings with a role."""
    if isinstance(messages, str) or not messages:
        raise PromptError(f"a chat is a non-empty list of messages with role and content, not {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"chat message {message!r} has no role; give {{'role': 'user', 'content': '...'}}")


def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template, and the names that it takes from outside."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    template = environment.from_string(source)
    return template, frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def cut_after(text: str, content: str) -> str:
    """The text of a chat up to the end of its last message, for the model to go on with it. What a template trims off
    the message does not come back.

    Raises:
        PromptError: the message is empty, or the template does not write it.
    """
    start = text.rfind(content.strip()) if content.strip() else -1
    if start < 0:
        raise PromptError("the last message cannot be continued: it is empty, or the chat template does not write it")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
