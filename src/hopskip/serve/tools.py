"""Tool calls: which notation a model writes them in, a grammar that makes it write one, and reading them back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from hopskip.serve.schema import Tool


@dataclass(frozen=True)
class Notation:
    """How calls stand in the text: JSON objects, between marks if there are any."""

    opening: str
    closing: str
    arguments_key: str

    @classmethod
    def of_template(cls, source: str) -> Notation:
        """That which a chat template teaches: `<tool_call>` (Qwen, Hermes, SmolLM2), else bare JSON (Llama 3)."""
        if "<tool_call>" in source:
            return cls("<tool_call>", "</tool_call>", "arguments")
        return cls("", "", "parameters" if '"parameters"' in source else "arguments")

    def grammar(self, tools: Seq[Tool], *, parallel: bool) -> str:
        """A Lark grammar whose texts are calls of these tools."""
        schemas = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    self.arguments_key: tool.function.parameters or {"type": "object"},
                },
                "required": ["name", self.arguments_key],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        one = (
            f"{json.dumps(self.opening + chr(10))} call {json.dumps(chr(10) + self.closing)}"
            if self.opening
            else "call"
        )
        more = f" ({json.dumps(chr(10))} one)*" if parallel and self.opening else ""
        return f"start: one{more}\none: {one}\ncall: %json {json.dumps(schema)}\n"

    def parse(self, text: str, tools: Seq[Tool]) -> tuple[str, list[dict[str, Any]]]:
        """The text without its calls, and the calls as OpenAI writes them.

        What is not a well-formed call of one of the tools stays text.
        """
        names = {tool.function.name for tool in tools}
        calls: list[dict[str, Any]] = []
        if not self.opening:
            call = self._read(text.strip(), names)
            return ("", [call]) if call else (text, [])
        rest = ""
        before, mark, after = text.partition(self.opening)
        while mark:
            body, end, after = after.partition(self.closing)
            call = self._read(body.strip(), names)
            rest += before
            if call:
                calls.append(call)
            else:
                rest += mark + body + end
            before, mark, after = after.partition(self.opening)
        rest += before
        return (rest.strip() if calls else rest), calls

    def _read(self, text: str, names: set[str]) -> dict[str, Any] | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in names:
            return None
        arguments = call.get(self.arguments_key)
        if not isinstance(arguments, dict):
            return None
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
        }


class CallSplitter:
    """Splits a text that grows into what may be shown and the calls in it; a text that may yet be a call is held."""

    def __init__(self, notation: Notation, tools: Seq[Tool]) -> None:
        self._notation = notation
        self._tools = tools
        self._shown = ""
        self._held = ""
        self._is_call = False

    def push(self, piece: str) -> str:
        """Add text; returns what of it, and of the text held, is certainly not part of a call."""
        self._held += piece
        if self._is_call:
            return ""
        mark = self._notation.opening
        if not mark:
            start = (self._shown + self._held).lstrip()[:1]
            self._is_call = start == "{"
            return "" if self._is_call or not start else self._show(len(self._held))
        found = self._held.find(mark)
        if found >= 0:
            self._is_call = True
            return self._show(found)
        longest = min(len(self._held), len(mark) - 1)
        num_held = next((n for n in range(longest, 0, -1) if self._held.endswith(mark[:n])), 0)
        return self._show(len(self._held) - num_held)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The text ends: the rest of it that is no call, and all calls."""
        return self._notation.parse(self._held, self._tools)

    def _show(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._shown += text
        return text
