"""JSON schemas as people have them, turned into such as llguidance enforces; what it cannot enforce is dropped and
told of.

Objects that list their properties are closed unless the schema opens them: a model that may invent keys goes on
inventing. References are resolved here, wherever they point in the document, and come out as `#/$defs/...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, cast
from urllib.parse import unquote, urljoin

from hopskip.errors import ConfigError

STRICT = "x-hopskip-strict"
"""True in a schema (beside its `$id`, or at the top) refuses it where a part of it would be dropped."""

_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that llguidance enforces. All others are annotations, as JSON Schema has it."""
_SAME_FORMATS = {"url": "uri", **{f"uuid{version}": "uuid" for version in range(1, 9)}}
"""Formats that another one contains."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_NO_SIBLINGS = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef")
"""What applies other schemas to the same value."""
_UNENFORCED = ("not", "contains", "if", "dependentRequired", "dependentSchemas", "dependencies")
_EXACT = 2**53
"""Up to here llguidance's arithmetic is exact."""
_LARGEST = 2**63
_LARGEST_MULTIPLE = 1000
"""A grammar has a state for every remainder."""


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


@dataclass(frozen=True)
class _Place:
    """Where the walk is: in which resource (a schema with an `$id`, or the whole), and at which pointer in it."""

    resource: dict[str, Any]
    pointer: str
    is_open: bool
    """An object here is one part of several: whoever puts them together closes it."""

    def at(self, *keys: object, is_open: bool = False) -> _Place:
        steps = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        return _Place(self.resource, "/".join((self.pointer, *steps)), is_open)

    def entering(self, node: dict[str, Any]) -> _Place:
        """The place as seen from this node, which may be a resource of its own."""
        name = node.get("$id")
        if node is self.resource or not isinstance(name, str) or name.startswith("#"):
            return self
        return _Place(node, f"{name.rstrip('#')}#", self.is_open)


