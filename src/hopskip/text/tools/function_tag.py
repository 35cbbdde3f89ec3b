"""Calls with the name in a tag: `<function=name>{...}</function>` (Llama 3), or with a tag for each argument
(Qwen3-Coder), whose values are text, typed by the tool's schema."""

from __future__ import annotations

import re

from hopskip.text.tools.base import Body, Calls, State, Tool, may_follow, skip_space, to_json
from hopskip.text.tools.json_call import JSONCall
from hopskip.text.tools.json_value import JSONValue
from hopskip.text.tools.typed import argument, is_text

_NAME = re.compile(r"\s*([\w.-]{1,64})\s*")
_PARAMETER, _END_PARAMETER, _END = "<parameter=", "</parameter>", "</function>"
_LONGEST_KEY = 256


class FunctionTag(Body):
    """Reads a call from behind `<function=` on.

    Args:
        closing: the mark that may stand behind `</function>`.
    """

    def __init__(self, calls: Calls, *, closing: str = "") -> None:
        super().__init__(calls)
        self._closing = closing
        self._read_next = self._read_name
        self._name = ""
        self._tool = Tool(name="")
        self._key = ""
        self._json: JSONValue | None = None
        self._value = ""
        """Of the parameter that is being read, unless it is given out as it comes."""
        self._is_text = False
        self._is_first_of_value = False
        self._num_parameters = 0

    def read(self, text: str, at: int) -> int:
        while at < len(text) and self.state is State.OPEN:
            step = self._read_next
            reached = step(text, at)
            if reached == at and step == self._read_next:
                break  # more has to come
            at = reached
        return at

    def finish(self) -> None:
        if self._read_next == self._read_value:
            self._end_value()
        if self._read_next == self._read_tag:
            self.calls.add("}")

    def name_so_far(self, rest: str) -> str:
        return self._name or rest.strip()

    def _read_name(self, text: str, at: int) -> int:
        found = _NAME.match(text, at)
        end = found.end() if found else skip_space(text, at)
        if end == len(text):
            return at
        if not found or text[end] != ">":
            self.state = State.FAILED
            return at
        self._name = found[1]
        self._tool = self.calls.tools.get(self._name, self._tool)
        self._read_next = self._read_begin
        return end + 1

    def _read_begin(self, text: str, at: int) -> int:
        """What follows the name says how the arguments are written."""
        at = skip_space(text, at)
        if text.startswith("{", at):
            self.calls.begin(self._name)
            self._json = JSONValue()
            self._read_next = self._read_json
        elif text.startswith((_PARAMETER, _END), at):
            self.calls.begin(self._name, "{")
            self._read_next = self._read_tag
        elif not any(may_follow(text, at, mark) for mark in (_PARAMETER, _END)):
            self.state = State.FAILED
        return at

    def _read_json(self, text: str, at: int) -> int:
        assert self._json is not None
        end = self._json.read(text, at)
        self.calls.add(self._json.take())
        if self._json.state is State.FAILED:  # whatever comes until the end belongs to the arguments
            found = text.find(_END, end)
            stop = found if found >= 0 else _num_certain(text, end, _END)
            self.calls.add(text[end:stop].rstrip() if found >= 0 else text[end:stop])
            end = stop
        if self._json.state is State.DONE or text.startswith(_END, end):
            self._read_next = self._read_end
        return end

    # -- a tag for each argument ---------------------------------------------------------------------------------------

    def _read_tag(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        if text.startswith(_PARAMETER, at):
            self._read_next = self._read_key
            return at + len(_PARAMETER)
        if not any(may_follow(text, at, mark) for mark in (_PARAMETER, _END)):
            self.calls.add("}")
            self._read_next = self._read_end
        return at

    def _read_key(self, text: str, at: int) -> int:
        end = text.find(">", at)
        if end < 0:
            return at
        self._key = text[at:end].strip()
        schema = self._tool.parameters
        self._is_text = is_text(schema, self._key)
        separator, quote = ", " if self._num_parameters else "", '"' if self._is_text else ""
        self.calls.add(f"{separator}{to_json(self._key)}: {quote}")
        self._num_parameters += 1
        self._value = ""
        self._is_first_of_value = True
        self._read_next = self._read_value
        return end + 1

    def _read_value(self, text: str, at: int) -> int:
        if self._is_first_of_value:
            at += text.startswith("\n", at)
            self._is_first_of_value = False
        begin = at
        while (candidate := _candidate(text, at)) < len(text):
            end = _end_of_value(text, candidate)
            if end is None:
                self._add_text(text[begin:candidate])
                return candidate
            if end > candidate:
                self._add_text(text[begin:candidate])
                self._end_value()
                return end
            at = candidate + 1
        self._add_text(text[begin:])
        return len(text)

    def _add_text(self, text: str) -> None:
        if self._is_text:
            self.calls.add(to_json(text)[1:-1])
        else:
            self._value += text

    def _end_value(self) -> None:
        self.calls.add('"' if self._is_text else argument(self._value, self._tool.parameters, self._key))
        self._read_next = self._read_tag

    def _read_end(self, text: str, at: int) -> int:
        for mark in (_END, self._closing):
            at = skip_space(text, at)
            if text.startswith(mark, at):
                at += len(mark)
            elif may_follow(text, at, mark):
                return at
        self.state = State.DONE
        return at


class TaggedCall(Body):
    """Reads what is between `<tool_call>` and `</tool_call>`: a JSON object, or a function's tag."""

    _FUNCTION, _CLOSING = "<function=", "</tool_call>"

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        self._inner: Body | None = None

    def read(self, text: str, at: int) -> int:
        if self._inner is None:
            at = skip_space(text, at)
            if text.startswith("{", at):
                self._inner = JSONCall(self.calls, closing=self._CLOSING)
            elif text.startswith(self._FUNCTION, at):
                self._inner = FunctionTag(self.calls, closing=self._CLOSING)
                at += len(self._FUNCTION)
            else:
                self.state = State.OPEN if may_follow(text, at, self._FUNCTION) else State.FAILED
                return at
        at = self._inner.read(text, at)
        self.state = self._inner.state
        return at

    def finish(self) -> None:
        if self._inner is not None:
            self._inner.finish()

    def name_so_far(self, rest: str) -> str:
        return self._inner.name_so_far(rest) if self._inner is not None else ""


def _candidate(text: str, at: int) -> int:
    """Where a value may end next: before the mark, or before the line end in front of it."""
    while at < len(text):
        found = text.find("<", at)
        found = len(text) if found < 0 else found
        if found == len(text):
            return found - text.endswith("\n", at)
        if text.startswith(_END_PARAMETER, found) or may_follow(text, found, _END_PARAMETER):
            return found - (found > at and text[found - 1] == "\n")
        at = found + 1
    return at


def _end_of_value(text: str, at: int) -> int | None:
    """Behind the mark that ends a value whose last line end or mark is at `at`; `at` if the value goes on; None if
    more has to come.

    The mark counts where another argument follows it or the function ends, so that a value may hold it.
    """
    mark = at + text.startswith("\n", at)
    if not text.startswith(_END_PARAMETER, mark):
        return None if may_follow(text, mark, _END_PARAMETER) else at
    end = mark + len(_END_PARAMETER)
    behind = skip_space(text, end)
    if text.startswith((_PARAMETER, _END, "</tool_call>"), behind):
        return end
    return None if any(may_follow(text, behind, other) for other in (_PARAMETER, _END, "</tool_call>")) else at


def _num_certain(text: str, at: int, mark: str) -> int:
    """Up to where no beginning of the mark reaches."""
    return next((i for i in range(at, len(text)) if may_follow(text, i, mark)), len(text))
