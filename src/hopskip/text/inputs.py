"""What a program gives as prompts: told apart, checked, and brought into one form."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, cast

from hopskip.errors import ConfigError, PromptError, shown
from hopskip.sampling_params import SamplingOptions, SamplingParams, with_defaults
from hopskip.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""One turn of a chat: `{"role": "user", "content": "..."}`."""

Prompt = str | Seq[int] | Seq[Message]
"""A text, token ids, or a chat, which the checkpoint's own template turns into text."""

_FORMS = "a text, a list of token ids, or a chat such as [{'role': 'user', 'content': '...'}]"
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""As chat templates call it."""


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many: a text, a list of ids and a list of messages are one. Any iterable is taken for a list.

    Raises:
        PromptError: there is none, or one is nothing of the kind.
    """
    if isinstance(prompts, str):
        return [checked_prompt(prompts)]
    parts = _parts(prompts, "prompts")
    if not parts:
        raise PromptError("the list of prompts is empty; give at least one")
    if _is_id(parts[0]) or _is_message(parts[0]):
        return [_checked_list(parts, "the prompt")]
    return [checked_prompt(part, f"prompt {index}") for index, part in enumerate(parts)]


def chat_list(chats: Seq[Message] | Iterable[Seq[Message]]) -> list[Prompt]:
    """One chat or many.

    Raises:
        PromptError: there is none, or one is no list of messages.
    """
    if isinstance(chats, str):
        raise PromptError(
            f"a chat is a list of messages, not the text {shown(chats)}; give [{{'role': 'user', 'content': '...'}}]"
        )
    found = prompt_list(cast("Seq[Prompt]", chats))
    for index, chat in enumerate(found):
        if isinstance(chat, str) or not _is_message(chat[0]):
            raise PromptError(
                f"chat {index} is {shown(chat)}, which is no list of messages; use generate for texts and token ids"
            )
    return found


def checked_prompt(prompt: Any, name: str = "the prompt") -> Prompt:
    """A prompt: as a plain text, ids as plain integers, a chat as plain messages.

    Raises:
        PromptError: it is nothing of the kind.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"{name} is empty; give some text")
        return str(prompt)
    return _checked_list(_parts(prompt, name), name)


def template_variables(
    tokenizer: Tokenizer, enable_thinking: bool | None, chat_template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a chat template is told beside the messages.

    Raises:
        ConfigError: the model's template has no use for it.
    """
    known = tokenizer.template_variables
    variables: dict[str, Any] = {}
    if enable_thinking is not None:
        if not isinstance(enable_thinking, bool):
            raise ConfigError(f"enable_thinking is {shown(enable_thinking)}; it must be True, False or None")
        switch = next((name for name in THINKING_SWITCHES if name in known), None)
        if switch is None:
            raise ConfigError(
                "thinking cannot be turned on or off: this model's chat template has no switch for it; leave it out"
            )
        variables[switch] = enable_thinking
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise ConfigError(f"chat_template_kwargs is {shown(chat_template_kwargs)}; give values by name")
    for name, value in (chat_template_kwargs or {}).items():
        if name == "messages" or name not in known | {"add_generation_prompt", "tools"}:
            takes = ", ".join(sorted((known | {"tools"}) - {"messages", *tokenizer.special_tokens}))
            raise ConfigError(f"chat_template_kwargs has {shown(name)}, but this model's chat template takes {takes}")
        variables[name] = value
    return variables


def params_for(
    num_prompts: int,
    given: SamplingParams | Iterable[SamplingParams] | None,
    options: SamplingOptions,
    recommended: Mapping[str, Any] = MappingProxyType({}),
) -> list[SamplingParams]:
    """Those of each prompt, from what a program gives for one or for all: a `SamplingParams` is taken as it is, and
    `options` alone go `with_defaults`.

    Raises:
        ConfigError: what is given is nothing of the kind, or not as many as there are prompts.
    """
    if given is None:
        return [with_defaults(options, recommended)] * num_prompts
    if isinstance(given, SamplingParams):
        return [given.updated(**options)] * num_prompts
    listed: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else [given]
    for params in listed:
        if not isinstance(params, SamplingParams):
            raise ConfigError(
                f"sampling_params is {shown(params)}; give a SamplingParams, or its fields by name: max_tokens=20"
            )
    if len(listed) != num_prompts:
        raise ConfigError(f"{len(listed)} sampling_params for {num_prompts} prompts; give one for each, or one for all")
    return [params.updated(**options) for params in listed]