class _Fitter:
    def __init__(self, root: Any, strict: bool, can_match: Callable[[str], str], relaxed: frozenset[str]) -> None:
        if root is True:
            root = {}
        if not isinstance(root, dict):
            raise ConfigError("a JSON schema is an object, such as {'type': 'object'}")
        self._root = root
        self._strict = strict
        self._can_match = can_match
        self._relaxed = relaxed
        self._dropped: list[str] = []
        self._refused: list[str] = []
        self._resources: dict[str, dict[str, Any]] = {}
        self._bases: dict[int, str] = {id(root): ""}
        """Absolute address of each resource."""
        self._anchors: dict[tuple[int, str], Any] = {}
        self._names: dict[tuple[int, bool], str] = {}
        """Of each schema that is referred to, closed or open."""
        self._pending: list[tuple[str, Any, _Place]] = []

    def fit(self) -> Fitted:
        self._index()
        fitted = self._fitted(self._root, _Place(self._root, "#", is_open=False))
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

    def _drop(self, what: str, place: _Place) -> None:
        told = f"{what} at {place.pointer}"
        is_strict = self._strict or place.resource.get(STRICT) is True
        found = self._refused if is_strict else self._dropped
        if told not in found:
            found.append(told)

    # -- references ----------------------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Find the resources and anchors of the document."""
        stack: list[tuple[Any, dict[str, Any]]] = [(self._root, self._root)]
        while stack:
            node, resource = stack.pop()
            if isinstance(node, list):
                stack += [(child, resource) for child in node]
            if not isinstance(node, dict):
                continue
            name = node.get("$id")
            if isinstance(name, str) and name.startswith("#"):  # as drafts up to 7 have it
                self._anchors[id(resource), name[1:]] = node
            elif isinstance(name, str):
                base = urljoin(self._bases[id(resource)], name).rstrip("#")
                resource = node
                self._bases[id(node)] = base
                self._resources[base] = self._resources[name.rstrip("#")] = node
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    self._anchors[id(resource), node[key]] = node
            skipped = ("const", "enum", "default", "examples", "example")
            stack += [(child, resource) for key, child in node.items() if key not in skipped]

    def _resolve(self, reference: Any, place: _Place) -> tuple[Any, _Place]:
        """The schema that a reference stands for, and where it is."""
        if not isinstance(reference, str):
            raise ConfigError(f"the JSON schema's $ref at {place.pointer} is no text")
        address, _, fragment = reference.partition("#")
        resource = place.resource
        if address:
            found = self._resources.get(urljoin(self._bases[id(resource)], address)) or self._resources.get(address)
            if found is None:
                raise ConfigError(
                    f"the JSON schema refers to another document ($ref {reference[:100]!r}); only '#/...' is followed"
                )
            resource = found
        name = self._bases[id(resource)]
        target: Any = resource
        at = _Place(resource, f"{name}#" if resource is not self._root else "#", place.is_open)
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get((id(resource), fragment))
            at = _Place(resource, f"{at.pointer}{fragment}", place.is_open)
        for step in fragment.split("/")[1:] if fragment.startswith("/") else ():
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict):
                at = at.entering(target)
                target = target.get(key)
            elif isinstance(target, list) and key.isascii() and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            else:
                target = None
            at = at.at(key, is_open=place.is_open)
        if not isinstance(target, dict | bool):
            raise ConfigError(f"the JSON schema's $ref {reference[:100]!r} points nowhere")
        return target, at

    def _reference(self, reference: Any, place: _Place) -> dict[str, Any] | bool:
        target, at = self._resolve(reference, place)
        if isinstance(target, bool):
            return target
        key = (id(target), place.is_open)
        if key not in self._names:
            self._names[key] = f"d{len(self._names)}"
            self._pending.append((self._names[key], target, at))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    # -- one schema ----------------------------------------------------------------------------------------------------

    def _fitted(self, node: Any, place: _Place) -> dict[str, Any] | bool:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise ConfigError(f"the JSON schema has {str(node)[:40]!r} at {place.pointer}, where a schema belongs")
        place = place.entering(node)
        # null is how some clients write that a keyword is not there
        node = {key: value for key, value in node.items() if value is not None or key == "const"}
        _modernize(node)
        tag = (node.get("discriminator") or {}).get("propertyName") if "oneOf" in node or "anyOf" in node else None
        if isinstance(tag, str):  # pydantic requires it, and does not say so where it has a default
            node["required"] = [*node.get("required", ()), *({tag} - set(node.get("required", ())))]
        is_closed, others, children_are_open = self._closing(node, place)
        fitted: dict[str, Any] = {}
        for key, value in node.items():
            self._keyword(key, value, node, fitted, place, children_are_open)
        if is_closed:
            if "properties" in fitted:
                fitted["properties"] |= {name: True for name in others if name not in fitted["properties"]}
                fitted["additionalProperties"] = False
            else:
                closer = {"properties": dict.fromkeys(others, True), "additionalProperties": False}
                _also(fitted, closer)
        if node.get("nullable") is True and "null" not in _types(node):
            return {"anyOf": [fitted, {"type": "null"}]}
        return fitted

    def _keyword(
        self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: _Place, is_open: bool
    ) -> None:
        """Put what a keyword says into `fitted`. Keywords that say nothing of the text are left out."""
        if key in ("type", "required"):
            fitted[key] = value
        elif key in ("const", "enum"):
            for number in _numbers(value):
                _check_exact(number, place)
            fitted[key] = value
        elif key in _COUNTS or key in _BOUNDS or key == "multipleOf":
            self._number(key, value, fitted, place)
        elif key in ("pattern", "format"):
            self._text(key, value, node, fitted, place)
        elif key in _NO_SIBLINGS:
            self._in_place(key, value, fitted, place, is_open)
        elif key in ("items", "additionalProperties"):
            inner = self._fitted(value, place.at(key))
            fitted[key] = inner if key not in fitted else fitted[key]
        elif key == "prefixItems" and isinstance(value, list):
            fitted[key] = [self._fitted(child, place.at(key, index)) for index, child in enumerate(value)]
        elif key == "properties":
            properties = {
                name: self._fitted(child, place.at(key, name)) for name, child in _mapping(key, value, place).items()
            }
            # what `propertyNames` has put there comes first
            fitted[key] = {**fitted.get(key, {}), **properties}
        elif key in ("patternProperties", "propertyNames"):
            self._named_by_pattern(key, value, node, fitted, place)
        elif key == "uniqueItems":
            if value is True and node.get("maxItems") not in (0, 1):
                self._drop(key, place)
        elif key == "unevaluatedItems":
            if value is False and "prefixItems" in node and not any(name in node for name in (*_NO_SIBLINGS, "items")):
                fitted["items"] = False
            elif value is not True:
                self._drop(key, place)
        elif key == "unevaluatedProperties":
            if value is not True and (value is not False or not self._closing(node, place)[0]):
                self._drop(key, place)
        elif key in _UNENFORCED and _says_something(key, value, node):
            self._drop(key, place)

    def _number(self, key: str, value: Any, fitted: dict[str, Any], place: _Place) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"the JSON schema has {key} {str(value)[:40]!r} at {place.pointer}; it must be a number")
        if key in _COUNTS:
            if key in ("minProperties", "maxProperties") and key in self._relaxed:
                self._drop(key, place)
            else:
                fitted[key] = int(value) if value == value // 1 else value
        elif key == "multipleOf":
            try:
                digits = Decimal(str(value)).normalize().as_tuple().digits
            except InvalidOperation:
                digits = (9,) * 9
            if key in self._relaxed or int("".join(map(str, digits))) > _LARGEST_MULTIPLE:
                self._drop(key, place)
            else:
                fitted[key] = value
        elif key in self._relaxed or not -_EXACT <= value <= _EXACT:
            self._drop(key, place)
        else:
            fitted[key] = value

    def _text(self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: _Place) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"the JSON schema has {key} {str(value)[:40]!r} at {place.pointer}; it must be a text")
        if key == "pattern":
            pattern = self._pattern(value, place)
            if pattern is not None:
                fitted[key] = pattern
        elif _SAME_FORMATS.get(value, value) in _FORMATS and key not in self._relaxed:
            fitted[key] = _SAME_FORMATS.get(value, value)
        elif "string" in _types(node) or not _types(node):
            # an annotation, strict or not: of a format that nobody knows no schema can ask that it be enforced
            told = f"format {value[:40]!r} at {place.pointer}"
            if told not in self._dropped:
                self._dropped.append(told)

    def _pattern(self, pattern: str, place: _Place) -> str | None:
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

    def _in_place(self, key: str, value: Any, fitted: dict[str, Any], place: _Place, is_open: bool) -> None:
        if key in ("$ref", "$dynamicRef", "$recursiveRef"):
            inner = self._reference(value, _Place(place.resource, place.pointer, is_open))
            if isinstance(inner, dict) and "$ref" not in fitted:
                fitted |= inner
            else:
                _also(fitted, inner)
            return
        if not isinstance(value, list):
            raise ConfigError(f"the JSON schema's {key} at {place.pointer} is no list")
        branches = [self._fitted(child, place.at(key, index, is_open=is_open)) for index, child in enumerate(value)]
        if key == "allOf":
            fitted["allOf"] = [*fitted.get("allOf", ()), *branches]
        elif key == "anyOf":
            fitted[key] = branches
        elif self._are_disjoint(value, place):
            _also(fitted, {"anyOf": branches})
        elif key in self._relaxed:
            self._drop("that only one of oneOf holds", place)
            _also(fitted, {"anyOf": branches})
        else:
            fitted[key] = branches

    def _are_disjoint(self, branches: list[Any], place: _Place) -> bool:
        """Whether no value can have two of these schemas: of each two one has other types than the other, or both
        require a property whose values they list, and list no value in common."""
        kinds = []
        for branch in branches:
            at = place
            while isinstance(branch, dict) and set(branch) - {"description", "title"} == {"$ref"}:
                branch, at = self._resolve(branch["$ref"], at)
            kinds.append(branch if isinstance(branch, dict) else {})
        return all(_exclude(one, other) for index, one in enumerate(kinds) for other in kinds[:index])

    def _named_by_pattern(
        self, key: str, value: Any, node: dict[str, Any], fitted: dict[str, Any], place: _Place
    ) -> None:
        if key == "patternProperties":
            kept: dict[str, Any] = {}
            for pattern, child in _mapping(key, value, place).items():
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
            names, _ = self._resolve(names["$ref"], place)
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

    def _closing(self, node: dict[str, Any], place: _Place) -> tuple[bool, list[str], bool]:
        """Whether an object here is to be closed, the names that parts of it list beside its own, and whether those
        parts are to stay open."""
        parts = [part for key in _NO_SIBLINGS if key in node for part in _listed(node[key], key)]
        if place.is_open:
            return False, [], True
        lists = bool(node.get("properties")) if isinstance(node.get("properties"), dict) else False
        is_said = "additionalProperties" in node or bool(node.get("patternProperties"))
        conditional = [node[key] for key in ("if", "then", "else") if key in node]
        alternatives = sum(key in node for key in _NO_SIBLINGS) == 1 and (len(parts) == 1 or "allOf" not in node)
        if not lists and not is_said and (not parts or alternatives) and not conditional:
            return False, [], False
        if not parts and not conditional and "dependentSchemas" not in node:
            return lists and not is_said and not _opens(node.get("unevaluatedProperties", False)), [], False
        names, is_opened = self._names_in(node, place)
        return bool(names) and not is_opened, names, True

    def _names_in(self, node: dict[str, Any], place: _Place) -> tuple[list[str], bool]:
        """The properties listed anywhere in what applies to one value, and whether any of it opens the object."""
        names: dict[str, None] = {}
        is_opened = False
        seen: set[int] = set()
        stack: list[tuple[Any, _Place]] = [(node, place)]
        while stack:
            part, at = stack.pop()
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            at = at.entering(part)
            listed = part.get("properties")
            names |= dict.fromkeys(listed if isinstance(listed, dict) else ())
            is_bare = part.get("type") == "object" and not listed and not any(key in part for key in _NO_SIBLINGS)
            is_opened |= _opens(part.get("additionalProperties", False)) or bool(part.get("patternProperties"))
            is_opened |= _opens(part.get("unevaluatedProperties", False))
            is_opened |= is_bare and "additionalProperties" not in part and part is not node
            for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                if key in part:
                    stack.append(self._resolve(part[key], at))
            below = [child for key in ("allOf", "anyOf", "oneOf") for child in _listed(part.get(key, ()), key)]
            below += [part[key] for key in ("if", "then", "else") if key in part]
            below += list(dict(part.get("dependentSchemas") or {}).values())
            stack += [(child, at) for child in reversed(below)]
        return list(names), is_opened


