"""JSON schemas as people have them: what of them is enforced, what is dropped and told of, and what is refused."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import pathlib
import uuid
from functools import cache
from typing import Annotated, Any, Literal, Union

import jsonschema_rs
import pytest
from pydantic import BaseModel, Field, SecretStr

from hopskip.errors import ConfigError
from hopskip.text.grammar_build import Built, build, read_vocabulary
from hopskip.text.patterns import without_look_around
from tests.tiny import byte_level_tokenizer


@cache
def vocabulary() -> Any:
    tokenizer = byte_level_tokenizer()
    return read_vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), [0])


def built(schema: Any, *, strict: bool = False) -> Built:
    return build(vocabulary(), "json_schema", json.dumps(schema), strict=strict)


def allows(grammar: Built, value: Any) -> bool:
    """Whether a text may be this value."""
    return allows_text(grammar, json.dumps(value, ensure_ascii=False))


def allows_text(grammar: Built, text: str) -> bool:
    matcher = grammar.matcher.deep_copy()
    tokens = vocabulary().tokens.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def check(schema: Any, good: list[Any], bad: list[Any], dropped: list[str]) -> None:
    grammar = built(schema)
    assert grammar.dropped == dropped
    assert [value for value in good if not allows(grammar, value)] == []
    assert [value for value in bad if allows(grammar, value)] == []
    if not dropped:
        assert built(schema, strict=True).text == grammar.text
        for value in good:
            jsonschema_rs.validate(schema, value)


BASE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}}, "required": ["kind"]}

ENFORCED: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "closed": (BASE, [{"a": 1}], [{"a": 1, "b": 2}, {}]),
    "opened": ({**BASE, "additionalProperties": True}, [{"a": 1, "b": 2}], [{"b": 2}]),
    "opened by a schema": (
        {**BASE, "additionalProperties": {"type": "string"}},
        [{"a": 1, "b": "x"}],
        [{"a": 1, "b": 2}],
    ),
    "opened by patterns": (
        {**BASE, "patternProperties": {"^x_": {"type": "null"}}},
        [{"a": 1, "x_b": None}],
        [{"a": 1, "x_b": 2}],
    ),
    "no properties are listed": ({"type": "object"}, [{"b": 2}, {}], [1]),
    "required and not listed": (
        {**BASE, "required": ["a", "b"]},
        [{"a": 1, "b": []}],
        [{"a": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "inside": ({"type": "array", "items": BASE}, [[{"a": 1}]], [[{"a": 1, "b": 2}]]),
    "allOf": (
        {
            "allOf": [
                {"$ref": "#/$defs/Base"},
                {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
            ],
            "$defs": {"Base": BASE},
        },
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}, {"a": 1, "b": "x", "c": 1}],
    ),
    "both in allOf and alone": (
        {
            "type": "object",
            "properties": {
                "one": {"$ref": "#/$defs/Base"},
                "two": {"allOf": [{"$ref": "#/$defs/Base"}, {"properties": {"b": {"type": "null"}}}]},
                "three": {"allOf": [{"$ref": "#/$defs/Base"}], "description": "as pydantic 1 writes it"},
            },
            "$defs": {"Base": BASE},
        },
        [{"one": {"a": 1}, "two": {"a": 1, "b": None}, "three": {"a": 2}}, {"two": {"a": 1}}],
        [{"one": {"a": 1, "b": None}}, {"two": {"a": 1, "c": 1}}, {"three": {"a": 1, "b": None}}],
    ),
    "an allOf that opens": (
        {"allOf": [{**BASE, "additionalProperties": True}, {"properties": {"b": {"type": "null"}}}]},
        [{"a": 1, "c": 1}],
        [{}],
    ),
    "an allOf with any object": ({"allOf": [BASE, {"type": "object"}]}, [{"a": 1, "c": 1}], [{}]),
    "properties and anyOf": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "c": 1}],
    ),
    "anyOf": ({"anyOf": [CAT, DOG]}, [{"kind": "cat", "lives": 9}], [{"kind": "cat", "name": "x"}]),
    "a tagged oneOf of references": (
        {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "$defs": {"Cat": CAT, "Dog": DOG}},
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "name": "x"}],
        [{"kind": "cat", "name": "x"}, {}],
    ),
    "oneOf types": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "x"], [None, []]),
    "the tag of a discriminator": (
        {
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"Cat": CAT, "Dog": DOG},
        },
        [{"kind": "dog"}],
        [{}],
    ),
    "propertyNames listed": (
        {
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/N"},
            "additionalProperties": {"type": "integer"},
            "$defs": {"N": {"enum": ["x", "y"]}},
        },
        [{"x": 1, "y": 2}, {"y": 1}, {}],
        [{"z": 1}, {"x": "1"}],
    ),
    "a propertyName": ({"type": "object", "propertyNames": {"const": "x"}}, [{"x": 1}], [{"z": 1}]),
    "propertyNames by pattern": (
        {"additionalProperties": {"type": "integer"}, "type": "object", "propertyNames": {"pattern": "^[a-z]+$"}},
        [{"abc": 1}],
        [{"A": 1}, {"a": "1"}],
    ),
    "propertyNames of texts": ({"type": "object", "propertyNames": {"type": "string"}}, [{"x": 1}], []),
    "$ref in values": ({"enum": [{"$ref": "x"}, "y"], "default": {"$ref": "z"}}, [{"$ref": "x"}], [{}]),
    "$ref in examples": ({"type": "integer", "examples": [{"$ref": "http://x"}]}, [1], [{}]),
    "a property called $ref": (
        {"type": "object", "properties": {"$ref": {"type": "null"}}},
        [{"$ref": None}],
        [{"$ref": 1}],
    ),
    "definitions": ({"definitions": {"a b/%": BASE}, "$ref": "#/definitions/a%20b~1%25"}, [{"a": 1}], [{}]),
    "$anchor": ({"$defs": {"A": {"$anchor": "foo", "type": "null"}}, "$ref": "#foo"}, [None], [1]),
    "an address": (
        {
            "$id": "http://e/a.json",
            "$defs": {"A": {"type": "null"}},
            "items": {"$ref": "a.json#/$defs/A"},
            "type": "array",
        },
        [[None]],
        [[1]],
    ),
    "an address inside": (
        {"type": "array", "items": {"$id": "t", "$ref": "#/$defs/A", "$defs": {"A": {"type": "null"}}}},
        [[None]],
        [[1]],
    ),
    "any place": (
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}},
        [{"b": None}],
        [{"b": 1}],
    ),
    "a place in a list": (
        {
            "prefixItems": [{"type": "null"}, {"$ref": "#/prefixItems/0"}],
            "type": "array",
            "minItems": 2,
            "items": False,
        },
        [[None, None]],
        [[None, 1]],
    ),
    "recursion": (
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
        [{"next": {"next": None}}],
        [{"next": {}}, {"next": 1}],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        [[1, "x"]],
        [["x", 1], [1], [1, "x", 2]],
    ),
    "multipleOf in bounds": (
        {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
        [0, 35, 100],
        [-5, 7, 105],
    ),
    "hundredths": ({"type": "number", "multipleOf": 0.01, "minimum": 0}, [0.25, 3], [0.125, -1]),
    "floats as counts": ({"type": "string", "minLength": 2.0, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
    "date and time": ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-2-29", "x"]),
    "uuid": ({"type": "string", "format": "uuid"}, [str(uuid.UUID(int=5))], ["x"]),
    "pattern": ({"type": "string", "pattern": "^[a-z]{2}\\/\\d$"}, ["ab/1"], ["ab1", "AB/1"]),
    "large, exactly": ({"enum": [2**53, 2**60, -5, 0.1]}, [2**53, 2**60, -5, 0.1], [2**60 + 1, 1]),
    "as zod writes integers": (
        {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        [5, 9007199254740991],
        [0.5],
    ),
    "unevaluatedProperties": ({**BASE, "unevaluatedProperties": False}, [{"a": 1}], [{"a": 1, "b": 1}]),
    "uniqueItems of one": ({"type": "array", "maxItems": 1, "uniqueItems": True}, [[1]], [[1, 2]]),
    "not nothing": ({"type": "integer", "not": False}, [1], ["x"]),
}


@pytest.mark.parametrize("name", ENFORCED)
def test_what_is_enforced(name: str) -> None:
    schema, good, bad = ENFORCED[name]
    check(schema, good, bad, [])


# what validators read otherwise than people do, or does not know
OTHERS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "nullable": ({"type": "string", "nullable": True}, ["x", None], [1]),
    "nullable enum": ({"type": "string", "enum": ["a"], "nullable": True}, ["a", None], ["b"]),
    "null for not given": ({"type": "object", "properties": None, "required": None, "title": None}, [{"a": 1}], [1]),
    "old tuples": (
        {"type": "array", "items": [{"type": "null"}], "additionalItems": False},
        [[None], []],
        [[None, 1], [1]],
    ),
    "old bounds": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
    "old bounds that hold": ({"type": "integer", "maximum": 3, "exclusiveMaximum": False}, [3], [4]),
    "closed beside anyOf": (
        {"anyOf": [CAT, DOG], "additionalProperties": False},
        [{"kind": "cat"}],
        [{"kind": "cat", "x": 1}],
    ),
    "old anchor": ({"definitions": {"A": {"$id": "#foo", "type": "null"}}, "allOf": [{"$ref": "#foo"}]}, [None], [1]),
    "$recursiveRef": ({"type": "array", "items": {"$recursiveRef": "#"}}, [[[]]], [[1]]),
    "url": ({"type": "string", "format": "url"}, ["https://example.com/x"], ["x"]),
    "uuid4": ({"type": "string", "format": "uuid4"}, [str(uuid.UUID(int=5))], ["x"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_people_mean(name: str) -> None:
    schema, good, bad = OTHERS[name]
    grammar = built(schema, strict=True)
    assert ([v for v in good if not allows(grammar, v)], [v for v in bad if allows(grammar, v)]) == ([], [])


DROPPED: dict[str, tuple[Any, list[Any], list[Any], list[str]]] = {
    "uniqueItems": ({"type": "array", "uniqueItems": True, "maxItems": 2}, [[1, 1]], [1], ["uniqueItems at #"]),
    "not": (
        {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}},
        [{"a": 3}],
        [{"a": ""}],
        ["not at #/properties/a"],
    ),
    "if": (
        {
            "type": "object",
            "properties": {"k": {"enum": [1, 2]}},
            "if": {"properties": {"k": {"const": 1}}},
            "then": {"required": ["q"], "properties": {"q": {}}},
        },
        [{"k": 1, "q": 1}, {"k": 2}],
        [{"k": 3}, {"r": 1}],
        ["if at #"],
    ),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, [[1], ["x"]], [1], ["contains at #"]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{"a": 1}],
        [{"c": 1}],
        ["dependentRequired at #"],
    ),
    "dependentSchemas": (
        {"type": "object", "properties": {"a": {}}, "dependentSchemas": {"a": {"properties": {"b": {}}}}},
        [{"a": 1, "b": 1}],
        [{"c": 1}],
        ["dependentSchemas at #"],
    ),
    "overlapping oneOf": (
        {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]},
        [2, 3.5],
        ["x"],
        ["that only one of oneOf holds at #"],
    ),
    "overlapping objects": (
        {"oneOf": [BASE, {**BASE, "required": []}]},
        [{"a": 1}, {}],
        [{"b": 1}],
        ["that only one of oneOf holds at #"],
    ),
    "look-ahead": (
        {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"},
        ["1.5", "-0"],
        ["x"],
        ["look-around in pattern at #"],
    ),
    "word boundary": ({"type": "string", "pattern": "^\\babc\\b$"}, ["abc"], ["ab"], ["look-around in pattern at #"]),
    "back-reference": ({"type": "string", "pattern": "^(a|b)\\1$"}, ["aa", "zz"], [1], ["pattern at #"]),
    "patternProperties that overlap": (
        {
            "type": "object",
            "patternProperties": {"^a": {"type": "null"}, "b$": {"type": "integer"}},
            "additionalProperties": False,
        },
        [{"ab": 1}],
        [1],
        ["patternProperties at #/patternProperties/^a", "patternProperties at #/patternProperties/b$"],
    ),
    "patternProperties that look around": (
        {"additionalProperties": False, "type": "object", "patternProperties": {"^(?=a)": {"type": "null"}}},
        [{"ab": None}],
        [1],
        ["patternProperties at #/patternProperties/^(?=a)"],
    ),
    "minProperties": (
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
        [{"a": 1}],
        [{"d": 1}],
        ["minProperties at #"],
    ),
    "propertyNames otherwise": (
        {"type": "object", "propertyNames": {"maxLength": 3}},
        [{"abcd": 1}],
        [1],
        ["propertyNames at #"],
    ),
    "propertyNames beside properties": (
        {**BASE, "propertyNames": {"enum": ["a"]}, "additionalProperties": True},
        [{"a": 1, "b": 1}],
        [{}],
        ["propertyNames at #"],
    ),
    "bounds of 64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**64},
        [5],
        ["x"],
        ["minimum at #", "maximum at #"],
    ),
    "a large multiple": ({"type": "integer", "multipleOf": 999983}, [5], [0.5], ["multipleOf at #"]),
    "unevaluatedItems": (
        {"type": "array", "allOf": [{"prefixItems": [{"type": "null"}]}], "unevaluatedItems": False},
        [[None, 1]],
        [[1]],
        ["unevaluatedItems at #"],
    ),
    "nothing twice": (
        {
            "type": "array",
            "items": {"$ref": "#/$defs/S"},
            "contains": {"$ref": "#/$defs/S"},
            "$defs": {"S": {"type": "array", "uniqueItems": True}},
        },
        [[[1, 1]]],
        [[1]],
        ["contains at #", "uniqueItems at #/$defs/S"],
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_and_told_of(name: str) -> None:
    schema, good, bad, dropped = DROPPED[name]
    check(schema, good, bad, dropped)
    with pytest.raises(ConfigError) as error:
        built(schema, strict=True)
    assert all(part in str(error.value) for part in ("strict", *dropped))
    with pytest.raises(ConfigError) as same:
        built({**schema, "x-hopskip-strict": True})
    assert str(same.value) == str(error.value)


def test_formats_are_annotations() -> None:
    for name in ("path", "password", "binary", "base64url", "json-string", "uri-reference", "my-own", "credit card"):
        grammar = built({"type": "string", "format": name}, strict=True)
        assert grammar.dropped == [f"format {name!r} at #"]
        assert allows(grammar, "anything")
    assert built({"type": "integer", "format": "int64"}).dropped == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"const": 2**53 + 1}, "the number 9007199254740993 at #, which would lose digits"),
        (
            {"type": "object", "properties": {"a": {"enum": [1, [{"b": 1234567890123456789}]]}}},
            "1234567890123456789 at #/properties/a",
        ),
        ({"const": -(2**63)}, "lose digits"),
        ({"const": 2**63}, "lose digits"),
        ({"const": 10**400}, "lose digits"),
        ({"$ref": "#/$defs/nope"}, "'#/\\$defs/nope' points nowhere"),
        ({"$ref": "#/items/7", "items": {}}, "points nowhere"),
        ({"$ref": "#nope"}, "points nowhere"),
        ({"$ref": "http://example.com/x.json"}, "another document"),
        ({"$ref": 5}, "is no text"),
        ({"type": "string", "pattern": "["}, "pattern at # cannot be used: .*unclosed"),
        ({"type": "string", "pattern": 5}, "it must be a text"),
        ({"type": "integer", "minimum": "3"}, "it must be a number"),
        ({"type": "integer", "minimum": True}, "it must be a number"),
        ({"type": "colour"}, "colour"),
        ({"properties": [1]}, "properties at # are no object"),
        ({"properties": {"a": 5}}, "'5' at #/properties/a, where a schema belongs"),
        ({"anyOf": {}}, "anyOf at # is no list"),
        ({"anyOf": []}, "cannot be used"),
        ({"enum": []}, "cannot be used"),
        (False, "a JSON schema is an object"),
        ([], "a JSON schema is an object"),
    ],
)
def test_what_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(schema)


def test_schemas_inside_grammars_are_fitted_too() -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/A"}, "$defs": {"A": BASE}}
    lark = f'start: "%json {{" /%json \\{{\\}}/ x // %json {{\nx: %json {json.dumps(schema)} "!"\n'
    grammar = build(vocabulary(), "lark", lark)
    assert grammar.dropped == ["uniqueItems at #"]
    assert allows_text(grammar, '%json {%json {}[{"a": 1}]!')
    assert not allows_text(grammar, '%json {%json {}[{"a": 1, "b": 1}]!')
    with pytest.raises(ConfigError, match="strict"):
        build(vocabulary(), "lark", lark, strict=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        build(vocabulary(), "lark", "start: %json {")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^(?!a)b$", "^b$"), (r"a(?=b(c))d", "ad"), (r"(?<=x)y(?<!z)", "y"), (r"(?:a|b)(c)", r"(?:a|b)(c)"),
        (r"(?<name>a)", r"(?<name>a)"), (r"\ba\B\\b", r"a\\b"), (r"[(?!)\]\b]x", r"[(?!)\]\b]x"), (r"(?![)])x", "x"),
        (r"\(?!a\)", r"\(?!a\)"), (r"(?!\))x", "x"), ("(?!a", ""), ("[a", "[a"), ("\\", "\\"),
    ],
)  # fmt: skip
def test_patterns_without_look_around(pattern: str, expected: str) -> None:
    assert without_look_around(pattern) == expected


# -- pydantic ----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: Annotated[str, Field(min_length=1, max_length=8)]


class Node(BaseModel):
    """A tree."""

    value: int
    children: list[Node] = []


class Everything(BaseModel):
    names: set[Colour]
    by_letter: dict[Literal["x", "y"], int]
    by_colour: dict[Colour, float]
    price: decimal.Decimal
    id: uuid.UUID
    path: pathlib.Path
    pet: Annotated[Union[Cat, Dog], Field(discriminator="kind")]  # noqa: UP007
    tree: Node
    day: datetime.date
    span: datetime.timedelta
    pair: tuple[int, str]
    scores: dict[str, float]
    even: Annotated[int, Field(multiple_of=2, gt=0, lt=100)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    maybe: Cat | None = None
    secret: SecretStr = SecretStr("x")
    anything: Any = None


VALUE: dict[str, Any] = {
    "names": ["red"], "by_letter": {"y": 1}, "by_colour": {"green": 0.5}, "price": "1.50", "id": str(uuid.UUID(int=5)),
    "path": "/a", "pet": {"kind": "dog", "name": "Rex"}, "tree": {"value": 1, "children": [{"value": 2}]},
    "day": "2024-02-29", "span": "P1D", "pair": [1, "a"], "scores": {"any": 1}, "even": 4, "code": "ABC", "maybe": None,
    "secret": "x", "anything": [1],
}  # fmt: skip


def test_everything_of_pydantic() -> None:
    grammar = built(Everything.model_json_schema())
    assert Everything.model_validate_json(json.dumps(VALUE))
    assert allows(grammar, VALUE)
    for name, value in {
        "names": ["blue"], "by_letter": {"z": 1}, "by_colour": {"blue": 0.5}, "price": [], "id": "5", "path": 5,
        "pet": {"name": "Rex"}, "tree": {"value": 1, "children": [{"value": "2"}]}, "day": "today", "span": "long",
        "pair": [1], "scores": {"any": "1"}, "even": 5, "code": "abc", "maybe": {"lives": 10}, "secret": 5,
    }.items():  # fmt: skip
        assert not allows(grammar, {**VALUE, name: value}), name
    assert not allows(grammar, {**VALUE, "more": 1})
    pattern = "look-around in pattern at #/properties/price/anyOf/1"  # not every version of pydantic writes one
    assert [part for part in grammar.dropped if part != pattern] == [
        "uniqueItems at #/properties/names",
        "format 'path' at #/properties/path",
        "format 'password' at #/properties/secret",
    ]  # fmt: skip


def test_models_that_refer_to_themselves_at_the_top() -> None:
    grammar = built(Node.model_json_schema(), strict=True)
    assert allows(grammar, VALUE["tree"])
    assert not allows(grammar, {"value": 1, "children": [{}]})
