"""Regular expressions, read far enough to leave parts of them out."""

from __future__ import annotations

import re


def without_look_around(pattern: str) -> str:
    r"""A pattern without what looks around in it: `(?=...)`, `(?!...)`, `(?<=...)`, `(?<!...)`, `\b`, `\B`. It matches
    whatever the pattern matches, and more.

    >>> without_look_around(r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$")
    '^[+-]?0*\\d*\\.?\\d*$'
    """
    kept: list[str] = []
    index = 0
    while index < len(pattern):
        opening = re.match(r"\(\?<?[=!]", pattern[index:])
        end = index + 2 if pattern[index] == "\\" else _end_of_class(pattern, index)
        if opening:
            index = _end_of_group(pattern, index)
            continue
        if pattern[index:end] not in (r"\b", r"\B"):
            kept.append(pattern[index:end])
        index = end
    return "".join(kept)


def _end_of_class(pattern: str, start: int) -> int:
    """Behind the character, or the class of characters, that begins here."""
    if pattern[start] != "[":
        return start + 1
    index = start + 1
    while index < len(pattern) and pattern[index] != "]":
        index += 2 if pattern[index] == "\\" else 1
    return index + 1


def _end_of_group(pattern: str, start: int) -> int:
    depth, index = 0, start
    while index < len(pattern):
        depth += {"(": 1, ")": -1}.get(pattern[index], 0)
        if pattern[index] == ")" and not depth:
            return index + 1
        index = index + 2 if pattern[index] == "\\" else _end_of_class(pattern, index)
    return index
