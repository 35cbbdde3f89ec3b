"""Hermes' format, which Qwen 2.5 and 3, SmolLM 2 and 3 and many fine-tunes write:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar

from hopskip.text.tools.base import Marks, Tool, ToolFormat, to_json
from hopskip.text.tools.function_tag import TaggedCall
from hopskip.text.tools.schemas import call_schema

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    openings: ClassVar = {OPENING: TaggedCall}
    reads_bare = True
    closing = CLOSING
    marks = (OPENING, CLOSING)
    example = f'{OPENING}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSING}'

    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        more = r' ("\n" one)*' if parallel else ""
        one = f'{marks.lark(OPENING)} "\\n" call "\\n" {marks.lark(CLOSING)}'
        return f"start: one{more}\none: {one}\ncall: %json {to_json(call_schema(tools, 'arguments'))}\n"

    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        written = [to_json({"name": name, "arguments": arguments}) for name, arguments in calls]
        return "\n".join(f"{OPENING}\n{call}\n{CLOSING}" for call in written)
