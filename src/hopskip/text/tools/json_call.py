"""A call written as one JSON object: `{"name": ..., "arguments": {...}}`, or with `parameters`."""

from __future__ import annotations

import json
from typing import Any

from hopskip.text.tools.base import SPACE, Body, Calls, State, may_follow, skip_space
from hopskip.text.tools.json_value import JSONValue

_NAME_KEYS = ("name", "function")
_ARGUMENTS_KEYS = ("arguments", "parameters")
_KEYS = (*_NAME_KEYS, *_ARGUMENTS_KEYS, "type", "id")


class JSONCall(Body):
    """Reads a call from its brace on.

    Args:
        closing: the mark that may stand behind the object.
        is_bare: nothing but the object says that it is a call: it must have the keys of one, and name a known tool.
    """

    def __init__(self, calls: Calls, *, closing: str = "", is_bare: bool = False) -> None:
        super().__init__(calls)
        self._closing = closing
        self._is_bare = is_bare
        self._expects = "{"
        self._value: JSONValue | None = None
        """What is being read: a key, or the value of `_key`."""
        self._text = ""
        """Of this value, unless it is given out as it comes."""
        self._key: str | None = None
        self._name = ""
        self._id: str | None = None
        self._arguments: str | None = None
        """Those that came before the name."""
        self._has_begun = False
        self._is_streaming = False
        self._is_raw = False
        """The arguments are no JSON: whatever comes until the closing mark belongs to them."""

    def read(self, text: str, at: int) -> int:
        while at < len(text) and self.state is State.OPEN:
            if self._expects == "closing":
                return self._read_closing(text, at)
            if self._is_raw:
                return self._read_raw(text, at)
            if self._value is not None:
                at = self._read_value(self._value, text, at)
            elif text[at] in SPACE:
                at += 1
            else:
                at = self._read_mark(text[at], at)
        return at

    def name_so_far(self, rest: str) -> str:
        is_name = self._value is not None and self._key in _NAME_KEYS
        return self._name or (self._text.lstrip().removeprefix('"') if is_name else "")

    def _read_mark(self, mark: str, at: int) -> int:
        """What stands between the parts of the object."""
        expects, self._expects = self._expects, ""
        if mark == "}" and expects in ("key or }", ", or }"):
            self._end_object()
        elif mark == '"' and expects in ("key", "key or }"):
            self._key = None
            self._value = JSONValue()
            return at
        elif mark == expects == ":":
            self._value = JSONValue()
        elif mark == expects == "{":
            self._expects = "key or }"
        elif mark == "," and expects == ", or }":
            self._expects = "key"
        elif self._has_begun:
            self._end()  # the arguments are complete
            return at
        else:
            self.state = State.FAILED
            return at
        return at + 1

    def _read_value(self, value: JSONValue, text: str, at: int) -> int:
        if not self._text and not self._is_streaming:
            if text[at] in SPACE:
                return at + 1
            if text[at] == "{" and self._key in _ARGUMENTS_KEYS and self._name and not self._has_begun:
                self._begin("")
                self._is_streaming = True
        end = value.read(text, at)
        new = value.take()
        if self._is_streaming:
            self.calls.add(new)
        else:
            self._text += new
        if value.state is State.FAILED:
            self._is_raw = self._is_streaming
            if not self._is_streaming:
                self._end() if self._has_begun else self._fail()
        elif value.state is State.DONE:
            self._end_value()
        return end

    def _end_value(self) -> None:
        text, self._text, self._value = self._text, "", None
        if self._key is None:
            self._key = str(json.loads(text))
            self._expects = ":"
            if self._is_bare and self._key not in _KEYS:
                self._fail()
            return
        self._expects = ", or }"
        if self._is_streaming:
            self._is_streaming = False
        elif self._has_begun:
            pass
        elif self._key in _NAME_KEYS:
            self._take_name(json.loads(text))
        elif self._key in _ARGUMENTS_KEYS and self._arguments is None:
            self._arguments = _as_object(text)
        elif self._key == "id":
            self._id = _text_or_none(json.loads(text))
        if self._name and self._arguments is not None and not self._has_begun:
            self._begin(self._arguments)

    def _take_name(self, value: Any) -> None:
        if isinstance(value, dict):  # {"type": "function", "function": {"name": ..., "arguments": ...}}
            arguments: Any = next((value[key] for key in _ARGUMENTS_KEYS if key in value), {})
            self._arguments = _as_object(json.dumps(arguments, ensure_ascii=False))
            value = value.get("name")
        if not isinstance(value, str) or not value or (self._is_bare and value not in self.calls.tools):
            self._fail()
        else:
            self._name = value

    def _end_object(self) -> None:
        if not self._has_begun:
            if not self._name or self._is_bare:
                self._fail()
                return
            self._begin("{}")
        self._end()

    def _begin(self, arguments: str) -> None:
        self._has_begun = True
        self.calls.begin(self._name, arguments, id=self._id)

    def _fail(self) -> None:
        self.state = State.FAILED

    def _end(self) -> None:
        self._expects, self._value = "closing", None
        if not self._closing:
            self.state = State.DONE

    def _read_closing(self, text: str, at: int) -> int:
        at = skip_space(text, at, also="}")
        if text.startswith(self._closing, at):
            at += len(self._closing)
        elif may_follow(text, at, self._closing):
            return at
        self.state = State.DONE
        return at

    def _read_raw(self, text: str, at: int) -> int:
        end = text.find(self._closing, at) if self._closing else -1
        if end >= 0:
            self.calls.add(text[at:end].rstrip())
            self.state = State.DONE
            return end + len(self._closing)
        end = next((i for i in range(at, len(text)) if self._closing and may_follow(text, i, self._closing)), len(text))
        self.calls.add(text[at:end])
        return end


def _as_object(text: str) -> str:
    """Arguments as they ought to be written: some models put the object into a string, or write nothing for none."""
    value = json.loads(text)
    if isinstance(value, str):
        try:
            inner = json.loads(value or "{}")
        except (ValueError, RecursionError):
            inner = None
        return (value or "{}") if isinstance(inner, dict) else text
    return "{}" if value is None else text


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
