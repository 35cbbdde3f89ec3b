"""What the keywords of JSON schemas are for, and questions about single ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from hopskip.errors import ConfigError
from hopskip.text.json_references import Place

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that llguidance enforces. All others are annotations, as JSON Schema has it."""
SAME_FORMATS = {"url": "uri", **{f"uuid{version}": "uuid" for version in range(1, 9)}}
"""Formats that another one contains."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef")
"""What applies other schemas to the same value."""
UNENFORCED = ("not", "contains", "if", "dependentRequired", "dependentSchemas", "dependencies")
EXACT = 2**53
"""Up to here llguidance's arithmetic is exact."""
LARGEST = 2**63
LARGEST_MULTIPLE = 1000
"""A grammar has a state for every remainder."""


def modernize(node: dict[str, Any]) -> None:
    """Write what older drafts say as the newest does."""
    if isinstance(node.get("items"), list):
        rest = node.pop("additionalItems", None)
        node["prefixItems"] = node.pop("items")
        if rest is not None:
            node["items"] = rest
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and bound in node:
            node[exclusive] = node.pop(bound)


def require_tag(node: dict[str, Any]) -> None:
    """Require the property that tells the branches of a union apart: where it has a default pydantic does not say so,
    and cannot read a text without it."""
    discriminator = node.get("discriminator")
    tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if isinstance(tag, str) and ("oneOf" in node or "anyOf" in node) and tag not in required(node):
        node["required"] = [*required(node), tag]


def required(node: dict[str, Any]) -> list[str]:
    """Names that a schema requires."""
    names = node.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def also(fitted: dict[str, Any], other: Any) -> None:
    """Say something more of the same value."""
    fitted["allOf"] = [*fitted.get("allOf", ()), other]


def exclude(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether no value can have both schemas, as far as types and tags tell."""
    kinds = [{"number" if name == "integer" else str(name) for name in types(schema)} for schema in (one, other)]
    if all(kinds) and not kinds[0] & kinds[1]:
        return True
    if kinds != [{"object"}] * 2:
        return False
    for name in required(one):
        if name in required(other):
            texts = [values((schema.get("properties") or {}).get(name)) for schema in (one, other)]
            if all(texts) and not texts[0] & texts[1]:
                return True
    return False


def values(schema: Any) -> set[str]:
    """The texts that a schema lists; none if it lists other values."""
    found = [schema["const"]] if isinstance(schema, dict) and "const" in schema else (schema or {}).get("enum", [])
    return set(found) if all(isinstance(value, str) for value in found) else set()


def opens(value: Any) -> bool:
    """Whether `additionalProperties` of this value lets names in that are not listed."""
    return value is not False


def listed(value: Any, key: str) -> list[Any]:
    """The schemas that a keyword applies to the same value."""
    if key in ("$ref", "$dynamicRef", "$recursiveRef"):
        return [{key: value}]
    return value if isinstance(value, list) else []


def types(node: dict[str, Any]) -> list[Any]:
    """The types that a schema names."""
    named = node.get("type", [])
    return named if isinstance(named, list) else [named]


def mapping(key: str, value: Any, place: Place) -> Mapping[str, Any]:
    """Raises ConfigError: it is no object."""
    if not isinstance(value, dict):
        raise ConfigError(f"the JSON schema's {key} at {place.pointer} are no object")
    return value


def says_something(key: str, value: Any, node: dict[str, Any]) -> bool:
    """Whether a keyword that is not enforced says anything."""
    if key == "if":
        return "then" in node or "else" in node
    if key == "contains":
        return node.get("minContains") != 0 or "maxContains" in node
    return value is not False if key == "not" else bool(value)


def numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield item


def check_exact(number: int | float, place: Place) -> None:
    """Raises ConfigError: llguidance would write another number."""
    is_exact = -LARGEST < number < LARGEST and cast("int | float", float(number)) == number
    if not is_exact:
        raise ConfigError(
            f"the JSON schema has the number {str(number)[:40]} at {place.pointer}, which would lose digits; give it "
            "as a text"
        )
