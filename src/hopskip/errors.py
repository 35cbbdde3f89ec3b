"""Every error that hopskip raises on bad input. Each message names the value and the remedy."""

from __future__ import annotations

from typing import Any, get_args


class HopskipError(Exception):
    """Base class: `except HopskipError` catches whatever a user can put right."""


class ConfigError(HopskipError, ValueError):
    """An option has a value that cannot work, or that would have no effect."""


class CheckpointError(HopskipError):
    """A model cannot be found, read, or run: missing file, truncated tensor, unsupported architecture."""


class PromptError(HopskipError, ValueError):
    """A prompt cannot be served: empty, longer than the context, or not text."""


class ResourceError(HopskipError, RuntimeError):
    """The system does not give what was asked for, such as so many threads."""


class TrainingError(HopskipError):
    """Training cannot go on: the loss is not a number, or a checkpoint cannot be written."""


class SlowDraftWarning(UserWarning):
    """A draft is slower than plain decoding, by estimate. It never changes the text."""


def shown(value: object) -> str:
    """A value as part of a message of one line: cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ConfigError unless a value is one of a Literal's, or None."""
    if value is not None and value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
