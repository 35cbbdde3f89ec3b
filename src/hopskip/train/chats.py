"""Rows of chat data in the spellings that are in use, as messages with role and content.

| rows | |
|---|---|
| `messages` (OpenAI), `conversations` (ShareGPT: from and value) | several turns |
| `instruction`, `input`, `output` (Alpaca); `instruction`, `context`, `response` (Dolly) | one turn |
| `prompt` with `completion` or `response`, `question` with `answer` or `response` | one turn; either may be a chat |
| `system`, `system_prompt` beside them | who the assistant is |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hopskip.errors import ConfigError, shown

Message = Mapping[str, Any]

_CHATS = ("conversations", "conversation")
_PROMPTS = ("instruction", "question", "input")
_MORE = ("input", "context")
_RESPONSES = ("completion", "output", "answer")
_SYSTEMS = ("system", "system_prompt")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool": "tool",
}
"""Who speaks, as ShareGPT and its descendants name them."""


def chat_of(
    row: Mapping[str, Any],
    *,
    messages_field: str = "messages",
    prompt_field: str = "prompt",
    response_field: str = "response",
) -> list[Message] | None:
    """The chat that a row holds, or None if it holds none. A field that is named here takes the place of the usual
    names for it.

    >>> chat_of({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    >>> chat_of({"instruction": "Add.", "input": "2, 3", "output": "5"})
    [{'role': 'user', 'content': 'Add.\n\n2, 3'}, {'role': 'assistant', 'content': '5'}]

    Raises:
        ConfigError: there is something in its place that is not a chat.
    """
    chat = _first(row, messages_field, _CHATS if messages_field == "messages" else ())
    if chat is not None:
        messages = _messages(chat)
    else:
        prompt, answer = _prompt(row, prompt_field), None
        if prompt is not None:
            answer = _first(row, response_field, _RESPONSES if response_field == "response" else ())
        if prompt is None or (answer is None and isinstance(prompt, str)):
            return None
        messages = [*_said("user", prompt), *(_said("assistant", answer) if answer is not None else ())]
    system = _first(row, "system", _SYSTEMS)
    if isinstance(system, str) and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def is_empty(
    row: Mapping[str, Any],
    *,
    messages_field: str = "messages",
    prompt_field: str = "prompt",
    response_field: str = "response",
) -> bool:
    """Whether a row that holds no chat has the fields of one, with nothing in one of them: chats that were collected
    have a few of those.

    >>> is_empty({"prompt": "Hi", "response": ""}), is_empty({"prompt": "Hi", "reply": "Hello!"})
    (True, False)
    """
    spellings = (
        (messages_field, _CHATS if messages_field == "messages" else ()),
        (prompt_field, ("turns", *_PROMPTS) if prompt_field == "prompt" else ("turns",)),
        (response_field, _RESPONSES if response_field == "response" else ()),
    )
    chats, prompts, responses = ({name, *others} & row.keys() for name, others in spellings)
    return bool(chats or (prompts and responses))


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The functions that the assistant of a row may call, for its chat template.

    Raises:
        ConfigError: `tools` is not a list, nor JSON of one.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ConfigError(f"tools are {shown(tools)}, which is not JSON; give a list of functions") from None
    if tools is not None and not isinstance(tools, list):
        raise ConfigError(f"tools are {shown(tools)}; give a list of functions")
    return tools


def _first(row: Mapping[str, Any], name: str, others: Sequence[str]) -> Any:
    """The field of that name, else the first of the others; None for an empty one."""
    return next((row[field] for field in (name, *others) if row.get(field)), None)


def _prompt(row: Mapping[str, Any], name: str) -> Any:
    """What is asked: a text, or a chat."""
    turns = row.get("turns")
    if row.get(name):
        return row[name]
    if isinstance(turns, list) and turns:
        return turns[0]
    if name != "prompt":
        return None
    asked = _first(row, name, _PROMPTS)
    more = next((row[field] for field in _MORE if row.get(field) and row[field] != asked), None)
    is_split = row.get("instruction") and isinstance(asked, str) and isinstance(more, str)
    return f"{asked}\n\n{more}" if is_split else asked


def _said(role: str, value: Any) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value)


def _messages(values: Any) -> list[Message]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"a chat is a list of objects with role and content, not {shown(values)}")
    if all(isinstance(value, str) for value in values):  # the speakers take turns
        return [{"role": ("user", "assistant")[index % 2], "content": value} for index, value in enumerate(values)]
    return [_message(value) for value in values]


def _message(value: Any) -> Message:
    """One message; fields that a table fills with nothing are left out."""
    fields = {name: item for name, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
    role = fields.pop("role", None) or fields.pop("from", None)
    if "content" not in fields and "value" in fields:
        fields["content"] = fields.pop("value")
    if not isinstance(role, str) or not fields.keys() & {"content", "tool_calls"}:
        raise ConfigError(f"a chat is a list of objects with role and content, but one is {shown(value)}")
    return {"role": _ROLES.get(role.lower(), role), **fields}