# -- small things ------------------------------------------------------------------------------------------------------


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


def _modernize(node: dict[str, Any]) -> None:
    """Write what older drafts say as the newest does."""
    if isinstance(node.get("items"), list):
        rest = node.pop("additionalItems", None)
        node["prefixItems"] = node.pop("items")
        if rest is not None:
            node["items"] = rest
    for bound in ("Minimum", "Maximum"):
        if isinstance(node.get(f"exclusive{bound}"), bool):
            if node.pop(f"exclusive{bound}") and bound.lower() in node:
                node[f"exclusive{bound}"] = node.pop(bound.lower())
    if "definitions" in node and "$defs" not in node:
        node.pop("definitions")


def _also(fitted: dict[str, Any], other: Any) -> None:
    fitted["allOf"] = [*fitted.get("allOf", ()), other]


def _exclude(one: dict[str, Any], other: dict[str, Any]) -> bool:
    types = [{"number" if name == "integer" else str(name) for name in _types(schema)} for schema in (one, other)]
    if all(types) and not types[0] & types[1]:
        return True
    if types != [{"object"}] * 2:
        return False
    for name in one.get("required") or ():
        if name in (other.get("required") or ()):
            values = [_values((schema.get("properties") or {}).get(name)) for schema in (one, other)]
            if all(values) and not values[0] & values[1]:
                return True
    return False


