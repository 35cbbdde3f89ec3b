"""Arguments that a model writes as plain text, typed by the schema of the function."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from hopskip.text.tools.base import to_json

_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
_NUMBERS = {"integer", "number"}
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
"""JSON's words, as Python writes them too."""
_DEEPEST = 16


def property_of(parameters: Mapping[str, Any], key: str) -> Any:
    """The schema of an argument; None if there is none."""
    properties = parameters.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def is_text(parameters: Mapping[str, Any], key: str) -> bool:
    """True if an argument is a string whatever its text; so are those that the schema does not know or type."""
    return types_of(property_of(parameters, key), parameters) <= {"string"}


def argument(text: str, parameters: Mapping[str, Any], key: str) -> str:
    """The JSON of an argument that need not be a string: the value that its text stands for, if that has one of the
    types it may have; else the text as a string."""
    types = types_of(property_of(parameters, key), parameters)
    plain = text.strip()
    for written in (plain, _WORDS.get(plain.lower(), plain)):
        try:
            value = json.loads(written, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        found = _TYPES[type(value)]
        if found != "string" and types & {found, *(_NUMBERS if found in _NUMBERS else ())}:
            return written
    return to_json(text)


def types_of(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a schema lets a value have; none if it does not say."""
    return _types_of(schema, root, set(), 0)


def _types_of(schema: Any, root: Mapping[str, Any], seen: set[str], depth: int) -> set[str]:
    """Each reference is followed once, so that no schema takes long."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else {t for t in _list(named) if isinstance(t, str)}
    if not found and "const" in schema:
        found = {_TYPES[type(schema["const"])]}
    if not found:
        found = {_TYPES[type(value)] for value in _list(schema.get("enum"))}
    for key in () if found else ("anyOf", "oneOf", "allOf"):
        found |= {t for part in _list(schema.get(key)) for t in _types_of(part, root, seen, depth + 1)}
    reference = schema.get("$ref")
    if not found and isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        found = _types_of(resolve(reference, root), root, seen, depth + 1)
    if schema.get("nullable") is True and found:
        found.add("null")
    return found


def resolve(reference: str, root: Any) -> Any:
    """What a reference within the document points to; None if that is nothing."""
    if not reference.startswith("#"):
        return None
    for step in reference.removeprefix("#").split("/")[1:]:
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
