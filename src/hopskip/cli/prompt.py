"""The prompt of a command: words of the command line, files, and what is piped in."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hopskip.cli.console import print_note
from hopskip.cli.progress import progress
from hopskip.errors import PromptError

_PATIENCE = 5.0
"""Seconds until the first byte of a pipe that nobody has asked for: `ssh host hopskip ...` has one that stays open."""


def read_prompt(words: Sequence[str], files: Sequence[str] = ()) -> str:
    """The words joined, then each file, then stdin if something is piped in; with blank lines between. A `-` among the
    words or files is the place of stdin, which is then waited for.

    A terminal is not read, and neither an empty nor a closed stdin adds anything or keeps anybody waiting.

    Raises:
        PromptError: there is no text, or one is not UTF-8.
    """
    if [*words, *files].count("-") > 1:
        raise PromptError("- stands for stdin, which can be read only once; give it once")
    parts: list[str] = []
    sentence: list[str] = []
    for word in words:
        if word == "-":
            parts += [" ".join(sentence), _stdin(wait=True)]
            sentence = []
        else:
            sentence.append(word)
    parts.append(" ".join(sentence))
    parts += [_stdin(wait=True) if name == "-" else _file(name) for name in files]
    if "-" not in (*words, *files):
        parts.append(_stdin(wait=False))
    text = "\n\n".join(part for part in parts if part.strip())
    if text:
        return text
    if words or files:
        raise PromptError("the prompt is empty; give some text")
    raise PromptError("no prompt given; write it after the command, or pipe it in")


def as_text(content: bytes, place: str) -> str:
    """A text as people write it: without a byte order mark, lines ended by line feeds, and the last one by nothing.

    >>> as_text(b"\\xef\\xbb\\xbfone\\r\\ntwo\\r\\n", "stdin")
    'one\\ntwo'

    Raises:
        PromptError: it is not UTF-8, or no text at all.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        from_which = "-f UTF-16 " if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise PromptError(
            f"{place} is not valid UTF-8: byte {content[error.start]:#04x} at offset {error.start}; give a text, "
            f"converted if need be, for example with iconv {from_which}-t UTF-8"
        ) from None
    if "\0" in text:
        raise PromptError(f"{place} is no text: it has a NUL at offset {content.index(0)}; give a text in UTF-8")
    return text.replace("\r\n", "\n").removesuffix("\n")


def _file(name: str) -> str:
    try:
        content = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise PromptError(f"the file {name!r} cannot be read ({error.strerror}); give a text file") from None
    return as_text(content, f"the file {name!r}")


def _stdin(*, wait: bool) -> str:
    """What is piped in.

    Args:
        wait: however long it takes to come; else only if it begins soon.
    """
    if sys.stdin is None or sys.stdin.closed or (sys.stdin.isatty() and not wait):
        return ""
    if not wait and (obstacle := _obstacle()):
        print_note(f"{obstacle}, so it is left alone; give - to read it, or < /dev/null to have none")
        return ""
    if sys.stdin.isatty():  # asked for by -: what is typed, until Ctrl-D
        return as_text(sys.stdin.buffer.read(), "stdin")
    with progress("reading stdin"), suppress(OSError):  # a stdin that was opened for writing, as by nohup
        return as_text(sys.stdin.buffer.read(), "stdin")
    return ""


def _obstacle() -> str | None:
    """Why stdin may not be meant for us, or may never end; None if it is read."""
    try:
        handle = sys.stdin.fileno()
        found = os.fstat(handle)
        mode = found.st_mode
        if stat.S_ISREG(mode) and 0 < os.lseek(handle, 0, os.SEEK_CUR) < found.st_size:
            return "stdin is a file that a script or a loop is reading"
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            with progress("waiting for stdin, which is open"):
                begins = select.select([handle], [], [], _PATIENCE)[0]
            return None if begins else f"stdin is open, but nothing came in {_PATIENCE:.0f} s"
    except (OSError, ValueError):  # no file at all
        pass
    return None
