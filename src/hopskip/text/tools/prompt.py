"""Tells a model of its tools whose chat template does not know any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from hopskip.text.tools.base import ToolFormat, to_json

_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return the function's name and its arguments in this way:
{example}"""


def needs_prompt(messages: Seq[Mapping[str, Any]], tools: Any) -> bool:
    """True if there is something to say that only templates for tools know."""
    return bool(tools) or any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)


def with_tools(
    messages: Seq[Mapping[str, Any]], tools: Seq[Any] | None, tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """The same chat in the words of templates that know no tools: the tools in the system message, calls in the
    assistant's text, results in messages of the user."""
    told: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if told and told[-1].pop("is_result", False):
                told[-1] |= {"content": f"{told[-1]['content']}\n{result}", "is_result": True}
            else:
                told.append({"role": "user", "content": result, "is_result": True})
        elif message.get("tool_calls"):
            written = tool_format.write([_named(call) for call in message["tool_calls"]])
            text = message.get("content")
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append({**rest, "content": f"{text}\n{written}" if text else written})
        else:
            told.append(dict(message))
    if tools:
        listed = "\n".join(to_json(tool) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=listed, example=tool_format.example)
        if told and told[0].get("role") == "system":
            told[0]["content"] = f"{told[0].get('content') or ''}\n\n{instructions}"
        else:
            told.insert(0, {"role": "system", "content": instructions})
    return [{key: value for key, value in message.items() if key != "is_result"} for message in told]


def system_into_user(messages: Seq[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same for templates that refuse system messages: the first user message begins with it."""
    if len(messages) < 2 or messages[0].get("role") != "system" or messages[1].get("role") != "user":
        return list(messages)
    text = f"{messages[0]['content']}\n\n{messages[1].get('content') or ''}"
    return [{**messages[1], "content": text}, *messages[2:]]


def _named(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    return str(function.get("name")), json.loads(arguments) if isinstance(arguments, str) else arguments
