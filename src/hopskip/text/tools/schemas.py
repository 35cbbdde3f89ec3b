"""JSON schemas of calls and their arguments, to stand in grammars."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from hopskip.text.json_schema import STRICT
from hopskip.text.tools.base import Tool


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, to stand inside another: with an address, so that its references stay its
    own."""
    parameters = tool.parameters or {"type": "object"}
    return {"$id": f"tool:{tool.name}", **parameters, **({STRICT: True} if tool.strict else {})}


def call_schema(tools: Seq[Tool], arguments_key: str) -> dict[str, Any]:
    """The schema of a call written as a JSON object."""
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, arguments_key: arguments_schema(tool)},
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
