"""Where messages come from: lines of a pipe or of a terminal that can only show text."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO, Protocol

from hopskip.cli.console import print_note
from hopskip.cli.talk.typed import BLOCK, is_continued, is_open_block
from hopskip.errors import PromptError

LEAVING = "Ctrl-D or /exit leaves the chat"


class Reader(Protocol):
    """Gives what the user writes, one message or command after the other."""

    is_interactive: bool
    """Whether there is somebody to answer a question."""

    def read(self) -> str | None:
        """The next text, as it was typed; empty if it was discarded, None at the end.

        Raises:
            PromptError: it is not UTF-8.
        """
        ...

    def confirm(self, question: str) -> bool:
        """Whether the answer is yes; it is not if nobody can be asked."""
        ...

    def holding_keys(self) -> AbstractContextManager[None]:
        """Until the end of the block, what is typed while nothing is read waits unseen for the next `read`, instead of
        mixing with what is shown; text that is pasted stays in one piece."""
        ...


class LineReader:
    """One text per line, but for blocks and lines that end with a backslash.

    Args:
        is_interactive: whether the lines come from a terminal; they are asked for on stderr then.
    """

    def __init__(self, lines: BinaryIO, *, is_interactive: bool) -> None:
        self._lines = lines
        self.is_interactive = is_interactive

    def read(self) -> str | None:
        try:
            text = self._line("> ")
            while text is not None and (is_open_block(text) or is_continued(text)):
                following = self._line(". ")
                if following is None:
                    if is_open_block(text):
                        print_note(f"[the block of {BLOCK} is not closed; it ends with the input]")
                        return f"{text}{BLOCK}"
                    return text
                text = f"{text if is_open_block(text) else text[:-1]}\n{following}"
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            print(file=sys.stderr)
            print_note(f"[{LEAVING}]")
            return ""
        return text

    def confirm(self, question: str) -> bool:
        if not self.is_interactive:
            return False
        try:
            return is_yes(self._line(f"{question} [y/N] "))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return False

    def holding_keys(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _line(self, prompt: str) -> str | None:
        if self.is_interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = self._lines.readline()
        if not line and self.is_interactive:
            print(file=sys.stderr)
        try:
            text = line.decode("utf-8", "replace" if self.is_interactive else "strict")
            return text.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff") if line else None
        except UnicodeDecodeError as error:
            raise PromptError(
                f"stdin is not valid UTF-8: byte {error.object[error.start]:#04x}; convert it, for example with "
                "iconv -t UTF-8"
            ) from None


def is_yes(answer: str | None) -> bool:
    return answer is not None and answer.strip().lower() in ("y", "yes")
