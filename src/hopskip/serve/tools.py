"""Tool calls: which notation a model writes them in, a grammar that makes it write one, and reading them back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from hopskip.serve.schema import Tool
from hopskip.text.json_schema import STRICT
from hopskip.text.tokenizer import overlap


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
                    self.arguments_key: _parameters(tool),
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
        kept: list[str] = []
        read_to = 0
        while (start := text.find(self.opening, read_to)) >= 0:
            body = start + len(self.opening)
            closing = text.find(self.closing, body)
            body_end, end = (closing, closing + len(self.closing)) if closing >= 0 else (len(text), len(text))
            call = self._read(text[body:body_end].strip(), names)
            kept.append(text[read_to : start if call else end])
            if call:
                calls.append(call)
            read_to = end
        rest = "".join(kept) + text[read_to:]
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


def _parameters(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, to stand inside another: with an address, so that its references stay its
    own."""
    parameters = tool.function.parameters or {"type": "object"}
    return {"$id": f"tool:{tool.function.name}", **parameters, **({STRICT: True} if tool.function.strict else {})}


class CallSplitter:
    """Splits a text that grows into what may be shown and the calls in it; a text that may yet be a call is held."""

    def __init__(self, notation: Notation, tools: Seq[Tool]) -> None:
        self._notation = notation
        self._tools = tools
        self._held: list[str] = []
        """Parts of the text that has not been shown."""
        self._is_call = False
        """What is held, and all that comes, is for `Notation.parse`."""
        self._is_text = False
        """Calls without marks are whole answers, and this one has begun otherwise."""

    def push(self, piece: str) -> str:
        """Add text; returns what of it, and of the text held, is certainly not part of a call."""
        if self._is_text:
            return piece
        self._held.append(piece)
        if self._is_call:
            return ""
        mark = self._notation.opening
        if mark:
            text = "".join(self._held)
            found = text.find(mark)
            self._is_call = found >= 0
            num_shown = found if self._is_call else len(text) - overlap(text, mark)
        else:
            start = piece.lstrip()[:1]
            self._is_call, self._is_text = start == "{", start not in ("", "{")
            if not self._is_text:
                return ""
            text = "".join(self._held)
            num_shown = len(text)
        self._held = [text[num_shown:]]
        return text[:num_shown]

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The text ends: the rest of it that is no call, and all calls."""
        return self._notation.parse("".join(self._held), self._tools)