def _values(schema: Any) -> set[str]:
    """The texts that a schema lists; none if it lists other values."""
    found = [schema["const"]] if isinstance(schema, dict) and "const" in schema else (schema or {}).get("enum", [])
    return set(found) if all(isinstance(value, str) for value in found) else set()


def _opens(value: Any) -> bool:
    return value is not False


def _listed(value: Any, key: str) -> list[Any]:
    if key in ("$ref", "$dynamicRef", "$recursiveRef"):
        return [{key: value}]
    return value if isinstance(value, list) else []


def _types(node: dict[str, Any]) -> list[Any]:
    types = node.get("type", [])
    return types if isinstance(types, list) else [types]


def _mapping(key: str, value: Any, place: _Place) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"the JSON schema's {key} at {place.pointer} are no object")
    return value


def _says_something(key: str, value: Any, node: dict[str, Any]) -> bool:
    if key == "if":
        return "then" in node or "else" in node
    if key == "contains":
        return node.get("minContains") != 0 or "maxContains" in node
    return value is not False if key == "not" else bool(value)


def _numbers(value: Any) -> Iterator[int | float]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield item


def _check_exact(number: int | float, place: _Place) -> None:
    is_exact = -_LARGEST < number < _LARGEST and cast("int | float", float(number)) == number
    if not is_exact:
        raise ConfigError(
            f"the JSON schema has the number {str(number)[:40]} at {place.pointer}, which would lose digits; give it "
            "as a text"
        )
