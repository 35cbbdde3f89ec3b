"""Options are declared once: as the fields of a dataclass, each with the help that the command line shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


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


def default_of(item: Field[Any]) -> Any:
    """What a field is if nobody says; MISSING if it must be given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def short_repr(value: Any) -> str:
    """A dataclass with those fields only that differ from their defaults, long ones cut; to be its `__repr__`.

    >>> from hopskip.sampling_params import SamplingParams
    >>> SamplingParams(max_new_tokens=20, temperature=0.7)
    SamplingParams(max_new_tokens=20, temperature=0.7)
    """
    parts = []
    for item in fields(value):
        content = getattr(value, item.name)
        if item.repr and content != default_of(item):
            text = f"{content:.6g}" if isinstance(content, float) else repr(content)
            parts.append(f"{item.name}={text if len(text) <= 100 else text[:80] + '...'}")
    return f"{type(value).__name__}({', '.join(parts)})"


def documented(kind: C) -> C:
    """Let `help()` of a dataclass say what each option is, in the words of the command line."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in fields(kind) if "help" in item.metadata]
    kind.__doc__ = f"{kind.__doc__}\n    Options:\n    " + "\n    ".join(lines)
    return kind
