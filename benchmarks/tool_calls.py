"""Tool calls parse back to what was generated, in every format, streamed and whole.

    python -m benchmarks.tool_calls                        # 500 answers a format, random weights: some minutes
    python -m benchmarks.tool_calls --num-answers 50 --formats hermes,mistral

A model with random weights answers under `tool_choice: required`. Its arguments hold strings with the marks of all
formats, quotes, brackets and many languages, and whatever else it writes. What the server gives out as calls is set
beside a plain reading of the whole text, which shares no code with the server's. The last thing printed is one JSON
object; the exit code is 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx

FORMATS = ("hermes", "llama3", "json", "mistral", "mistral-args", "qwen3-coder")
MARKS = (
    *("<tool_call>", "</tool_call>", '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "[TOOL_CALLS]"),
    *("[TOOL_CALLS]g[ARGS]{}", '[{"name": "g"}]', "<|python_tag|>", '<function=g>{"a": 1}</function>', "</function>"),
    *(
        "<parameter=a>",
        "</parameter>",
        "<think>",
        "</think>",
        "<|im_end|>",
        '"',
        '\\"',
        "\\",
        "\\u0041",
        "{",
        "}}",
        "]",
    ),
    *(
        "[[",
        "'",
        "`",
        "\n",
        "\r\n\t",
        " a ",
        "",
        "é ü ß",
        "漢字かな",
        "Привет",
        "שלום",
        "हिन्दी",
        "🙂🚀",
        "\u2028",
        "null",
        "5",
    ),
)
_TEXT = {"anyOf": [{"enum": list(MARKS)}, {"type": "string", "maxLength": 12}]}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mark": {"enum": list(MARKS)},
        "number": {"type": "integer", "minimum": -99, "maximum": 99},
        "several": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 4},
        "deep": {"type": "object", "properties": {"a": _TEXT, "b": {"$ref": "#/$defs/Deep"}}, "required": ["a"]},
        "flag": {"type": ["boolean", "null"]},
    },
    "required": ["mark", "number", "several"],
    "$defs": {"Deep": {"type": "object", "properties": {"x": _TEXT}, "required": ["x"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("f", "get.weather-now_2")
]


def body_of(seed: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Call something."}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": seed % 2 == 0,
        "temperature": 1.0,
        "max_tokens": 600,
        "seed": seed,
        "return_tokens": "origins",
    }


# -- a plain reading of the whole text ---------------------------------------------------------------------------------


def expected_calls(tool_format: str, text: str) -> list[tuple[str, Any]]:
    """The calls that a whole text stands for."""
    if tool_format in ("hermes", "llama3", "json"):
        return [_from_object(value) for value in _objects(text, "<tool_call>\n", "\n</tool_call>")]
    if tool_format == "mistral":
        return [_from_object(value) for value in json.loads(text.removeprefix("[TOOL_CALLS]"))]
    if tool_format == "mistral-args":
        return list(_with_marks(text))
    calls = re.split(r"(?<=</tool_call>)\n(?=<tool_call>\n<function=)", text)
    return [_tagged(call) for call in calls]


def _objects(text: str, opening: str, closing: str) -> Iterator[Any]:
    while text := text.removeprefix("\n"):
        value, end = json.JSONDecoder().raw_decode(text.removeprefix(opening))
        text = text.removeprefix(opening)[end:].removeprefix(closing)
        yield value


def _from_object(value: dict[str, Any]) -> tuple[str, Any]:
    return value["name"], value.get("arguments", value.get("parameters"))


def _with_marks(text: str) -> Iterator[tuple[str, Any]]:
    while text:
        name, rest = text.removeprefix("[TOOL_CALLS]").split("[ARGS]", 1)
        value, end = json.JSONDecoder().raw_decode(rest)
        text = rest[end:]
        yield name, value


def _tagged(text: str) -> tuple[str, Any]:
    found = re.fullmatch(r"<tool_call>\n<function=([^>]+)>\n(.*)</function>\n</tool_call>", text, re.DOTALL)
    assert found is not None, text
    arguments: dict[str, Any] = {}
    for key, value in re.findall(
        r"<parameter=(\w+)>\n(.*?)\n</parameter>\n(?=<parameter=(?:mark|number|several|deep|flag)>|\Z)",
        found[2],
        re.DOTALL,
    ):
        arguments[key] = value if key == "mark" else json.loads(value)
    return found[1], arguments


# -- what the server gives out -----------------------------------------------------------------------------------------


def check(client: httpx.Client, tool_format: str, seed: int) -> str | None:
    """Ask once for the whole answer and once for a stream. None if the text was cut, else what is wrong (nothing)."""
    whole = client.post("/v1/chat/completions", json=body_of(seed))
    assert whole.status_code == 200, whole.text
    choice = whole.json()["choices"][0]
    text = "".join(token["text"] for token in choice["hopskip"]["tokens"])
    streamed = streamed_calls(client, body_of(seed))
    got = [
        (call["function"]["name"], call["function"]["arguments"]) for call in choice["message"].get("tool_calls", [])
    ]
    if streamed != (got, choice["message"]["content"] or "", choice["finish_reason"]):
        return f"whole {got!r} and stream {streamed!r} differ"
    if choice["message"]["content"]:
        return f"content {choice['message']['content']!r} beside {text!r}"
    if choice["finish_reason"] == "length":
        return None
    expected = expected_calls(tool_format, text)
    if [(name, json.loads(arguments)) for name, arguments in got] != expected:
        return f"calls {got!r}, but {text!r} was generated"
    return ""


def streamed_calls(client: httpx.Client, body: dict[str, Any]) -> tuple[list[tuple[str, str]], str, str]:
    """Calls, content and finish reason of a stream."""
    calls: list[tuple[str, str]] = []
    content, reason = "", ""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            content += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", []):
                function = call["function"]
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append((function["name"], ""))
                assert call["index"] == len(calls) - 1
                calls[-1] = calls[-1][0], calls[-1][1] + function["arguments"]
    return calls, content, reason


def main() -> None:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from tests.serving import live_server, tool_llm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-answers", type=int, default=500, help="of each format")
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"num_answers": arguments.num_answers, "formats": {}}
    with TemporaryDirectory() as folder:
        llm = tool_llm(Path(folder), max_num_seqs=2)
        for tool_format in arguments.formats.split(","):
            with live_server(llm, tool_format=tool_format) as live, live.client() as client:
                found = [check(client, tool_format, seed) for seed in range(arguments.num_answers)]
            wrong = [text for text in found if text]
            counts = {"same": found.count(""), "cut": found.count(None), "wrong": len(wrong)}
            result["formats"][tool_format] = counts
            print(tool_format, counts, *wrong[:3], sep="\n  ", flush=True)
    print(json.dumps(result))
    sys.exit(any(counts["wrong"] for counts in result["formats"].values()))


if __name__ == "__main__":
    main()
