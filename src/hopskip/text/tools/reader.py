"""Reads an answer as it comes: text, and the calls in it."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq

from hopskip.text.tokenizer import overlap
from hopskip.text.tools.base import SPACE, Body, Calls, Delta, State, Tool, ToolFormat
from hopskip.text.tools.json_call import JSONCall

_BARE = r"(?:\[\s{0,16})?(?=\{)"
_BARE_BEGINS = re.compile(r"\[\s{0,16}\Z")
_BETWEEN = SPACE + ",;]"
"""What may stand between bare calls, and behind the last of a list."""


class CallReader:
    """Tells calls from text. What may yet become a call is held, and is text if it does not.

    White space around calls belongs to neither. No text is looked at twice, but for the few characters that may begin
    a mark.

    Args:
        tools: those that the model was told of. A name between marks may be another: the client sees what the model
            wants. An object without marks is a call only if it names one of them.
        is_certain: a grammar makes the answer calls, so that what is cut is a part of one.
        parallel: else calls after the first are left out.
        hidden: marks that are special tokens, which texts do not show.
    """

    def __init__(
        self,
        format: ToolFormat,
        tools: Seq[Tool],
        *,
        is_certain: bool = False,
        parallel: bool = True,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self._calls = Calls(tools, format.new_id, None if parallel else 1)
        self._format = format
        self._is_certain = is_certain
        self._hidden = hidden
        patterns = [re.escape(mark) for mark in format.openings]
        self._opening = re.compile("|".join([*patterns, *([_BARE] if format.reads_bare else [])]))
        self._between = _BETWEEN if format.reads_bare else SPACE
        self._body: Body | None = None
        self._undecided: list[str] | None = None
        """What has been read of a body that may yet have read text; None once a call has begun."""
        self._is_marked = False
        """The body stands behind a mark."""
        self._num_before = 0
        """Calls that had begun before this body."""
        self._is_behind_call = False
        self._unread = ""
        self._space: list[str] = []
        """White space that is shown if text follows it."""
        self._shown: list[str] = []
        self._has_shown = False

    def push(self, piece: str) -> Delta:
        """Add text; returns what is certain now."""
        text = self._unread + piece
        at = 0
        while at < len(text):
            body = self._body
            reached = self._read_text(text, at) if body is None else self._read_body(body, text, at)
            if reached == at and body is self._body:
                break  # more has to come
            at = reached
        self._unread = text[at:]
        return self._take()

    def finish(self, *, is_cut: bool) -> Delta:
        """The text ends: returns the rest.

        Args:
            is_cut: before the model had ended it.
        """
        body, is_cut = self._body, is_cut or self._is_certain
        if body is not None and self._undecided is not None:
            if not (is_cut and self._begin(body.name_so_far(self._unread))):
                self._show("".join(self._undecided) + self._unread)
        elif body is not None:
            if not is_cut:
                body.finish()
        elif not self._is_certain:
            self._show(self._unread)
        elif not self._calls.num_begun:
            self._begin("")
        if not self._calls.num_begun:
            self._shown += self._space
        return self._take()

    def _begin(self, name: str) -> bool:
        """Begin a call that is cut before its arguments, if its name is known; False if it is no call for certain."""
        names = [known for known in self._calls.tools if known.startswith(name)]
        is_known = name in names or len(names) == 1
        if is_known and (name or (self._is_certain and not self._calls.num_begun)):
            self._calls.begin(name if name in names else names[0])
            return True
        return self._is_marked or self._is_certain

    def _read_text(self, text: str, at: int) -> int:
        if self._is_behind_call:
            start = at
            while at < len(text) and text[at] in self._between:
                at += 1
            if not self._space:
                self._space = [char for char in text[start:at] if char in SPACE]
            if at == len(text):
                return at
        found = self._opening.search(text, at)
        end = found.start() if found else len(text) - self._num_beginning(text, at)
        self._show(text[at:end])
        if found is None:
            return end
        self._num_before = self._calls.num_begun
        mark = found.group()
        make = self._format.openings.get(mark)
        self._body = make(self._calls) if make else JSONCall(self._calls, closing=self._format.closing, is_bare=True)
        self._is_marked = make is not None
        self._undecided = ["" if mark in self._hidden else mark]
        return found.end()

    def _num_beginning(self, text: str, at: int) -> int:
        """Characters at the end of a text that may begin a call."""
        lengths = [overlap(text[at:], mark) for mark in self._format.openings]
        begins = _BARE_BEGINS.search(text, at) if self._format.reads_bare else None
        return max([*lengths, len(text) - begins.start() if begins else 0])

    def _read_body(self, body: Body, text: str, at: int) -> int:
        end = body.read(text, at)
        if self._calls.num_begun > self._num_before:
            self._undecided = None
        if self._undecided is not None:
            self._undecided.append(text[at:end])
        if body.state is State.OPEN:
            return end
        self._body = None
        if self._undecided is not None:
            self._show("".join(self._undecided))
        self._is_behind_call = self._undecided is None
        self._undecided = None
        return end

    def _show(self, text: str) -> None:
        stripped = text.rstrip(SPACE)
        if stripped:
            self._is_behind_call = False
            if self._has_shown or not self._calls.num_begun:
                self._shown += self._space
            self._shown.append(stripped)
            self._has_shown = True
            self._space = []
        if len(text) > len(stripped):
            self._space.append(text[len(stripped) :])

    def _take(self) -> Delta:
        content = "".join(self._shown)
        self._shown = []
        return Delta(content=content, calls=self._calls.take())
