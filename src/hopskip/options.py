"""Options are declared once: as the fields of a dataclass, each with the help that the command line shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help_text: str,
    metavar: str | None = None,
    *,
    short: str | None = None,
    parse: Callable[[str], Any] | None = None,
    envvar: str | None = None,
) -> Any:
    """A dataclass field that is an option of the command line as well.

    Args:
        metavar: what the help shows for its value; None for a switch.
        short: another name, such as -m.
        parse: makes the value from the text of the command line, where that is neither a number nor the value itself.
        envvar: of the environment, whose value the command line takes where it is not given.
    """
    metadata = {"help": help_text, "metavar": metavar, "short": short, "parse": parse, "envvar": envvar}
    return field(default=default, metadata=metadata)
