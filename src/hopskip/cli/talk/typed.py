"""What typed text means: a message, a command, or the beginning of either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

BLOCK = '"""'
"""Begins and ends a text of several lines."""
BARE_EXITS = ("exit", "quit", "exit()", "quit()")
"""Words that leave other programs, so they may not be meant for the model."""

COMMANDS = {
    "help": ("", "show this"),
    "exit": ("", "leave, as Ctrl-D does; also /quit and /bye"),
    "clear": ("", "start a new chat; system message and settings stay"),
    "system": ("[TEXT]", 'show the system message, or set it; "" removes it'),
    "set": ("[NAME [VALUE]]", "show the settings, or change one"),
    "retry": ("", "answer the last message again"),
    "undo": ("", "forget the last message and its answer"),
    "save": ("FILE", "write the chat and its settings to a file"),
    "load": ("FILE", "go on with a chat that was saved"),
}
"""By name, what follows it and what it does."""
_OTHER_NAMES = {"quit": "exit", "bye": "exit", "q": "exit", "?": "help", "h": "help", "reset": "clear", "new": "clear"}
_OF_SEVERAL_LINES = ("system",)


class Command(NamedTuple):
    """A command with the text behind its name."""

    name: str
    """One of `COMMANDS`, or what was typed in place of one."""
    argument: str


def parse(text: str) -> Command | str:
    """A command, or the message that the text is.

    >>> parse("/set seed 1"), parse("//etc is a folder"), parse('\"\"\"/set\"\"\"')
    (Command(name='set', argument='seed 1'), '/etc is a folder', '/set')
    """
    bare = text.strip()
    if bare.startswith("/") and not bare.startswith("//"):
        word, *rest = bare.split(maxsplit=1)
        name = _OTHER_NAMES.get(word[1:].lower(), word[1:].lower())
        # a text of several lines that begins with / was pasted: it is no command, unless its argument may have lines
        if "\n" not in bare or name in _OF_SEVERAL_LINES:
            return Command(name, unwrap("".join(rest)))
    if "\n" not in bare and re.match(r"//\w", bare):  # but `// a comment` stays as it is
        return bare[1:]
    return unwrap(text)


def unwrap(text: str) -> str:
    """The text inside a block of \"\"\"; any other text without the white space around it. The first line of several
    keeps its indentation."""
    bare = text.strip()
    inside = bare[len(BLOCK) : -len(BLOCK)]
    is_block = len(bare) >= 2 * len(BLOCK) and bare.startswith(BLOCK) and bare.endswith(BLOCK)
    # three quotes inside belong to a block only whose own stand alone, as around pasted code with docstrings
    if is_block and (BLOCK not in inside or (inside.startswith("\n") and inside.endswith("\n"))):
        return inside.strip("\r\n")
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip() if "\n" in bare else bare


def is_open_block(text: str) -> bool:
    """True if the text, or the argument of its command, is in a block that has not been closed."""
    bare = re.sub(r"\A\s*(?:/\w+\s+)?", "", text)
    return bare.startswith(BLOCK) and BLOCK not in bare[len(BLOCK) :]


def is_continued(text: str) -> bool:
    """True if the text ends with a backslash that is not itself escaped."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def nearest(name: str, names: Iterable[str], sign: str = "") -> str:
    """`did you mean X? `, or nothing if no name is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {sign}{found[0]}? " if found else ""


def unknown_command(name: str) -> str:
    """What to say of a command that does not exist."""
    meant = nearest(name, [*COMMANDS, *_OTHER_NAMES], "/")
    return f"no command /{name}; {meant}/help shows all, and //{name} begins a message"
