"""Every error that hopskip raises on bad input. Each message names the value and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any, get_args


class HopskipError(Exception):
    """Base class: `except HopskipError` catches whatever a user can put right."""


class BusyError(HopskipError):
    """There is no room; there may be in so many seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(f"{message}; try again in {retry_after} s")
        self.retry_after = retry_after


class ConfigError(HopskipError, ValueError):
    """An option has a value that cannot work, or that would have no effect."""


class CheckpointError(HopskipError):
    """A model cannot be found, read, or run: missing file, truncated tensor, unsupported architecture."""


class PromptError(HopskipError, ValueError):
    """A prompt cannot be served: empty, longer than the context, or not text."""


class ResourceError(HopskipError, RuntimeError):
    """The system does not give what was asked for, such as so many threads."""


class ClosedError(HopskipError, RuntimeError):
    """A model is used that has been closed."""


class TrainingError(HopskipError):
    """Training cannot go on: the loss is not a number, or a checkpoint cannot be written."""


class SlowDraftWarning(UserWarning):
    """A draft is slower than plain decoding, by estimate. It never changes the text."""


def shown(value: object) -> str:
    """A value as part of a message of one line: cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ConfigError unless a value is one of a Literal's, or None."""
    if value is not None and value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")


def check_count(name: str, value: object, wanted: str, *, least: int = 1) -> int:
    """A whole number, as a plain int.

    Args:
        wanted: how the message describes what may be given.

    Raises:
        ConfigError: it is none (a float, a text, a truth value), or below `least`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {shown(value)}; it must be {wanted}")
    return int(value)


def check_number(name: str, value: object, wanted: str) -> float:
    """A number that is neither infinite nor NaN; whole numbers stay whole.

    Raises:
        ConfigError: it is none.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number:
        raise ConfigError(f"{name} is {shown(value)}; it must be {wanted}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for the first name that is not known, with the nearest one that is."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
            raise ConfigError(f"{owner} has no option {name!r}; {remedy}")
