"""JSON schemas as people have them, turned into such as llguidance enforces; what it cannot enforce is dropped and
told of.

Objects that list their properties are closed unless the schema opens them: a model that may invent keys goes on
inventing. References are resolved here, wherever they point in the document, and come out as `#/$defs/...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from hopskip.errors import ConfigError
from hopskip.text import json_keywords as keywords
from hopskip.text.json_keywords import (
    BOUNDS,
    COUNTS,
    EXACT,
    FORMATS,
    IN_PLACE,
    LARGEST_MULTIPLE,
    SAME_FORMATS,
    UNENFORCED,
)
from hopskip.text.json_references import Place, References
from hopskip.text.patterns import without_look_around

STRICT = "x-hopskip-strict"
"""True in a schema (beside its `$id`, or at the top) refuses it where a part of it would be dropped."""


@dataclass(frozen=True)
class Fitted:
    """A schema that llguidance takes, and what of the given one is not in it (`uniqueItems at #/properties/tags`)."""

    schema: dict[str, Any]
    dropped: list[str]


def fit(schema: Any, *, strict: bool, can_match: Callable[[str], str], relaxed: frozenset[str] = frozenset()) -> Fitted:
    """Fit a schema.

    Args:
        schema: as `json.loads` gives it.
        strict: refuse it where a part would be dropped.
        can_match: why a regular expression cannot be used; empty if it can.
        relaxed: keywords to drop though they are known: llguidance takes some of them only in simple cases.

    Raises:
        ConfigError: it is no schema, refers to another document, or has a number that would lose digits; or a part
            cannot be enforced, and it is strict.
    """
    return _Fitter(schema, strict, can_match, relaxed).fit()


class _Fitter:
    def __init__(self, root: Any, strict: bool, can_match: Callable[[str], str], relaxed: frozenset[str]) -> None:
        if root is True:
            root = {}
        if not isinstance(root, dict):
            raise ConfigError("a JSON schema is an object, such as {'type': 'object'}")
        self._root = root
        self._references = References(root)
        self._strict = strict
        self._can_match = can_match
        self._relaxed = relaxed
        self._dropped: list[str] = []
        self._refused: list[str] = []
        self._names: dict[tuple[int, bool], str] = {}
        """Of each schema that is referred to, closed or open."""
        self._pending: list[tuple[str, Any, Place]] = []

    def fit(self) -> Fitted:
        fitted = self._fitted(self._root, Place(self._root, "#", is_open=False))
        definitions: dict[str, Any] = {}
        while self._pending:
            name, node, place = self._pending.pop()
            definitions[name] = self._fitted(node, place)
        if self._refused:
            raise ConfigError(
                f"the JSON schema is strict, but this cannot be enforced: {'; '.join(self._refused)}; leave it out, or "
                "leave strict out"
            )
        if not isinstance(fitted, dict):
            fitted = {"not": {}}
        return Fitted({**fitted, "$defs": definitions} if definitions else fitted, self._dropped)

    def _drop(self, what: str, place: Place) -> None:
        told = f"{what} at {place.pointer}"
        is_strict = self._strict or place.resource.get(STRICT) is True
        found = self._refused if is_strict else self._dropped
        if told not in found:
            found.append(told)

    # -- references ----------------------------------------------------------------------------------------------------

    def _reference(self, reference: Any, place: Place) -> dict[str, Any] | bool:
        target, at = self._references.resolve(reference, place)
        if isinstance(target, bool):
            return target
        key = (id(target), place.is_open)
        if key not in self._names:
            self._names[key] = f"d{len(self._names)}"
            self._pending.append((self._names[key], target, at))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    # -- one schema ----------------------------------------------------------------------------------------------------

    def _fitted(self, node: Any, place: Place) -> dict[str, Any] | bool:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise ConfigError(f"the JSON schema has {str(node)[:40]!r} at {place.pointer}, where a schema belongs")
        place = place.entering(node)
        # null is how some clients write that a keyword is not there
        node = {key: value for key, value in node.items() if value is not None or key == "const"}
        keywords.modernize(node)
        keywords.require_tag(node)
        is_closed, others, children_are_open = self._closing(node, place)
        fitted: dict[str, Any] = {}
        for key, value in node.items():
            self._keyword(key, value, node, fitted, place, children_are_open)
        if is_closed:
            fitted.pop("additionalProperties", None)
            own = fitted.get("properties", {})
            names = dict.fromkeys([*own, *others, *keywords.required(node)], True)
            closer = {"properties": {**names, **own}, "additionalProperties": False}
            if own:
                fitted |= closer
            else:
                keywords.also(fitted, closer)
        if node.get("nullable") is True and "null" not in keywords.types(node):
            return {"anyOf": [fitted, {"type": "null"}]}
        return fitted

    def _keyword(
        self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: Place, is_open: bool
    ) -> None:
        """Put what a keyword says into `fitted`. Keywords that say nothing of the text are left out."""
        if key in ("type", "required"):
            fitted[key] = value
        elif key in ("const", "enum"):
            for number in keywords.numbers(value):
                keywords.check_exact(number, place)
            fitted[key] = value
        elif key in COUNTS or key in BOUNDS or key == "multipleOf":
            self._number(key, value, fitted, place)
        elif key in ("pattern", "format"):
            self._text(key, value, node, fitted, place)
        elif key in IN_PLACE:
            self._in_place(key, value, fitted, place, is_open)
        elif key in ("items", "additionalProperties"):
            # what `patternProperties` or `propertyNames` has put there stays
            fitted.setdefault(key, self._fitted(value, place.at(key)))
        elif key == "prefixItems" and isinstance(value, list):
            fitted[key] = [self._fitted(child, place.at(key, index)) for index, child in enumerate(value)]
        elif key == "properties":
            properties = {
                name: self._fitted(child, place.at(key, name))
                for name, child in keywords.mapping(key, value, place).items()
            }
            # what `propertyNames` has put there comes first
            fitted[key] = {**fitted.get(key, {}), **properties}
        elif key in ("patternProperties", "propertyNames"):
            self._named_by_pattern(key, value, node, fitted, place)
        elif key == "uniqueItems":
            if value is True and node.get("maxItems") not in (0, 1):
                self._drop(key, place)
        elif key == "unevaluatedItems":
            if value is False and "prefixItems" in node and not any(name in node for name in (*IN_PLACE, "items")):
                fitted["items"] = False
            elif value is not True:
                self._drop(key, place)
        elif key == "unevaluatedProperties":
            if value is not True and (value is not False or not self._closing(node, place)[0]):
                self._drop(key, place)
        elif key in UNENFORCED and keywords.says_something(key, value, node):
            self._drop(key, place)

    def _number(self, key: str, value: Any, fitted: dict[str, Any], place: Place) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"the JSON schema has {key} {str(value)[:40]!r} at {place.pointer}; it must be a number")
        if key in COUNTS:
            if key in ("minProperties", "maxProperties") and key in self._relaxed:
                self._drop(key, place)
            else:
                fitted[key] = int(value) if value == value // 1 else value
        elif key == "multipleOf":
            try:
                digits = Decimal(str(value)).normalize().as_tuple().digits
            except InvalidOperation:
                digits = (9,) * 9
            if key in self._relaxed or int("".join(map(str, digits))) > LARGEST_MULTIPLE:
                self._drop(key, place)
            else:
                fitted[key] = value
        elif key in self._relaxed or not -EXACT <= value <= EXACT:
            self._drop(key, place)
        else:
            fitted[key] = value

    def _text(self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: Place) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"the JSON schema has {key} {str(value)[:40]!r} at {place.pointer}; it must be a text")
        if key == "pattern":
            pattern = self._pattern(value, place)
            if pattern is not None:
                fitted[key] = pattern
        elif SAME_FORMATS.get(value, value) in FORMATS and key not in self._relaxed:
            fitted[key] = SAME_FORMATS.get(value, value)
        elif "string" in keywords.types(node) or not keywords.types(node):
            # an annotation, strict or not: of a format that nobody knows no schema can ask that it be enforced
            told = f"format {value[:40]!r} at {place.pointer}"
            if told not in self._dropped:
                self._dropped.append(told)

    def _pattern(self, pattern: str, place: Place) -> str | None:
        """The pattern, or what of it can be enforced; None if nothing."""
        reason = "" if "pattern" not in self._relaxed else "it is too complex"
        reason = reason or self._can_match(pattern)
        if not reason:
            return pattern
        wider = without_look_around(pattern)
        if "pattern" not in self._relaxed and wider != pattern and not self._can_match(wider):
            self._drop("look-around in pattern", place)
            return wider
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            raise ConfigError(f"the JSON schema's pattern at {place.pointer} cannot be used: {reason}") from None
        self._drop("pattern", place)
        return None

    def _in_place(self, key: str, value: Any, fitted: dict[str, Any], place: Place, is_open: bool) -> None:
        if key in ("$ref", "$dynamicRef", "$recursiveRef"):
            inner = self._reference(value, Place(place.resource, place.pointer, is_open))
            if isinstance(inner, dict) and "$ref" not in fitted:
                fitted |= inner
            else:
                keywords.also(fitted, inner)
            return
        if not isinstance(value, list):
            raise ConfigError(f"the JSON schema's {key} at {place.pointer} is no list")
        branches = [self._fitted(child, place.at(key, index, is_open=is_open)) for index, child in enumerate(value)]
        if key == "allOf":
            fitted["allOf"] = [*fitted.get("allOf", ()), *branches]
        elif key == "anyOf":
            fitted[key] = branches
        elif self._are_disjoint(value, place):
            keywords.also(fitted, {"anyOf": branches})
        elif key in self._relaxed:
            self._drop("that only one of oneOf holds", place)
            keywords.also(fitted, {"anyOf": branches})
        else:
            fitted[key] = branches

    def _are_disjoint(self, branches: list[Any], place: Place) -> bool:
        """Whether no value can have two of these schemas: of each two one has other types than the other, or both
        require a property whose values they list, and list no value in common."""
        kinds = []
        for branch in branches:
            at = place
            while isinstance(branch, dict) and set(branch) - {"description", "title"} == {"$ref"}:
                branch, at = self._references.resolve(branch["$ref"], at)
            kinds.append(branch if isinstance(branch, dict) else {})
        return all(keywords.exclude(one, other) for index, one in enumerate(kinds) for other in kinds[:index])

    def _named_by_pattern(
        self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: Place
    ) -> None:
        if key == "patternProperties":
            kept: dict[str, Any] = {}
            for pattern, child in keywords.mapping(key, value, place).items():
                inner = self._fitted(child, place.at(key, pattern))
                if key in self._relaxed or self._can_match(pattern):
                    self._drop(key, place.at(key, pattern))
                    fitted["additionalProperties"] = True  # a name that it was for may still come
                else:
                    kept[pattern] = inner
            fitted[key] = {**fitted.get(key, {}), **kept}
            return
        names = value
        while isinstance(names, dict) and "$ref" in names:
            names, _ = self._references.resolve(names["$ref"], place)
        names = names if isinstance(names, dict) else {}
        if not set(names) - {"type", "title", "description"} and value is not False:
            return
        is_plain = not node.get("properties") and not node.get("patternProperties")
        listed = names.get("enum", [names["const"]] if "const" in names else None)
        values = node.get("additionalProperties", True)
        if is_plain and isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            inner = self._fitted(values, place.at("additionalProperties"))
            fitted["properties"] = dict.fromkeys(listed, inner)
            fitted["additionalProperties"] = False
        elif is_plain and isinstance(names.get("pattern"), str) and not self._can_match(names["pattern"]):
            fitted["patternProperties"] = {names["pattern"]: self._fitted(values, place.at("additionalProperties"))}
            fitted["additionalProperties"] = False
            if set(names) - {"type", "title", "description", "pattern"}:
                self._drop(key, place)
        else:
            self._drop(key, place)

    # -- closed and open objects ---------------------------------------------------------------------------------------

    def _closing(self, node: dict[str, Any], place: Place) -> tuple[bool, list[str], bool]:
        """Whether an object here is to be closed, the names that parts of it list beside its own, and whether those
        parts are to stay open."""
        parts = [part for key in IN_PLACE if key in node for part in keywords.listed(node[key], key)]
        if place.is_open:
            return False, [], True
        lists = bool(node.get("properties")) if isinstance(node.get("properties"), dict) else False
        is_said = "additionalProperties" in node or bool(node.get("patternProperties"))
        conditional = [node[key] for key in ("if", "then", "else") if key in node]
        alternatives = sum(key in node for key in IN_PLACE) == 1 and (len(parts) == 1 or "allOf" not in node)
        if not lists and not is_said and (not parts or alternatives) and not conditional:
            return False, [], False
        if not parts and not conditional and "dependentSchemas" not in node:
            return lists and not is_said and not keywords.opens(node.get("unevaluatedProperties", False)), [], False
        names, is_opened = self._names_in(node, place)
        return bool(names) and not is_opened, names, True

    def _names_in(self, node: dict[str, Any], place: Place) -> tuple[list[str], bool]:
        """The properties listed anywhere in what applies to one value, and whether any of it opens the object."""
        names: dict[str, None] = {}
        needed: list[str] = []
        is_opened = False
        seen: set[int] = set()
        stack: list[tuple[Any, Place]] = [(node, place)]
        while stack:
            part, at = stack.pop()
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            at = at if part is node else at.entering(part)
            needed += keywords.required(part)
            listed = part.get("properties")
            names |= dict.fromkeys(listed if isinstance(listed, dict) else ())
            is_bare = part.get("type") == "object" and not listed and not any(key in part for key in IN_PLACE)
            is_opened |= keywords.opens(part.get("additionalProperties", False)) or bool(part.get("patternProperties"))
            is_opened |= keywords.opens(part.get("unevaluatedProperties", False))
            is_opened |= is_bare and "additionalProperties" not in part and part is not node
            references = [part[key] for key in ("$ref", "$dynamicRef", "$recursiveRef") if key in part]
            stack += [self._references.resolve(reference, at) for reference in references]
            below = [child for key in ("allOf", "anyOf", "oneOf") for child in keywords.listed(part.get(key, ()), key)]
            below += [part[key] for key in ("if", "then", "else") if key in part]
            below += list(dict(part.get("dependentSchemas") or {}).values())
            stack += [(child, at) for child in reversed(below)]
        return [*names, *needed] if names else [], is_opened
