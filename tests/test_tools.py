"""Tool calls in the formats of models: read however the text arrives, written, and told of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks.tool_calls import FORMATS as NAMES
from benchmarks.tool_calls import MARKS

from hopskip.errors import ConfigError
from hopskip.text.grammar_build import build, read_vocabulary
from hopskip.text.tools.base import Calls, Marks, Tool, joined
from hopskip.text.tools.formats import FORMATS, format_of_template
from hopskip.text.tools.prompt import needs_prompt, system_into_user, with_tools
from hopskip.text.tools.reader import CallReader
from hopskip.text.tools.typed import argument, is_text, types_of
from tests.tiny import VOCAB_SIZE, byte_level_tokenizer

PROPERTIES: dict[str, Any] = {
    "a": {"type": "string"},
    "n": {"type": "integer"},
    "o": {"type": "object"},
    "s": {"type": ["string", "null"]},
}
TOOLS = [Tool(name="f", parameters={"type": "object", "properties": PROPERTIES}), Tool(name="get.weather-x")]
Read = tuple[str, list[tuple[str | None, str]]]


def read(name: str, text: str, size: int = 1000, *, is_cut: bool = False, **options: Any) -> Read:
    reader = CallReader(FORMATS[name], TOOLS, **options)
    deltas = [reader.push(text[i : i + size]) for i in range(0, len(text), size)]
    whole = joined([*deltas, reader.finish(is_cut=is_cut)])
    return whole.content, [(call.name, call.arguments) for call in whole.calls]


def read_in_pieces(name: str, text: str, **options: Any) -> Read:
    """However the text arrives it reads the same."""
    found = read(name, text, **options)
    for size in (1, 2, 3, 7):
        assert read(name, text, size, **options) == found, size
    return found


# -- what is a call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("before", "behind"), [("", ""), ("so:\n", "\n bye"), ("{x} (", "")])
def test_what_is_written_is_read(name: str, before: str, behind: str) -> None:
    """Strings may hold every mark, quote, bracket and language."""
    strings = [mark for mark in MARKS if name != "qwen3-coder" or mark != "</parameter>"]
    arguments = {"a": " ".join(strings), "n": 3, "o": {"x": [1.5, None, True, strings]}}
    for calls in ([("f", arguments)], [("f", arguments), ("get.weather-x", {}), ("f", {})]):
        text = FORMATS[name].write(calls)
        content, found = read_in_pieces(name, before + text + behind)
        assert [(called, json.loads(given)) for called, given in found] == calls
        assert content.split() == (before + behind).split()


HERMES = [
    ("no call", "no call", []),
    ("  \n", "  \n", []),
    ("a  ", "a  ", []),
    ("<tool_ca", "<tool_ca", []),
    ("use <tool_call> now", "use <tool_call> now", []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    ('<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>', []),
    ('so: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "so:", [("f", '{"a": 1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":[1,{"b":-0.5e+1}]}}</tool_call>\nand', "and",
     [("f", '{"a":[1,{"b":-0.5e+1}]}')]),
    ('a <tool_call>{"name":"f","arguments":{}}</tool_call>\nb', "a b", [("f", "{}")]),
    # another name, arguments before it, in a string, or none
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [("other", "{}")]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "", [("f", '"x"')]),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [("f", "[1]")]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"id": "x", "type": "function", "name": "f", "parameters": {"a": 1}, "arguments": {}}</tool_call>', "",
     [("f", '{"a": 1}')]),
    # not quite right
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>x', "x", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>x', "x", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {}, nonsense}</tool_call>', "nonsense}</tool_call>", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": \'x\'}}</tool_call>y', "y", [("f", '{"a": \'x\'}}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>', "", [("f", '{"a": 01}}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": "x\ny\\d\t"}}</tool_call>', "", [("f", '{"a": "x\\ny\\\\d\\t"}')]),
    ('<tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>", [("f", "{}")]),
    # without marks, where it names a tool
    ('{"name": "f", "arguments": {"a": "}"}} tail', "tail", [("f", '{"a": "}"}')]),
    ('[{"name": "f", "arguments": {}},\n {"name": "f", "parameters": {"a": 1}}]', "", [("f", "{}"), ("f", '{"a": 1}')]),
    ('{"type": "function", "function": {"name": "f", "arguments": {"a": 2}}}', "", [("f", '{"a": 2}')]),
    ('{"name": "f", "arguments": {}}\n</tool_call> and', "and", [("f", "{}")]),
    ('{"name": "g", "arguments": {}}', '{"name": "g", "arguments": {}}', []),
    ('{"name": "f"}', '{"name": "f"}', []),
    ('{"city": "f", "name": "f", "arguments": {}}', '{"city": "f", "name": "f", "arguments": {}}', []),
    ("[link](x) {1} { [", "[link](x) {1} { [", []),
    # as Qwen3-Coder's, where a fine-tune writes so
    ("<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>", "", [("f", '{"a": "x"}')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), HERMES)
def test_hermes(text: str, content: str, calls: Any) -> None:
    assert read_in_pieces("hermes", text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {}} ok', "ok",
         [("f", '{"a": 1}'), ("f", "{}")]),
        ('<|python_tag|>{"name": "u", "parameters": {}}', "", [("u", "{}")]),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ('<function=f>{"a": "</function>"}</function> done', "done", [("f", '{"a": "</function>"}')]),
        ("<function=f>{bad}</function> done", "done", [("f", "{bad}")]),
        ('<function=f> {"a": 1}', "", [("f", '{"a": 1}')]),
        ("<function=no name>", "<function=no name>", []),
        ("<function=f>text", "<function=f>text", []),
    ],
)  # fmt: skip
def test_llama3(text: str, content: str, calls: Any) -> None:
    assert read_in_pieces("llama3", text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {}},\n {"name": "u", "arguments": {"b": []}}] x', "x",
         [("f", "{}"), ("u", '{"b": []}')]),
        ('[TOOL_CALLS]{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('a [TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": 1}[TOOL_CALLS]f{"a": 2}', "a",
         [("f", '{"a": 1}'), ("f", '{"a": 2}')]),
        ("[TOOL_CALLS]f[ARGS]{bad}[TOOL_CALLS]f[ARGS]{}", "", [("f", "{bad}"), ("f", "{}")]),
        ('[{"name": "f", "arguments": {"a": "]"}}]', "", [("f", '{"a": "]"}')]),
        ("[TOOL_CALLS] no name here", "[TOOL_CALLS] no name here", []),
        ("[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    ],
)  # fmt: skip
def test_mistral(text: str, content: str, calls: Any) -> None:
    assert read_in_pieces("mistral", text) == read_in_pieces("mistral-args", text) == (content, calls)


CODER = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ("", "{}"),
        ("<parameter=a>\nx\n</parameter>\n", '{"a": "x"}'),
        ("<parameter=a>x</parameter><parameter=n>5</parameter>", '{"a": "x", "n": 5}'),
        ("<parameter=a>\n\nx\n\n</parameter>\n", '{"a": "\\nx\\n"}'),
        ("<parameter=a>\n5\n</parameter>\n", '{"a": "5"}'),
        ("<parameter=a>\n</parameter>\n", '{"a": ""}'),
        ("<parameter=a>\n</parameter> <\n</parameter>\n", '{"a": "</parameter> <"}'),
        ('<parameter=o>\n{"x": "é"}\n</parameter>\n', '{"o": {"x": "é"}}'),
        ("<parameter=n>\nfive\n</parameter>\n", '{"n": "five"}'),
        ("<parameter=s>\nNone\n</parameter>\n<parameter=s>\nx\n</parameter>\n", '{"s": null, "s": "x"}'),
        ("<parameter=other>\n[1]\n</parameter>\n", '{"other": "[1]"}'),
    ],
)
def test_qwen3_coder(parameters: str, arguments: str) -> None:
    assert read_in_pieces("qwen3-coder", CODER.format(parameters) + " ok") == ("ok", [("f", arguments)])
    assert read_in_pieces("qwen3-coder", f"<function=f>{parameters}</function>") == ("", [("f", arguments)])


def test_qwen3_coder_ends_what_the_model_leaves_open() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\nx"
    assert read("qwen3-coder", text) == ("", [("f", '{"a": "x"}')])
    assert read("qwen3-coder", f"{text}\n</parameter>\n") == ("", [("f", '{"a": "x"}')])
    assert read("qwen3-coder", text, is_cut=True) == ("", [("f", '{"a": "x')])


# -- as it comes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_as_they_are_written(name: str) -> None:
    """With one character each step gives one more, but for what may be a mark."""
    text = FORMATS[name].write([("f", {"a": "x" * 100})])
    reader = CallReader(FORMATS[name], TOOLS)
    deltas = [call for char in text for call in reader.push(char).calls]
    assert deltas[0].name == "f"
    assert deltas[0].id
    assert [(call.index, call.id, call.name) for call in deltas[1:]] == [(0, None, None)] * (len(deltas) - 1)
    assert len(deltas) >= 100


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_is_a_part_of_a_call(name: str) -> None:
    """At no place are marks taken for text, and where a grammar makes the calls nothing is."""
    whole = {"a": "xyz", "n": 1}
    text = FORMATS[name].write([("f", whole)])
    full = read(name, text)[1][0][1]
    for end in range(len(text)):
        content, calls = read_in_pieces(name, text[:end], is_cut=True)
        assert not any(mark in content for mark in FORMATS[name].openings)
        assert all(called == "f" and full.startswith(given) for called, given in calls)
        content, calls = read_in_pieces(name, text[:end], is_cut=True, is_certain=True)
        assert not content
        assert all(called == "f" and full.startswith(given) for called, given in calls)
    one = [Tool(name="f", parameters=TOOLS[0].parameters)]
    reader = CallReader(FORMATS[name], one, is_certain=True)
    assert [call.name for call in reader.finish(is_cut=True).calls] == ["f"], "there is only this one to be called"


def test_the_name_that_is_cut() -> None:
    def names(text: str, **options: Any) -> tuple[str, list[str | None]]:
        content, calls = read("hermes", text, is_cut=True, **options)
        return content, [called for called, _ in calls]

    assert names('<tool_call>{"name": "ge') == ("", ["get.weather-x"])
    assert names('<tool_call>{"name": "u') == ("", [])
    assert names('<tool_call>{"name": "f"') == ("", ["f"])
    assert names('{"name": "ge') == ("", ["get.weather-x"])
    assert names('{"name": "u') == ('{"name": "u', [])
    assert names("{") == ("{", [])
    assert names("{", is_certain=True) == ("", [])
    first = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert names(f'{first}\n<tool_call>{{"name": "f', is_certain=True) == ("", ["f", "f"])
    assert names(f"{first}\n<tool_ca", is_certain=True) == ("", ["f"])
    assert read("hermes", '<tool_call>{"name": "f') == ('<tool_call>{"name": "f', []), "the model has ended it so"


def test_one_call_only() -> None:
    text = FORMATS["hermes"].write([("f", {"a": "1"}), ("f", {"a": "2"})])
    assert read_in_pieces("hermes", text, parallel=False) == ("", [("f", '{"a": "1"}')])


def test_marks_that_texts_do_not_show() -> None:
    hidden = frozenset(["[TOOL_CALLS]"])
    assert read_in_pieces("mistral", "a [TOOL_CALLS] no name", hidden=hidden) == ("a  no name", [])


def test_little_is_held() -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    for _ in range(100):
        assert reader.push("four").content == "four"
    assert reader.push(" <tool").content == ""
    assert reader.push("s> ").content == " <tools>"


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_ids() -> None:
    assert FORMATS["hermes"].new_id().startswith("call_")
    ids = {FORMATS["mistral"].new_id() for _ in range(20)}
    assert len(ids) == 20
    assert all(len(name) == 9 and name.isascii() and name.isalnum() for name in ids)
    reader = CallReader(FORMATS["mistral"], TOOLS)
    assert reader.push("[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}").calls[0].id == "abc123XYZ"
    reader = CallReader(FORMATS["mistral"], TOOLS)
    assert len(reader.push("[TOOL_CALLS]f[CALL_ID]no[ARGS]{}").calls[0].id or "") == 9


def test_ids_of_others_become_such_as_mistral_takes() -> None:
    def ids(name: str, given: str) -> tuple[str, str]:
        call = {"id": given, "type": "function", "function": {"name": "f", "arguments": {}}}
        history: list[dict[str, Any]] = [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": given, "content": "x"},
        ]
        asked, answered = FORMATS[name].history(history)
        return asked["tool_calls"][0]["id"], answered["tool_call_id"]

    assert ids("mistral", "abc123XYZ") == ("abc123XYZ", "abc123XYZ")
    asked, answered = ids("mistral-args", "call_0123456789abcdef")
    assert asked == answered
    assert len(asked) == 9
    assert asked.isalnum()
    assert ids("mistral", "call_0123456789abcdeg")[0] != asked
    assert ids("hermes", "call_1") == ("call_1", "call_1")
    assert FORMATS["mistral"].history([{"role": "assistant", "tool_calls": [{"function": {}}]}])


# -- which format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call> <function= <parameter=", "qwen3-coder"),
        ("<tool_call> <function=", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS] [ARGS]", "mistral-args"),
        ('{"name": ..., "parameters": ...}', "llama3"),
        ("<|python_tag|>", "llama3"),
        ("anything", "json"),
    ],
)
def test_the_template_says_which(template: str, name: str) -> None:
    assert format_of_template(template, True).name == name
    assert format_of_template(template, False).name == "hermes"


# -- templates without tools -------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}


def test_tools_in_the_words_of_a_chat() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "so", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "cold"},
        {"role": "tool", "tool_call_id": "1", "content": "warm"},
        {"role": "assistant", "content": "ok"},
    ]
    assert needs_prompt(messages, None)
    assert needs_prompt(messages[:2], [{}])
    assert not needs_prompt(messages[:2], [])
    told = with_tools(messages, [{"type": "function", "function": {"name": "f"}}], FORMATS["hermes"])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "assistant"]
    system = told[0]["content"]
    assert system.startswith("Be kind.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in system
    assert system.endswith(FORMATS["hermes"].example)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert told[2] == {"role": "assistant", "content": f"so\n{call}\n{call}"}
    results = "<tool_response>\ncold\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert told[3] == {"role": "user", "content": results}
    assert with_tools(messages[1:2], None, FORMATS["hermes"]) == messages[1:2]
    assert with_tools(messages[1:2], [{}], FORMATS["llama3"])[0]["role"] == "system"
    silent = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert with_tools([silent], None, FORMATS["json"]) == [
        {"role": "assistant", "content": '{"name": "f", "arguments": {"a": "é"}}'}
    ]


def test_templates_that_refuse_a_system_message() -> None:
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    assert system_into_user([system, user, user]) == [{"role": "user", "content": "a\n\nb"}, user]
    assert system_into_user([user, system]) == [user, system]
    assert system_into_user([system]) == [system]


# -- arguments as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        (None, set()),
        ({}, set()),
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "null"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "number"}, {"oneOf": [{"type": "array"}]}]}, {"number", "array"}),
        ({"$ref": "#/$defs/A"}, {"object"}),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"$ref": "other"}, set()),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"type": 7, "enum": 8, "anyOf": 9}, set()),
    ],
)
def test_types(schema: Any, types: set[str]) -> None:
    root = {"$defs": {"A": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}}
    assert types_of(schema, root) == types
    assert is_text({"properties": {"k": schema}, **root}, "k") == (types <= {"string"})
    assert is_text({"properties": []}, "k")


def test_schemas_that_lead_everywhere() -> None:
    """Every reference is followed once: their number is no exponent."""
    loop = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}] * 50}
    root = {"$defs": {"A": loop, "B": {"oneOf": [{"type": "null"}, loop]}}}
    assert types_of(loop, root) == {"null"}
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"anyOf": [deep]}
    assert types_of(deep, {}) == set()


@pytest.mark.parametrize(
    ("types", "text", "expected"),
    [
        (["integer"], "5", "5"),
        (["integer"], " 5.0 ", "5.0"),
        (["number"], "5", "5"),
        (["integer"], "true", '"true"'),
        (["boolean"], "True", "true"),
        (["boolean"], "FALSE", "false"),
        (["null", "string"], "None", "null"),
        (["null", "string"], '"x"', '"\\"x\\""'),
        (["object"], '{"a": NaN}', '"{\\"a\\": NaN}"'),
        (["array"], "[1, 2]", "[1, 2]"),
        (["array"], "[" * 9999, json.dumps("[" * 9999)),
    ],
)
def test_arguments(types: list[str], text: str, expected: str) -> None:
    assert argument(text, {"properties": {"k": {"type": types}}}, "k") == expected


# -- grammars ----------------------------------------------------------------------------------------------------------


def test_what_qwen3_coder_cannot_write() -> None:
    coder = FORMATS["qwen3-coder"]

    def grammar(schema: Any, required: Any = ("k",), key: str = "k") -> str:
        tool = Tool(name="f", parameters={"properties": {key: schema}, "required": list(required)})
        return coder.grammar([tool], Marks({}), parallel=False)

    good, bad = "a\n</parameter>", "x\n</parameter>\n</function>"
    lark = grammar({"enum": [good, bad]})
    assert json.dumps(good) in lark
    assert json.dumps(bad) not in lark
    for schema, key in (({"enum": [bad]}, "k"), ({"type": "string"}, "a>b"), ({"type": "string"}, " k")):
        with pytest.raises(ConfigError, match=f"cannot hold {key!r} of f; change its schema"):
            grammar(schema, (key,), key)
        assert key not in grammar(schema, (), key)
    large = {
        "properties": {f"k{i}": {"$ref": "#/$defs/L"} for i in range(40)},
        "$defs": {"L": {"enum": [1, "x" * 9000]}},
    }
    with pytest.raises(ConfigError, match="the schema of f is too large"):
        coder.grammar([Tool(name="f", parameters=large)], Marks({}), parallel=False)
    strings = {"type": "string", "pattern": "x", "minLength": 2}
    tool = Tool(name="f", parameters={"properties": {"k": strings, "n": {"type": "integer", "minimum": 1}}})
    assert coder.unenforced(tool) == ["pattern at tool:f#/properties/k", "minLength at tool:f#/properties/k"]
    assert FORMATS["hermes"].unenforced(tool) == []


REFERRING = {
    "$ref": "#/$defs/P",
    "$defs": {
        "P": {
            "properties": {
                "a": {"$ref": "#/$defs/E"},
                "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "e": {"anyOf": [{"$ref": "#/$defs/E"}, {"type": "null"}]},
            }
        },
        "E": {"enum": ["x", "y"]},
    },
}
ODD_KEYS = {
    "properties": {"é-ключ.1": {"type": "integer"}, "a~b/c": {"type": "array", "items": {"$ref": "#/$defs/E"}}},
    "$defs": {"E": {"enum": [1]}},
    "required": ["é-ключ.1", "a~b/c"],
}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, [{}, {"q": "hello"}], []),
        ({"properties": {}, "additionalProperties": False}, [{}], [{"q": "hello"}]),
        (
            REFERRING,
            [{}, {"a": "x"}, {"a": "y", "b": 5}, {"b": None}, {"e": "x"}, {"e": None}],
            [{"a": "z"}, {"b": "five"}, {"c": "x"}, {"e": "z"}],
        ),
        (ODD_KEYS, [{"é-ключ.1": 5, "a~b/c": [1]}], [{"é-ключ.1": 5}, {"é-ключ.1": 5, "a~b/c": [2]}]),
    ],
)
def test_the_grammar_of_qwen3_coder(parameters: Any, good: list[Any], bad: list[Any]) -> None:
    coder, inner = FORMATS["qwen3-coder"], byte_level_tokenizer(marks=("<tool_call>", "</tool_call>"))
    marks = Marks({token.content: index for index, token in inner.get_added_tokens_decoder().items()})
    lark = coder.grammar([Tool(name="f", parameters=parameters)], marks, parallel=False)
    built = build(read_vocabulary(inner.to_str(), VOCAB_SIZE, [1]), "lark", lark)

    def takes(arguments: Any) -> bool:
        matcher = built.matcher.deep_copy()
        ids = inner.encode(coder.write([("f", arguments)]), add_special_tokens=False).ids
        return all(matcher.consume_token(token) for token in ids) and bool(matcher.is_accepting())

    assert [arguments for arguments in good if not takes(arguments)] == []
    assert [arguments for arguments in bad if takes(arguments)] == []


def test_deltas_of_a_call_are_joined() -> None:
    calls = Calls(TOOLS, lambda: "id", limit=1)
    calls.begin("f", "{")
    calls.add("")
    calls.add("}")
    calls.begin("g")
    calls.add("{}")
    assert [(call.index, call.id, call.name, call.arguments) for call in calls.take()] == [(0, "id", "f", "{}")]
    assert calls.take() == []
    assert calls.num_begun == 2