def _parts(value: Any, name: str) -> list[Any]:
    """The parts of a list, a tuple, a generator, ...; everything else is refused, with what to give instead."""
    remedy: str | None = None
    if isinstance(value, Mapping):
        remedy = _remedy_for_mapping(value)
    elif hasattr(value, "tolist") and hasattr(value, "shape"):
        remedy = "give plain token ids: its .tolist()"  # a tensor or an array
    elif hasattr(value, "ids") and hasattr(value, "offsets"):
        remedy = "give its .ids"  # of the tokenizers library
    elif isinstance(value, bytes | bytearray | memoryview):
        remedy = "give text: bytes(...).decode()"
    elif isinstance(value, PurePath):
        remedy = "give the text of the file: path.read_text()"
    elif hasattr(value, "model_dump"):
        remedy = "give [message.model_dump(exclude_none=True)]"  # a message of an API's client
    elif isinstance(value, set | frozenset) or not isinstance(value, Iterable):
        remedy = f"give {_FORMS}"
    if remedy is not None:
        raise PromptError(f"{name} is {_named(value)}; {remedy}")
    return list(value)


def _remedy_for_mapping(value: Mapping[str, Any]) -> str:
    if "input_ids" in value:
        return "give its token ids: a list from ['input_ids'] (tensors have .tolist())"
    if "role" in value:
        return "a chat is a list of messages: put it into one"
    for key in ("prompt", "text", "prompt_token_ids", "messages"):
        if key in value:
            return f"give what it has as {key!r}"
    return f"give {_FORMS}"


def _checked_list(parts: list[Any], name: str) -> Prompt:
    """Token ids or messages."""
    if not parts:
        raise PromptError(f"{name} is empty; give a text, token ids or chat messages")
    if _is_id(parts[0]):
        for part in parts:
            if not _is_id(part):
                raise PromptError(f"{name} has {shown(part)} among its token ids; they must be whole numbers")
        return [int(part) for part in parts]
    if isinstance(parts[0], Mapping):
        return [_checked_message(part, name) for part in parts]
    if isinstance(parts[0], str | list | tuple):
        raise PromptError(f"{name} is the list {shown(parts)}; prompts may not be nested deeper: flatten it")
    if hasattr(parts[0], "model_dump"):
        raise PromptError(f"{name} has {_named(parts[0])} for a message; give message.model_dump(exclude_none=True)")
    raise PromptError(f"{name} is a list of {_named(parts[0])}; give {_FORMS}")


def _checked_message(message: Any, name: str) -> Message:
    """A message whose content is text."""
    wanted = "give {'role': 'user', 'content': '...'}"
    if not isinstance(message, Mapping):
        raise PromptError(f"{name} has {shown(message)} among its messages; {wanted}")
    if not isinstance(message.get("role"), str):
        raise PromptError(f"chat message {shown(message)} has no role; {wanted}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise PromptError(f"chat message {shown(message)} has no content; {wanted}")
    if isinstance(content, list | tuple):
        return {**message, "content": "".join(_text_of_part(part) for part in content)}
    if content is not None and not isinstance(content, str):
        raise PromptError(f"the content of a chat message is {_named(content)}; give text")
    return message


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise PromptError(f"{shown(part)} is no part of a message that this model reads; give text only")
    return text


def _is_id(value: object) -> bool:
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "content" in value)


def _named(value: object) -> str:
    """The value, and what it is where its value does not say it."""
    kind = type(value)
    return shown(value) if kind.__module__ == "builtins" else f"{shown(value)}, of type {kind.__name__}"
