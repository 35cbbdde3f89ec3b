"""One JSON value, read as it comes: where it ends, whatever its strings hold."""

from __future__ import annotations

import json
import re

from hopskip.text.tools.base import SPACE, State

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.\w]*")
_SCALAR_VALUE = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")


class JSONValue:
    """Follows a value. What models often get wrong inside strings is put right: control characters, which JSON wants
    escaped, and a backslash before a character that needs none."""

    def __init__(self) -> None:
        self.state = State.OPEN
        self._out: list[str] = []
        self._closers: list[str] = []
        self._read_next = self._read_value
        self._scalar = ""
        self._is_key = False
        self._num_hex = 0

    def read(self, text: str, at: int) -> int:
        """Read on from `at`; returns up to where: the end of the value, or what cannot be part of one."""
        while at < len(text) and self.state is State.OPEN:
            at = self._read_next(text, at)
        return at

    def take(self) -> str:
        """The text of the value since the last time."""
        taken = "".join(self._out)
        self._out = []
        return taken

    def _read_value(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            return self._copy(char, at)
        if char == '"':
            return self._open_string(at, is_key=False)
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._read_next = self._read_first
            return self._copy(char, at)
        if char in "-0123456789tfn":
            self._scalar = ""
            self._read_next = self._read_scalar
            return at
        return self._fail(at)

    def _read_first(self, text: str, at: int) -> int:
        """The first thing inside an object or a list, which may be its end."""
        if text[at] == self._closers[-1]:
            return self._close(at)
        return self._read_key(text, at) if self._closers[-1] == "}" else self._read_value(text, at)

    def _read_key(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            return self._copy(char, at)
        return self._open_string(at, is_key=True) if char == '"' else self._fail(at)

    def _read_colon(self, text: str, at: int) -> int:
        char = text[at]
        if char == ":":
            self._read_next = self._read_value
        return self._copy(char, at) if char == ":" or char in SPACE else self._fail(at)

    def _read_separator(self, text: str, at: int) -> int:
        char = text[at]
        if char == self._closers[-1]:
            return self._close(at)
        if char == ",":
            self._read_next = self._read_key if self._closers[-1] == "}" else self._read_value
        return self._copy(char, at) if char == "," or char in SPACE else self._fail(at)

    def _read_string(self, text: str, at: int) -> int:
        end = _PLAIN.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        self._out.append(text[at:end])
        if end == len(text):
            return end
        char = text[end]
        if char == '"':
            self._out.append(char)
            self._end(is_key=self._is_key)
        elif char == "\\":
            self._read_next = self._read_escape
        else:
            self._out.append(json.dumps(char)[1:-1])
        return end + 1

    def _read_escape(self, text: str, at: int) -> int:
        char = text[at]
        self._read_next = self._read_string
        if char not in '"\\/bfnrtu':
            self._out.append("\\\\")
            return at
        if char == "u":
            self._num_hex = 4
            self._read_next = self._read_hex
        return self._copy(f"\\{char}", at)

    def _read_hex(self, text: str, at: int) -> int:
        if text[at] not in _HEX:
            return self._fail(at)
        self._num_hex -= 1
        if not self._num_hex:
            self._read_next = self._read_string
        return self._copy(text[at], at)

    def _read_scalar(self, text: str, at: int) -> int:
        end = _SCALAR.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        self._scalar += text[at:end]
        self._out.append(text[at:end])
        if end < len(text):
            if not _SCALAR_VALUE.fullmatch(self._scalar):
                return self._fail(end)
            self._end(is_key=False)
        return end

    def _open_string(self, at: int, *, is_key: bool) -> int:
        self._is_key = is_key
        self._read_next = self._read_string
        return self._copy('"', at)

    def _close(self, at: int) -> int:
        closer = self._closers.pop()
        self._end(is_key=False)
        return self._copy(closer, at)

    def _end(self, *, is_key: bool) -> None:
        """A string, a number, ... has ended."""
        if is_key:
            self._read_next = self._read_colon
        elif self._closers:
            self._read_next = self._read_separator
        else:
            self.state = State.DONE

    def _copy(self, char: str, at: int) -> int:
        self._out.append(char)
        return at + 1

    def _fail(self, at: int) -> int:
        self.state = State.FAILED
        return at
