"""Chat templates: from messages to the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hopskip.errors import CheckpointError, PromptError


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
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
            """Names that the template takes from outside: `messages`, perhaps `tools`, ..."""
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template is not valid ({error}); give a plain prompt") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a chat.

        Raises:
            PromptError: the messages are not a list of mappings with a role, or the template refuses them.
        """
        if isinstance(messages, str) or not messages:
            raise PromptError(f"a chat is a non-empty list of messages with role and content, not {messages!r}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise PromptError(f"chat message {message!r} has no role; give {{'role': 'user', 'content': '...'}}")
        # templates test for a key, not for None
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from None


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
