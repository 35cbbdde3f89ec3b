"""A prompt in a terminal that can be edited, by prompt_toolkit: pasted text is one message, with history, completion
and an editor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from hopskip.cli.console import print_note
from hopskip.cli.talk.reading import LEAVING, is_yes
from hopskip.cli.talk.typed import is_continued, is_open_block
from hopskip.machine import replacing_file

_MOST_HISTORY_BYTES = 2**20


class PromptReader:
    """Enter sends, Alt+Enter and a backslash before Enter begin a new line, and so does Enter in a block.

    Args:
        output: the terminal.
        completions: ways to go on with a command that is typed up to here, each from the beginning.
    """

    is_interactive = True

    def __init__(self, output: TextIO, completions: Callable[[str], list[str]]) -> None:
        self._output = Vt100_Output.from_pty(output, term=os.environ.get("TERM"))
        # the answer to this question can come after the prompt has gone, and would be taken for typed text
        self._output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=". ",
            key_bindings=_keys(),
            history=open_history(history_path()),
            completer=_CommandCompleter(completions),
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".txt",
            output=self._output,
        )
        self._question: PromptSession[str] = PromptSession(output=self._output)

    def read(self) -> str | None:
        try:
            # bytes that are not UTF-8 come as lone surrogates
            return self._ask(self._session, "> ").encode("utf-8", "replace").decode("utf-8")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not self._session.default_buffer.text:
                print_note(f"[{LEAVING}]")
            return ""

    def confirm(self, question: str) -> bool:
        try:
            return is_yes(self._ask(self._question, f"{question} [y/N] "))
        except (EOFError, KeyboardInterrupt):
            return False

    def _ask(self, session: PromptSession[str], prompt: str) -> str:
        try:
            return session.prompt(prompt)
        finally:
            self._mark_pastes()  # each prompt ends by turning that off

    def _mark_pastes(self) -> None:
        self._output.enable_bracketed_paste()
        self._output.flush()

    @contextmanager
    def holding_keys(self) -> Iterator[None]:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        quiet[0] &= ~termios.ICRNL  # Enter stays what it is
        quiet[3] &= ~(termios.ECHO | termios.ICANON)  # and so does Ctrl-D
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        self._mark_pastes()
        try:
            yield
        finally:
            self._output.disable_bracketed_paste()
            self._output.flush()
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open_block(buffer.text):
            buffer.newline(copy_margin=False)
        elif buffer.document.is_cursor_at_the_end and is_continued(buffer.text):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class _CommandCompleter(Completer):
    """Completes commands, and the files of those that take one."""

    def __init__(self, completions: Callable[[str], list[str]]) -> None:
        self._completions = completions
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        command, space, argument = typed.partition(" ")
        if space and command in ("/save", "/load"):
            yield from self._files.get_completions(Document(argument), complete_event)
        for text in self._completions(typed):
            start = typed.rfind(" ") + 1
            yield Completion(text[start:], start_position=start - len(typed))


# -- history -----------------------------------------------------------------------------------------------------------


def history_path() -> Path | None:
    """`$HOPSKIP_HISTORY`, by default `hopskip/chat-history` in `$XDG_STATE_HOME` or `~/.local/state`. None if nothing
    is kept: an empty HOPSKIP_HISTORY says so."""
    name = os.environ.get("HOPSKIP_HISTORY")
    if name is not None:
        return Path(name).expanduser() if name else None
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "hopskip" / "chat-history"


def open_history(path: Path | None) -> History:
    """What was typed in earlier chats, in a file that only its owner can read; of a long one, the newer half."""
    if path is None or str(path) == os.devnull:
        return InMemoryHistory()
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "not a file")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        if path.stat().st_size > _MOST_HISTORY_BYTES:
            _keep_newer_half(path)
    except OSError as error:
        print_note(f"[history is not kept: {error.strerror}: {path}; HOPSKIP_HISTORY names another file]")
        return InMemoryHistory()
    return _History(str(path))


def _keep_newer_half(path: Path) -> None:
    newer = path.read_bytes()[-_MOST_HISTORY_BYTES // 2 :]
    with replacing_file(path.resolve()) as partial:
        partial.touch(mode=0o600)
        partial.write_bytes(newer[max(0, newer.find(b"\n# ")) :])


class _History(FileHistory):
    """A disk that fills up must not end the chat."""

    _is_broken = False

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:
            if not self._is_broken:
                print_note(f"[history is not kept any more: {error.strerror}]")
            self._is_broken = True
