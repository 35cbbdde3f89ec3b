"""Qwen3-Coder's format: a tag for the function and one for each argument, whose values are plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, ClassVar
from urllib.parse import quote

from hopskip.errors import ConfigError
from hopskip.text.json_schema import STRICT
from hopskip.text.tools.base import Calls, Marks, Tool, ToolFormat, literal, to_json
from hopskip.text.tools.function_tag import FunctionTag, TaggedCall
from hopskip.text.tools.schemas import arguments_schema
from hopskip.text.tools.typed import is_text, property_of, resolve, types_of

_OPENING, _CLOSING, _FUNCTION = "<tool_call>", "</tool_call>", "<function="
_END_FUNCTION, _END_PARAMETER = "</function>", "</parameter>"
_LINE = "\n"
_KEY = re.compile(r"[^\s<>]([^\n<>]*[^\s<>])?")
_OF_TEXTS = ("pattern", "format", "minLength", "maxLength")
"""Keywords of strings, which a grammar cannot hold beside the mark that ends them."""
_DEEPEST = 16
_MOST_CHARS = 2**18
"""Of the schema of one tool with the rules for it, which may say the schema once for every argument."""


class Qwen3Coder(ToolFormat):
    name = "qwen3-coder"
    openings: ClassVar = {_OPENING: TaggedCall, _FUNCTION: FunctionTag}
    marks = (_OPENING, _CLOSING)
    example = (
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter>\nvalue\n</parameter>\n"
        "</function>\n</tool_call>"
    )

    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        more = r' ("\n" one)*' if parallel else ""
        names = " | ".join(f"f{i}" for i in range(len(tools)))
        rules = "".join(_rules(tool, f"f{i}", marks) for i, tool in enumerate(tools))
        one = f'{marks.lark(_OPENING)} "\\n" ({names}) "\\n" {marks.lark(_CLOSING)}'
        return f"start: one{more}\none: {one}\n{rules}"

    def unenforced(self, tool: Tool) -> list[str]:
        tool = _resolved(tool)
        return [
            f"{keyword} at tool:{tool.name}#/properties/{key}"
            for key, schema in _properties(tool).items()
            if isinstance(schema, Mapping)
            and is_text(tool.parameters, key)
            and not _choices(schema, tool.parameters, set())
            for keyword in _OF_TEXTS
            if schema.get(keyword) is not None
        ]

    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(_write(name, arguments) for name, arguments in calls)


def _write(name: str, arguments: Mapping[str, Any]) -> str:
    values = {key: value if isinstance(value, str) else to_json(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def _rules(tool: Tool, rule: str, marks: Marks) -> str:
    """Of a call of this tool: its parameters in the schema's order, optional ones or not."""
    tool = _resolved(tool)
    properties, required = _properties(tool), tool.parameters.get("required")
    required = required if isinstance(required, list) else []
    parts, rules, size = [], [], len(to_json(tool.parameters))
    for index, key in enumerate(properties):
        if size > _MOST_CHARS:
            raise ConfigError(f"the schema of {tool.name} is too large for calls in qwen3-coder's format")
        name = f"{rule}_{index}"
        value = _value(tool, key, name, marks) if _KEY.fullmatch(key) else None
        if value is not None:
            parts.append(name if key in required else f"{name}?")
            rules.append(f"{name}: {literal(f'<parameter={key}>{_LINE}')} {value[0]} {literal(_LINE)}\n{value[1]}")
            size += len(rules[-1])
        elif key in required:
            raise ConfigError(f"calls in qwen3-coder's format cannot hold {key!r} of {tool.name}; change its schema")
    if not properties and tool.parameters.get("additionalProperties") is not False:
        value = marks.text_until(_END_PARAMETER, f"{rule}_text")
        parts.append(f"{rule}_any*")
        rules.append(f'{rule}_any: "<parameter=" /[a-zA-Z_]{{1,64}}/ ">\\n" {value[0]} "\\n"\n{value[1]}')
    begin = literal(f"<function={tool.name}>{_LINE}")
    return f"{rule}: {begin} {' '.join(parts)} {literal(_END_FUNCTION)}\n{''.join(rules)}"


def _value(tool: Tool, key: str, rule: str, marks: Marks) -> tuple[str, str] | None:
    """Of an argument with the mark behind it: an expression, and the rules that it needs. None if no value can be
    written."""
    schema = property_of(tool.parameters, key)
    end = f"{literal(_LINE)} {marks.lark(_END_PARAMETER)}"
    choices = _choices(schema, tool.parameters, set())
    if choices:
        is_plain = is_text(tool.parameters, key)
        texts = [_text_of(value) for value in choices if is_plain or _comes_back(tool, key, value)]
        texts = [text for text in texts if _END_PARAMETER not in text or _comes_back(tool, key, text)]
        return (f"({' | '.join(literal(text) for text in texts)}) {end}", "") if texts else None
    if "string" in types_of(schema, tool.parameters) or is_text(tool.parameters, key):
        return marks.text_until(_END_PARAMETER, f"{rule}_text")
    pointer = quote(key.replace("~", "~0").replace("/", "~1"))
    if isinstance(schema, Mapping) and '"$ref"' not in to_json(schema):
        address = f"tool:{tool.name}/properties/{pointer}"
        inside = {"$id": address, **schema, **({STRICT: True} if tool.strict else {})}
    else:
        inside = {"$ref": f"tool:{tool.name}#/properties/{pointer}", "$defs": {"tool": arguments_schema(tool)}}
    return f"{rule}_json {end}", f"{rule}_json: %json {to_json(inside)}\n"


def _choices(schema: Any, root: Mapping[str, Any], seen: set[str]) -> list[Any]:
    """The values that an argument may have, if they are listed; none if there are others. Each reference is followed
    once, so that no schema takes long."""
    if not isinstance(schema, Mapping):
        return []
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            return []
        seen.add(reference)
        return _choices(resolve(reference, root), root, seen)
    if schema.get("type") == "null":
        return [None]
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            found = [_choices(part, root, seen) for part in parts]
            return [value for values in found for value in values] if all(found) else []
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    is_listed = isinstance(listed, list) and any(isinstance(value, str) for value in listed)
    return listed if is_listed and listed else []


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _comes_back(tool: Tool, key: str, value: Any) -> bool:
    """True if an argument can be read again: not all texts can that hold marks of this format."""
    calls = Calls([tool], lambda: "")
    written = f"{tool.name}>\n<parameter={key}>\n{_text_of(value)}\n{_END_PARAMETER}\n{_END_FUNCTION}\n"
    FunctionTag(calls).read(written, 0)
    return [delta.arguments for delta in calls.take()] == [to_json({key: value})]


def _resolved(tool: Tool) -> Tool:
    """The tool with the schema that a reference at the top stands for."""
    parameters: Any = tool.parameters
    for _ in range(_DEEPEST):
        if not isinstance(parameters.get("$ref"), str):
            break
        target = resolve(parameters["$ref"], tool.parameters)
        parameters = {**tool.parameters, "$ref": None, **(target if isinstance(target, Mapping) else {})}
    return Tool(name=tool.name, parameters=parameters, strict=tool.strict)


def _properties(tool: Tool) -> Mapping[str, Any]:
    properties = tool.parameters.get("properties")
    return properties if isinstance(properties, Mapping) else {}
