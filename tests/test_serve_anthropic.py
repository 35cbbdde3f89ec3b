"""Anthropic's Messages API, by hand: the shapes that its clients read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from hopskip import LLM
from hopskip.serve.anthropic import schema
from hopskip.serve.anthropic.answer import MessageAnswer
from hopskip.serve.anthropic.translate import translate
from hopskip.serve.engine_thread import GenerationError, UnavailableError
from hopskip.serve.settings import Limits
from tests.serving import MODEL, Live, live_server

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "weather", "description": "Of a city", "input_schema": CITY}
HI: list[Any] = [{"role": "user", "content": "Hi there"}]
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0, "messages": HI}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client(headers={"anthropic-version": "2023-06-01", "anthropic-beta": "any-2025-01-01"}) as client:
        yield client


def message(client: httpx.Client, **asked: Any) -> Any:
    response = client.post("/v1/messages", json={**ASKED, **asked})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, **asked: Any) -> list[Any]:
    with client.stream("POST", "/v1/messages", json={**ASKED, **asked, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def chat(client: httpx.Client, messages: list[Any], **asked: Any) -> Any:
    """What the chat route answers, which is what this one must answer."""
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, **asked}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_is_the_chats(client: httpx.Client) -> None:
    expected = chat(client, HI)
    answer = message(client)
    assert answer.pop("id").startswith("msg_")
    usage = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": expected["choices"][0]["message"]["content"]}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
    }
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
    assert usage["cache_read_input_tokens"] > 0
    assert (usage["output_tokens"], usage["cache_creation_input_tokens"]) == (12, 0)


def test_blocks_are_messages(client: httpx.Client) -> None:
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "?"},
                {"type": "text", "text": "Wait"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "Snow", "is_error": True},
                {"type": "text", "text": "So?"},
                {
                    "type": "document",
                    "title": "Map",
                    "source": {"type": "text", "data": "Here", "media_type": "text/plain"},
                },
            ],
        },
    ]
    system = [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."}]
    function = {"name": "weather", "description": "Of a city", "parameters": CITY}
    calls = [
        {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for id, city in (("t1", "Rome"), ("t2", "Oslo"))
    ]
    expected = chat(
        client,
        [
            {"role": "system", "content": "Be kind.\nBe brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Wait", "tool_calls": calls, "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "t1", "content": "Rain"},
            {"role": "tool", "tool_call_id": "t2", "content": "Snow"},
            {"role": "user", "content": "So?\nMap\nHere"},
        ],
        tools=[{"type": "function", "function": function}],
    )
    answer = message(client, messages=blocks, system=system, tools=[TOOL])
    assert answer["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    count = client.post("/v1/messages/count_tokens", json={"messages": blocks, "system": system, "tools": [TOOL]})
    assert count.json() == {"input_tokens": expected["usage"]["prompt_tokens"]}


def test_streamed_events(client: httpx.Client) -> None:
    whole = message(client)
    found = events(client)
    kinds = [event["type"] for event in found]
    num_deltas = kinds.count("content_block_delta")
    assert num_deltas > 1
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * num_deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert start.pop("id").startswith("msg_")
    prompt = whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    assert start == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt,
            "output_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }
    assert found[2] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"text_delta"}
    assert "".join(delta["text"] for delta in deltas) == whole["content"][0]["text"]
    assert found[-3] == {"type": "content_block_stop", "index": 0}
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 12
    assert found[-2]["usage"]["input_tokens"] + found[-2]["usage"]["cache_read_input_tokens"] == prompt


def test_stop_sequences(client: httpx.Client) -> None:
    text = message(client)["content"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    answer = message(client, stop_sequences=["never said", stop])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]
    assert events(client, stop_sequences=[stop])[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    ended = message(client, structured_outputs={"choice": ["yes"]}, stop="never said")
    assert (ended["content"], ended["stop_reason"]) == ([{"type": "text", "text": "yes"}], "end_turn")
    assert ended["stop_sequence"] is None


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_calls(client: httpx.Client, choice: dict[str, Any]) -> None:
    choice |= {"disable_parallel_tool_use": True}
    asked = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 500}
    answer = message(client, **asked)
    (call,) = answer["content"]
    assert (call["type"], call["name"], answer["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert call["input"]["city"] in ("Rome", "Oslo")
    found = events(client, **asked)
    start = next(event for event in found if event["type"] == "content_block_start")
    assert start["index"] == 0
    assert start["content_block"]["id"]
    assert start["content_block"] == {**call, "id": start["content_block"]["id"], "input": {}}
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == call["input"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_no_calls(client: httpx.Client) -> None:
    with_none = message(client, tools=[TOOL], tool_choice={"type": "none"})
    assert with_none["content"] == message(client)["content"]
    assert message(client, tool_choice={"type": "auto"})["content"] == with_none["content"]


def test_the_beginning_of_an_answer(client: httpx.Client) -> None:
    text = message(client)["content"][0]["text"]
    begun = [*HI, {"role": "assistant", "content": [{"type": "text", "text": text[:4]}]}]
    expected = chat(client, begun, continue_final_message=True, add_generation_prompt=False)
    assert message(client, messages=begun)["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    call = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}
    called = [*HI, {"role": "assistant", "content": [call]}]
    assert message(client, messages=called, tools=[TOOL])["content"]


def test_a_schema(client: httpx.Client) -> None:
    form = {"type": "json_schema", "schema": CITY}
    for asked in ({"output_config": {"format": form}}, {"output_format": form}):
        answer = message(client, max_tokens=100, **asked)
        assert json.loads(answer["content"][0]["text"])["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("stream", [False, True])
def test_hosted_tools_are_left_out_and_told_of(client: httpx.Client, stream: bool) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124"}]
    response = client.post("/v1/messages", json={**ASKED, "tools": tools, "stream": stream})
    assert response.headers["x-hopskip-dropped"] == "the tool web_search; the tool bash_20250124"
    if not stream:
        assert response.json()["hopskip"] == {"dropped": ["the tool web_search", "the tool bash_20250124"]}


def test_what_clients_send_as_a_matter_of_course(client: httpx.Client) -> None:
    harmless: dict[str, Any] = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": []},
        "output_config": {"effort": "low"},
        "top_p": None,
        "top_k": 5,
    }
    answer = client.post("/v1/messages?beta=true", json={**ASKED, **harmless})
    assert answer.json()["content"] == message(client)["content"]


@pytest.mark.parametrize(
    ("asked", "status", "kind", "text"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"stop_sequence": ["x"]}, 400, "invalid_request_error", "did you mean stop_sequences?"),
        ({"model": "claude"}, 404, "not_found_error", "'claude' is not served here"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "has no name"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            400,
            "invalid_request_error",
            "blocks of type 'server_tool_use' are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            400,
            "invalid_request_error",
            "'tool_use' belongs to assistant messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
            400,
            "invalid_request_error",
            "'tool_result' belongs to user messages",
        ),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "invalid_request_error", "context length"),
    ],
)
def test_errors(client: httpx.Client, asked: dict[str, Any], status: int, kind: str, text: str) -> None:
    response = client.post("/v1/messages", json={**ASKED, **asked})
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert set(body) == {"type", "error"}
    assert text in body["error"]["message"]


def test_errors_of_the_guard(llm: LLM, client: httpx.Client) -> None:
    assert client.post("/v1/messages/x").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert "type" not in client.get("/v1/messagesx").json()
    limits = Limits(body_bytes=2000)
    with live_server(llm, api_keys=("one-secret", "two-secret"), limits=limits) as live, live.client() as stranger:
        large = stranger.post("/v1/messages", content=b" " * 3000, headers={"x-api-key": "one-secret"})
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
        refused = stranger.post("/v1/messages", json=ASKED)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert stranger.get("/v1/models", headers={"x-api-key": "one-secret-"}).status_code == 401
        for headers in ({"x-api-key": "two-secret"}, {"Authorization": "Bearer one-secret"}):
            assert stranger.post("/v1/messages", json=ASKED, headers=headers).status_code == 200
            assert stranger.get("/v1/models", headers=headers).status_code == 200


# -- what a tiny model does not say ------------------------------------------------------------------------------------


class Said:
    """An answer written by hand."""

    dropped: tuple[str, ...] = ()
    num_prompt_tokens = 7
    usage: dict[str, Any]
    params: Any = None
    stop_text: str | None = None

    def __init__(self, *deltas: dict[str, Any], reason: str = "stop", error: Exception | None = None) -> None:
        self._deltas = deltas
        self.usage = USAGE
        self._reason = reason
        self._error = error

    async def whole(self) -> Any:
        raise NotImplementedError

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        for delta in self._deltas:
            yield {"choices": [{"delta": delta, "finish_reason": None}]}
        if self._error is not None:
            raise self._error
        yield {"choices": [{"delta": {}, "finish_reason": self._reason}]}

    def cancel(self) -> None:
        pass


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
PARIS: dict[str, Any] = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"city":'}}
MORE = {"index": 0, "function": {"arguments": ' "Paris"}'}}
OTHER = {"index": 1, "id": "c2", "function": {"name": "time", "arguments": ""}}


def said(*deltas: dict[str, Any], **how: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [event async for event in MessageAnswer(Said(*deltas, **how), "m", ()).events()]

    return asyncio.run(collect())[2:]


def test_a_stream_of_thoughts_text_and_calls() -> None:
    found = said(
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"content": "So"},
        {"tool_calls": [PARIS]},
        {"tool_calls": [MORE]},
        {"tool_calls": [OTHER]},
        reason="tool_calls",
    )
    starts = [event["content_block"] for event in found if event["type"] == "content_block_start"]
    assert starts == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {}},
        {"type": "tool_use", "id": "c2", "name": "time", "input": {}},
    ]
    deltas = [(event["index"], event["delta"]) for event in found if event["type"] == "content_block_delta"]
    assert deltas == [
        (0, {"type": "thinking_delta", "thinking": "Hm"}),
        (0, {"type": "thinking_delta", "thinking": "."}),
        (1, {"type": "text_delta", "text": "So"}),
        (2, {"type": "input_json_delta", "partial_json": '{"city":'}),
        (2, {"type": "input_json_delta", "partial_json": ' "Paris"}'}),
    ]
    assert [event["index"] for event in found if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    usage = {"input_tokens": 4, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0, "output_tokens": 5}
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert found[-2]["usage"] == usage


def test_a_stream_of_nothing() -> None:
    assert [event["type"] for event in said()] == ["message_delta", "message_stop"]
    assert said()[0]["delta"]["stop_reason"] == "end_turn"


def test_a_stream_that_fails() -> None:
    assert said({"content": "So"}, error=GenerationError("a mishap"))[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "a mishap"},
    }


def test_a_whole_message_of_thoughts_text_and_calls() -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    cut = {"name": "weather", "arguments": '{"city": "Pa'}
    calls = [{"id": "c1", "function": function}, {"id": "c2", "function": cut}]
    spoken = {"content": "So", "reasoning_content": "Hm", "tool_calls": calls}
    chat = {"choices": [{"message": spoken, "finish_reason": "length"}]}
    whole = MessageAnswer(Said(), "m", ()).whole(chat)
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "So"},
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
    ]
    assert whole["stop_reason"] == "max_tokens"


def test_a_request_as_a_chat() -> None:
    request = schema.MessagesRequest.model_validate(
        {
            **ASKED,
            "stream": True,
            "stop": "a",
            "stop_sequences": ["b"],
            "top_k": 5,
            "seed": 3,
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "high"},
            "tools": [{**TOOL, "strict": True}, {"type": "custom", "name": "other", "input_schema": {}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        }
    )
    chat, dropped = translate(request)
    assert dropped == ()
    assert (chat.stream, chat.max_completion_tokens, chat.stop, chat.top_k, chat.seed) == (True, 12, ["a", "b"], 5, 3)
    assert (chat.enable_thinking, chat.reasoning_effort) == (True, "high")
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    assert chat.continue_final_message is False
    assert chat.tools is not None
    assert [(tool.function.name, tool.function.strict) for tool in chat.tools] == [("weather", True), ("other", None)]
    assert chat.tools[0].function.description == "Of a city"
    off = schema.MessagesRequest.model_validate({**ASKED, "thinking": {"type": "disabled"}})
    assert translate(off)[0].enable_thinking is False
    plain = translate(schema.MessagesRequest.model_validate(ASKED))[0]
    assert (plain.enable_thinking, plain.parallel_tool_calls, plain.stop, plain.stream) == (None, None, None, False)


def test_a_stream_that_a_shutdown_cuts() -> None:
    assert said({"content": "So"}, error=UnavailableError("a drain"))[-1]["error"]["type"] == "overloaded_error"


def test_requests_are_counted_by_their_routes(client: httpx.Client) -> None:
    message(client)
    lines = [line for line in client.get("/metrics").text.splitlines() if "/v1/messages" in line]
    assert any('status="200"' in line for line in lines), lines
