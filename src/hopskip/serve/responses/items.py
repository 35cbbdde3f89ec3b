"""Items of conversations: as they are kept and shown, and as the messages of a chat."""

from __future__ import annotations

import binascii
import json
import secrets
from base64 import b64decode, b64encode
from collections.abc import Sequence as Seq
from typing import Any

from hopskip.serve.messages import TextPart
from hopskip.serve.responses import schema

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}
CUSTOM_ARGUMENT = "input"
"""A tool that takes a text is one with this argument."""


def new_id(kind: str) -> str:
    return f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"


def shown(item: schema.Message | schema.FunctionCall | schema.CustomCall | schema.CallOutput | schema.Reasoning) -> Any:
    """An item of a request as it is kept and shown."""
    head = {"id": item.id or new_id(item.type), "type": item.type}
    if isinstance(item, schema.Message):
        return {**head, "role": item.role, "status": "completed", "content": _parts(item)}
    if isinstance(item, schema.Reasoning):
        return {
            **head,
            "summary": [{"type": "summary_text", "text": each.text} for each in item.summary],
            "content": [{"type": "reasoning_text", "text": each.text} for each in item.content],
            "encrypted_content": item.encrypted_content,
        }
    if isinstance(item, schema.CallOutput):
        return {**head, "status": "completed", "call_id": item.call_id, "output": "".join(_texts(item.output))}
    given = {"arguments": item.arguments} if isinstance(item, schema.FunctionCall) else {"input": item.input}
    return {**head, "status": "completed", "call_id": item.call_id, "name": item.name, **given}


def _parts(message: schema.Message) -> list[dict[str, Any]]:
    texts = _texts(message.content)
    if message.role == "assistant":
        return [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts]
    return [{"type": "input_text", "text": text} for text in texts]


def _texts(content: str | list[TextPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def chat_messages(items: Seq[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat. What the model has said in one turn, thoughts, text and calls, is one message.

    Args:
        items: as `shown`.
        instructions: come first, in one message with the system messages that the items begin with.
    """
    found: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    turn: dict[str, Any] | None = None
    for item in items:
        own = _of_model(item)
        if own is None:
            turn = None
            found.append(_of_others(item))
        elif turn is not None and not _begins_turn(own, turn):
            turn["tool_calls"] = turn.get("tool_calls", []) + own.pop("tool_calls", [])
            turn.update(own)
        else:
            turn = {"role": "assistant", "tool_calls": [], **own}
            found.append(turn)
    num_system = next((i for i, each in enumerate(found) if each["role"] not in ("system", "developer")), len(found))
    if num_system > 1:
        text = "\n\n".join(each["content"] for each in found[:num_system])
        found[:num_system] = [{"role": "system", "content": text}]
    return found


def _begins_turn(own: dict[str, Any], turn: dict[str, Any]) -> bool:
    """Thoughts come before text, and text before calls."""
    if "reasoning_content" in own:
        return True
    return "content" in own and ("content" in turn or bool(turn["tool_calls"]))


def _of_model(item: dict[str, Any]) -> dict[str, Any] | None:
    """What an item adds to a message of the model; None if it is not the model's."""
    kind = item["type"]
    if kind == "reasoning":
        return {"reasoning_content": _thoughts(item)}
    if kind == "message" and item["role"] == "assistant":
        return {"content": _text(item["content"])}
    if kind in ("function_call", "custom_tool_call"):
        arguments = item["arguments"] if kind == "function_call" else {CUSTOM_ARGUMENT: item["input"]}
        function = {"name": item["name"], "arguments": arguments}
        return {"tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}
    return None


def _of_others(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "message":
        return {"role": item["role"], "content": _text(item["content"])}
    return {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}


def _text(parts: Seq[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _thoughts(item: dict[str, Any]) -> str:
    return _text(item.get("content") or ()) or decoded(item.get("encrypted_content")) or _text(item["summary"])


def encoded(thoughts: str) -> str:
    """Thoughts for a client that sends them back without looking."""
    return b64encode(thoughts.encode("utf-8", "replace")).decode()


def decoded(content: str | None) -> str:
    """Of `encoded`; empty if it is another server's."""
    try:
        return b64decode(content or "", validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


def input_of_custom(arguments: str) -> str:
    """The text that a call of a custom tool has; of one that was cut short what there is."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = given.get(CUSTOM_ARGUMENT) if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments
