"""Tools and thoughts through the server, on random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.tool_calls import FORMATS, check, streamed_calls

from hopskip import LLM
from tests.serving import Live, live_server, tool_llm
from tests.tiny import CHAT_TEMPLATE

QUESTION = [{"role": "user", "content": "Hello"}]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "number": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "number"],
}


def tool(name: str, parameters: Any = COLOURS, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tool_llm(tmp_path_factory.mktemp("model"), max_num_seqs=2)


@pytest.fixture(scope="module")
def live(llm: LLM) -> Iterator[Live]:
    with live_server(llm) as server:
        yield server


def ask(live: Live, status: int = 200, **fields: Any) -> Any:
    with live.client() as client:
        body = {"messages": QUESTION, "max_tokens": 60, "temperature": 1, "seed": 3, **fields}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def message(live: Live, **fields: Any) -> Any:
    return ask(live, **fields)["choices"][0]["message"]


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", FORMATS)
def test_calls_parse_back_to_what_was_generated(llm: LLM, tool_format: str) -> None:
    with live_server(llm, tool_format=tool_format) as live, live.client() as client:
        found = [check(client, tool_format, seed) for seed in range(4)]
    assert [text for text in found if text] == []
    assert "" in found


@pytest.mark.parametrize("tool_format", FORMATS)
def test_calls_that_are_cut_and_named_ones(llm: LLM, tool_format: str) -> None:
    named = {"type": "function", "function": {"name": "g"}}
    request = {"tools": [tool("f"), tool("g")], "tool_choice": named}
    with live_server(llm, tool_format=tool_format) as live, live.client() as client:
        whole = message(live, max_tokens=200, **request)
        [call] = whole["tool_calls"]
        assert call["function"]["name"] == "g"
        assert json.loads(call["function"]["arguments"]).keys() == {"colour", "number"}
        assert len(call["id"]) == (9 if tool_format.startswith("mistral") else 29)
        for length in (1, 4, 9, 15):
            body = {"messages": QUESTION, "max_tokens": length, "seed": 3, **request}
            [(name, arguments)], content, reason = streamed_calls(client, body)
            assert (name, content, reason) == ("g", "", "length")
            assert call["function"]["arguments"].startswith(arguments)
        # ids that this server has given, and others, may come back
        for given in (call["id"], "call_0123456789"):
            history = [
                *QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [{**call, "id": given}]},
                {"role": "tool", "tool_call_id": given, "content": "sunny"},
            ]
            ask(live, messages=history, tools=[tool("g")])


def test_what_a_format_cannot_enforce(llm: LLM) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}}
    with live_server(llm, tool_format="qwen3-coder") as live:
        answer = ask(live, tools=[tool("f", parameters)], tool_choice="required", max_tokens=1)
        assert answer["hopskip"]["dropped"] == ["minLength at tool:f#/properties/a"]
        refused = ask(live, 400, tools=[tool("f", parameters, strict=True)], tool_choice="required")
        assert "cannot be enforced: minLength at tool:f#/properties/a" in refused["error"]["message"]
        free = ask(live, tools=[tool("f", parameters, strict=True)], max_tokens=1)
        assert "hopskip" not in free, "where nothing is to be enforced nothing is dropped"


def test_a_model_that_knows_no_tools_is_told_of_them(llm: LLM, tmp_path: Path) -> None:
    """Its template has words for chats only."""
    plain = tool_llm(tmp_path, max_num_seqs=2, chat_template=CHAT_TEMPLATE)
    with live_server(plain) as live:
        [call] = message(live, tools=[tool("f", {})], tool_choice="required", max_tokens=300)["tool_calls"][:1]
        history = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
        ]
        ask(live, messages=history)
    tools = [tool("f", {})]
    with_tools = plain.tokenizer.decode(plain.encode(QUESTION, chat_template_kwargs={"tools": tools}))
    assert json.dumps(tools[0]) in with_tools
    assert "<tool_call>" in with_tools
    knowing = llm.tokenizer.decode(llm.encode(QUESTION, chat_template_kwargs={"tools": tools}))
    assert "tool_call" not in knowing, "a template that knows tools says itself what there is to say"


def test_only_some_of_the_tools(live: Live) -> None:
    def choose(mode: str, *names: str) -> dict[str, Any]:
        named = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}

    tools = [tool("f"), tool("g"), tool("h")]
    for seed in range(3):
        calls = message(live, tools=tools, tool_choice=choose("required", "h", "g"), seed=seed, max_tokens=300)
        assert {call["function"]["name"] for call in calls["tool_calls"]} <= {"g", "h"}
    assert "tool_calls" not in message(live, tools=tools, tool_choice=choose("auto", "g"), max_tokens=5)
    refused = ask(live, 400, tools=tools, tool_choice=choose("auto", "x"))["error"]
    assert refused["message"] == "tool_choice names 'x', which is not among the tools"
    assert "there are no tools" in ask(live, 400, tool_choice=choose("required", "x"))["error"]["message"]


def test_what_is_nested_deeply(live: Live) -> None:
    def nested(depth: int) -> Any:
        schema: dict[str, Any] = {}
        for _ in range(depth - 1):
            schema = {"not": schema}
        return schema

    for choice in ("auto", "required"):
        refused = ask(live, 400, tools=[tool("f", nested(65))], tool_choice=choice)["error"]["message"]
        assert refused == "the JSON schema is nested deeper than 64 levels; flatten it"
    ask(live, tools=[tool("f", nested(64))], max_tokens=1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}
    history = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    with live.client() as client:
        answer = client.post("/v1/chat/completions", json={"messages": history, "max_tokens": 1})
    assert answer.status_code in (200, 400), answer.text


# -- thoughts ----------------------------------------------------------------------------------------------------------

THINKING = (
    CHAT_TEMPLATE.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    + "{% if tools %}{% endif %}"
)
OPENING = THINKING.replace(
    "{% if enable_thinking is false %}", "{% if enable_thinking is not false %}<think>\n{% else %}"
)
ANSWER = {"type": "json_schema", "json_schema": {"schema": COLOURS}}


@pytest.fixture(scope="module", params=[THINKING, OPENING], ids=["free", "opened"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Live]]:
    """A model that may think, or whose prompt makes it."""
    llm = tool_llm(tmp_path_factory.mktemp("thinker"), max_num_seqs=2, chat_template=request.param)
    with live_server(llm) as live:
        yield llm, live


def test_structured_output_comes_behind_the_thoughts(thinker: tuple[LLM, Live]) -> None:
    llm, live = thinker
    ids = llm.tokenizer.added_ids
    biases = {str(ids["<think>"]): 30, str(ids["</think>"]): 4}
    for wanted in ({"response_format": ANSWER}, {"tools": [tool("f")], "tool_choice": "required"}):
        answer = ask(live, max_tokens=400, logit_bias=biases, **wanted)
        told = answer["choices"][0]["message"]
        assert told["reasoning"] == told["reasoning_content"] != ""
        assert "think>" not in told["reasoning"]
        text = told["content"] if "response_format" in wanted else told["tool_calls"][0]["function"]["arguments"]
        assert json.loads(text).keys() == {"colour", "number"}
        details = answer["usage"]["completion_tokens_details"]
        assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"]
        off = ask(live, max_tokens=200, logit_bias=biases, enable_thinking=False, **wanted)
        assert "reasoning" not in off["choices"][0]["message"]
        assert off["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_thoughts_that_are_cut(thinker: tuple[LLM, Live]) -> None:
    llm, live = thinker
    ids = llm.tokenizer.added_ids
    biases = {str(ids["<think>"]): 30, str(ids["</think>"]): -100}
    answer = ask(live, max_tokens=20, logit_bias=biases, response_format=ANSWER)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 20


@pytest.mark.parametrize(
    ("fields", "is_on"),
    [
        ({}, True),
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True, "reasoning_effort": "none"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, True),
    ],
)
def test_the_switch(thinker: tuple[LLM, Live], fields: dict[str, Any], is_on: bool) -> None:
    llm, live = thinker
    expected = len(llm.encode(QUESTION, enable_thinking=is_on))
    assert ask(live, max_tokens=1, **fields)["usage"]["prompt_tokens"] == expected


def test_the_switch_where_there_is_none(live: Live) -> None:
    """Clients send it to every model; what else a template does not know is refused."""
    for fields in (
        {"enable_thinking": False},
        {"chat_template_kwargs": {"thinking": True}},
        {"reasoning_effort": "low"},
    ):
        ask(live, max_tokens=1, **fields)
    refused: dict[str, Any] = {"ponder": 1, "enable_thinking": "no", "messages": [], "tools": []}
    for wrong in ({name: value} for name, value in (refused | {"add_generation_prompt": False}).items()):
        assert "chat_template_kwargs" in ask(live, 400, chat_template_kwargs=wrong)["error"]["message"]


def test_thoughts_may_come_back(llm: LLM, tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'] + message.get('reasoning_content', '')")
    own = tool_llm(tmp_path, max_num_seqs=2, chat_template=template)
    with live_server(own) as live:
        lengths = [
            ask(live, max_tokens=1, messages=[{"role": "assistant", "content": "a", **thoughts}, *QUESTION])["usage"]
            for thoughts in ({}, {"reasoning_content": "hm"}, {"reasoning": "hm"})
        ]
    first, *others = [usage["prompt_tokens"] for usage in lengths]
    assert others == [first + len(own.tokenizer.encode("hm"))] * 2


def test_thoughts_stay_in_the_text_if_asked_to(thinker: tuple[LLM, Live]) -> None:
    llm, _ = thinker
    with live_server(llm, reasoning_format="none") as live:
        biases = {str(llm.tokenizer.added_ids["</think>"]): 4}
        told = message(live, max_tokens=60, logit_bias=biases)
    assert "reasoning" not in told
    assert "</think>" in told["content"]
