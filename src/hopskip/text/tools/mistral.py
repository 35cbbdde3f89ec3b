"""Mistral's formats: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar

from hopskip.text.tools.base import (
    Body,
    Calls,
    Marks,
    State,
    Tool,
    ToolFormat,
    literal,
    may_follow,
    skip_space,
    to_json,
)
from hopskip.text.tools.json_call import JSONCall
from hopskip.text.tools.json_value import JSONValue
from hopskip.text.tools.schemas import arguments_schema, call_schema

_CALLS, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"\s*([\w.-]{1,64})\s*")
_LETTERS = string.ascii_letters + string.digits
_ID_CHARS = 9
_VALID_ID = re.compile(rf"[a-zA-Z0-9]{{{_ID_CHARS}}}")


class MistralCalls(Body):
    """Reads what follows `[TOOL_CALLS]`, in either format."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        self._read_next = self._read_start
        self._call: JSONCall | None = None
        self._arguments = JSONValue()
        self._name = ""

    def read(self, text: str, at: int) -> int:
        while at < len(text) and self.state is State.OPEN:
            step = self._read_next
            reached = step(text, at)
            if reached == at and step == self._read_next:
                break  # more has to come
            at = reached
        return at

    def name_so_far(self, rest: str) -> str:
        if self._call is not None:
            return self._call.name_so_far(rest)
        return self._name or (rest.split("[")[0].strip() if self._read_next == self._read_name else "")

    def _read_start(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        if at == len(text):
            return at
        if text.startswith("[", at):
            self._read_next = self._read_item
            return at + 1
        self._read_next = self._read_object if text.startswith("{", at) else self._read_name
        return at

    def _read_item(self, text: str, at: int) -> int:
        """What is between the calls of a list."""
        at = skip_space(text, at, also=",")
        if text.startswith("]", at):
            self.state = State.DONE
            return at + 1
        if at < len(text):
            self._read_next = self._read_object
        return at

    def _read_object(self, text: str, at: int) -> int:
        self._call = self._call or JSONCall(self.calls)
        at = self._call.read(text, at)
        if self._call.state is State.DONE:
            self._call = None
            self._read_next = self._read_item
        elif self._call.state is State.FAILED:
            self.state = State.FAILED
        return at

    def _read_name(self, text: str, at: int) -> int:
        found = _NAME.match(text, at)
        end = found.end() if found else skip_space(text, at)
        if end == len(text) or any(may_follow(text, end, mark) for mark in (_ID, _ARGS)):
            return at
        if found is None or not text.startswith(("{", _ID, _ARGS), end):
            self.state = State.FAILED
            return at
        self._name = found[1]
        self._read_next = self._read_id if text.startswith(_ID, end) else self._read_arguments_mark
        return end

    def _read_id(self, text: str, at: int) -> int:
        end = text.find(_ARGS, at)
        if end < 0:
            return at
        self._begin(text[at + len(_ID) : end].strip())
        return end + len(_ARGS)

    def _read_arguments_mark(self, text: str, at: int) -> int:
        if text.startswith(_ARGS, at):
            at += len(_ARGS)
        self._begin("")
        return at

    def _begin(self, id: str) -> None:
        self.calls.begin(self._name, id=id if _VALID_ID.fullmatch(id) else None)
        self._read_next = self._read_arguments

    def _read_arguments(self, text: str, at: int) -> int:
        end = self._arguments.read(text, at)
        self.calls.add(self._arguments.take())
        if self._arguments.state is State.DONE:
            self.state = State.DONE
        elif self._arguments.state is State.FAILED:  # whatever comes until the next mark belongs to the arguments
            found = text.find(_CALLS, end)
            stop = (
                found if found >= 0 else next((i for i in range(end, len(text)) if may_follow(text, i, _CALLS)), None)
            )
            self.calls.add(text[end:stop])
            self.state = State.DONE if found >= 0 else State.OPEN
            end = len(text) if stop is None else stop
        return end


class Mistral(ToolFormat):
    """Calls as a list of JSON objects."""

    name = "mistral"
    openings: ClassVar = {_CALLS: MistralCalls}
    reads_bare = True
    marks = (_CALLS, _ID, _ARGS)
    example = '[TOOL_CALLS][{"name": <function-name>, "arguments": <args-json-object>}]'

    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        more = ' ("," " "? call)*' if parallel else ""
        schema = to_json(call_schema(tools, "arguments"))
        return f'start: {marks.lark(_CALLS)} " "? "[" call{more} "]"\ncall: %json {schema}\n'

    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        return _CALLS + to_json([{"name": name, "arguments": arguments} for name, arguments in calls])

    def new_id(self) -> str:
        return "".join(secrets.choice(_LETTERS) for _ in range(_ID_CHARS))

    def history(self, messages: Seq[Mapping[str, Any]]) -> Seq[Mapping[str, Any]]:
        """The templates refuse ids that have not nine letters and digits; others become such, the same the same."""
        return [_with_ids(message) for message in messages]


class MistralArgs(Mistral):
    """Each call with its own mark."""

    name = "mistral-args"
    example = "[TOOL_CALLS]<function-name>[ARGS]<args-json-object>"

    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        names = " | ".join(f"f{i}" for i in range(len(tools)))
        rules = "".join(
            f"f{i}: {literal(tool.name)} {marks.lark(_ARGS)} a{i}\na{i}: %json {to_json(arguments_schema(tool))}\n"
            for i, tool in enumerate(tools)
        )
        return f"start: one{'+' if parallel else ''}\none: {marks.lark(_CALLS)} ({names})\n{rules}"

    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        return "".join(f"{_CALLS}{name}{_ARGS}{to_json(arguments)}" for name, arguments in calls)


def _with_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": _short(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return changed


def _short(id: str) -> str:
    if _VALID_ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest())
    return "".join(_LETTERS[number // len(_LETTERS) ** i % len(_LETTERS)] for i in range(_ID_CHARS))
