"""Calls that are the answer itself: one JSON object without marks, as Llama 3 writes it (`parameters`), or as others do
(`arguments`)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar

from hopskip.text.tools.base import Marks, Tool, ToolFormat, to_json
from hopskip.text.tools.function_tag import FunctionTag
from hopskip.text.tools.json_call import JSONCall
from hopskip.text.tools.schemas import call_schema

_PYTHON_TAG, _FUNCTION = "<|python_tag|>", "<function="


class JSON(ToolFormat):
    """The object has `name` and `arguments`."""

    name = "json"
    openings: ClassVar = {_PYTHON_TAG: JSONCall, _FUNCTION: FunctionTag}
    reads_bare = True
    marks = (_PYTHON_TAG,)
    arguments_key = "arguments"

    @property
    def example(self) -> str:  # type: ignore[override]
        return f'{{"name": <function-name>, "{self.arguments_key}": <args-json-object>}}'

    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        """One call: these models' templates refuse histories with more."""
        return f"start: call\ncall: %json {to_json(call_schema(tools, self.arguments_key))}\n"

    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        return "; ".join(to_json({"name": name, self.arguments_key: arguments}) for name, arguments in calls)


class Llama3(JSON):
    """The object has `name` and `parameters`."""

    name = "llama3"
    arguments_key = "parameters"
