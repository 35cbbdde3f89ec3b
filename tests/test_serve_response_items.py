"""Responses from deltas written by hand, items as messages, and the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from hopskip import SamplingParams
from hopskip.serve.engine_thread import GenerationError
from hopskip.serve.policy import unknown_params
from hopskip.serve.responses import schema
from hopskip.serve.responses.answer import ResponseAnswer
from hopskip.serve.responses.items import chat_messages, encoded, input_of_custom, shown
from hopskip.serve.responses.output import Output
from hopskip.serve.responses.store import ResponseStore, Stored
from hopskip.serve.responses.translate import Translated, translate
from hopskip.serve.schema import ChatRequest, JSONSchemaFormat, Message, NamedTool


def output_of(*deltas: dict[str, Any], status: str = "completed", **how: Any) -> tuple[list[Any], list[Any]]:
    """Events and items that follow from deltas of a chat."""
    options: dict[str, Any] = {"custom_tools": frozenset({"shout"}), "is_summary": False, "has_encoded": False, **how}
    output = Output(**options)
    events = [event for delta in deltas for event in output.add(delta)]
    return [*events, *output.finish(status)], output.items


def test_thoughts_text_and_calls_are_items() -> None:
    events, items = output_of(
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"content": "So"},
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "shout", "arguments": '{"inp'}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": 'ut": "Hey"}'}}]},
        {"content": "Bye"},
        status="incomplete",
    )
    ids = [item.pop("id") for item in items]
    assert [id.split("_")[0] for id in ids] == ["rs", "msg", "fc", "ctc", "msg"]
    text = {"type": "output_text", "annotations": [], "logprobs": []}
    message = {"type": "message", "role": "assistant"}
    assert items == [
        {
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {**message, "status": "completed", "content": [{**text, "text": "So"}]},
        {"type": "function_call", "status": "completed", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "custom_tool_call", "status": "completed", "call_id": "c2", "name": "shout", "input": "Hey"},
        {**message, "status": "incomplete", "content": [{**text, "text": "Bye"}]},
    ]
    thoughts = [event for event in events if event.get("output_index") == 0]
    assert [event["type"].removeprefix("response.") for event in thoughts] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert [event["delta"] for event in thoughts if "delta" in event] == ["Hm", "."]
    assert thoughts[1]["part"] == {"type": "reasoning_text", "text": ""}
    assert thoughts[-2]["part"] == {"type": "reasoning_text", "text": "Hm."}
    assert thoughts[-3]["text"] == "Hm."
    assert {event["content_index"] for event in thoughts[1:-1]} == {0}
    assert not any("logprobs" in event for event in thoughts)
    assert thoughts[0]["item"]["content"] == []
    shout = [event for event in events if event.get("output_index") == 3]
    assert [event["type"].removeprefix("response.") for event in shout] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    assert (shout[1]["delta"], shout[2]["input"]) == ("Hey", "Hey")


def test_thoughts_as_a_summary() -> None:
    events, items = output_of({"reasoning_content": "Hm"}, is_summary=True, has_encoded=True)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert {event["summary_index"] for event in events[1:-1]} == {0}
    assert items[0]["summary"] == [{"type": "summary_text", "text": "Hm"}]
    assert items[0]["content"] == []
    assert items[0]["encrypted_content"] == encoded("Hm")


def test_nothing_is_an_empty_message() -> None:
    events, items = output_of({"role": "assistant", "content": ""})
    assert [event["type"] for event in events if event["type"].endswith("delta")] == []
    assert items[0]["content"] == [{"type": "output_text", "annotations": [], "logprobs": [], "text": ""}]


def test_items_of_a_turn_are_one_message() -> None:
    def messages(*items: Any, instructions: str | None = None) -> list[Any]:
        request = schema.ResponseRequest.model_validate({"input": list(items)})
        assert isinstance(request.input, list)
        return chat_messages([shown(item) for item in request.input], instructions)  # type: ignore[arg-type]

    def call(id: str) -> tuple[Any, Any]:
        function = {"name": "f", "arguments": "{}"}
        item = {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"}
        return item, {"id": id, "type": "function", "function": function}

    (c1, t1), (c2, t2) = call("1"), call("2")
    thoughts = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    whole = {**thoughts, "content": [{"type": "reasoning_text", "text": "long"}]}
    hidden = {**thoughts, "encrypted_content": encoded("hidden")}
    foreign = {**thoughts, "encrypted_content": "gAAAAAB!"}
    text = {"role": "assistant", "content": "So"}
    out = {"type": "function_call_output", "call_id": "1", "output": "Rain"}
    turn = {"role": "assistant", "tool_calls": []}
    tool = {"role": "tool", "tool_call_id": "1", "content": "Rain"}
    assert messages(whole, text, c1, c2, out, text) == [
        {**turn, "reasoning_content": "long", "content": "So", "tool_calls": [t1, t2]},
        tool,
        {**turn, "content": "So"},
    ]
    assert messages(c1, out, c2) == [{**turn, "tool_calls": [t1]}, tool, {**turn, "tool_calls": [t2]}]
    assert messages(text, text) == [{**turn, "content": "So"}] * 2
    assert messages(c1, text) == [{**turn, "tool_calls": [t1]}, {**turn, "content": "So"}]
    assert messages(text, hidden) == [{**turn, "content": "So"}, {**turn, "reasoning_content": "hidden"}]
    assert messages(thoughts, text) == [{**turn, "reasoning_content": "short", "content": "So"}]
    assert messages(foreign) == [{**turn, "reasoning_content": "short"}]
    custom = {"type": "custom_tool_call", "call_id": "3", "name": "shout", "input": "Hey"}
    (spoken,) = messages(custom)
    assert spoken["tool_calls"][0]["function"] == {"name": "shout", "arguments": {"input": "Hey"}}
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    assert messages(user, system) == [user, system]
    assert messages(system, user, instructions="Now.") == [{"role": "system", "content": "Now.\n\nBe kind."}, user]
    assert messages(user, instructions="Now.") == [{"role": "system", "content": "Now."}, user]


def test_what_a_custom_tool_is_given() -> None:
    assert input_of_custom('{"input": "Hey"}') == "Hey"
    for odd in ('{"inp', "[]", '{"input": 3}', "{}"):
        assert input_of_custom(odd) == odd


class Failing:
    """An answer that fails after its first token."""

    dropped: tuple[str, ...] = ()
    num_prompt_tokens = 7
    usage: Any = None
    params = SamplingParams()
    stop_text: str | None = None

    async def whole(self) -> Any:
        raise NotImplementedError

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"content": "So"}, "logprobs": None, "finish_reason": None}]}
        raise GenerationError("a mishap")

    def cancel(self) -> None:
        pass


def test_a_stream_that_fails() -> None:
    async def collect() -> list[Any]:
        request = schema.ResponseRequest(input="Hi")
        translated = Translated(ChatRequest(messages=[Message(role="user", content="Hi")]), [], frozenset(), ())
        answer = ResponseAnswer(request, translated, Failing(), "m", is_stored=True)
        return [event async for event in answer.events()]

    last = asyncio.run(collect())[-1]
    assert last["type"] == "response.failed"
    assert (last["response"]["status"], last["response"]["usage"]) == ("failed", None)
    assert last["response"]["error"] == {"code": "server_error", "message": "a mishap"}


def test_the_store_forgets_what_was_used_longest_ago() -> None:
    def stored(id: str, *items: str) -> Stored:
        return Stored({"id": id, "output": [{"id": f"{id}-out"}]}, [{"id": item} for item in items])

    store = ResponseStore(3, 10_000)
    store.put("me", stored("a", "x"))
    store.put("me", stored("b", "x", "y"))
    store.put("me", stored("c"))
    assert store.get("you", "a") is None
    assert store.item("you", "x") is None
    assert store.item("me", "y") == {"id": "y"}  # b counts as used
    assert store.get("me", "a") is not None
    store.put("me", stored("d"))
    assert store.get("me", "c") is None
    assert store.item("me", "c-out") is None
    assert store.delete("me", "b")
    assert store.item("me", "y") is None
    assert not store.delete("me", "b")
    assert not store.delete("you", "a")
    assert store.item("me", "a-out") == {"id": "a-out"}
    small = ResponseStore(3, 2 * stored("a", "x").num_bytes)
    for id in "abc":
        small.put(None, stored(id, "x"))
    assert [small.get(None, id) is not None for id in "abc"] == [False, True, True]
    small.put(None, stored("d", "x" * 1000))
    assert small.get(None, "d") is None


def test_a_request_as_a_chat() -> None:
    functions = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}]
    request = schema.ResponseRequest.model_validate(
        {
            "input": "Hi",
            "stream": True,
            "max_output_tokens": 9,
            "temperature": 0.5,
            "seed": 3,
            "min_p": 0.1,
            "stop": ["x"],
            "cache_salt": "mine",
            "top_logprobs": 2,
            "reasoning": {"effort": "low", "generate_summary": "auto"},
            "chat_template_kwargs": {"a": 1},
            "parallel_tool_calls": False,
            "tools": [*functions, {"type": "custom", "name": "shout"}],
            "tool_choice": {"type": "custom", "name": "shout"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        }
    )
    assert request.reasoning is not None
    assert request.reasoning.is_summary
    translated = translate(request, ResponseStore(0, 0), None)
    chat = translated.chat
    assert chat.stream is True
    assert (chat.max_completion_tokens, chat.max_tokens) == (9, None)
    assert (chat.temperature, chat.seed, chat.min_p, chat.stop, chat.cache_salt) == (0.5, 3, 0.1, ["x"], "mine")
    assert (chat.logprobs, chat.top_logprobs) == (True, 2)
    assert (chat.reasoning_effort, chat.chat_template_kwargs, chat.parallel_tool_calls) == ("low", {"a": 1}, False)
    assert chat.tools is not None
    weather, shout = (tool.function for tool in chat.tools)
    assert (weather.name, weather.parameters, weather.strict) == ("weather", {"type": "object"}, True)
    assert shout.parameters["required"] == ["input"]
    assert shout.parameters["properties"] == {"input": {"type": "string"}}
    assert shout.parameters["additionalProperties"] is False
    assert isinstance(chat.tool_choice, NamedTool)
    assert chat.tool_choice.function.name == "shout"
    assert isinstance(chat.response_format, JSONSchemaFormat)
    assert chat.response_format.json_schema.strict is True
    assert chat.response_format.json_schema.schema_ == {"type": "object"}
    assert translated.custom_tools == {"shout"}
    assert (
        "temperature"
        not in translate(schema.ResponseRequest(input="Hi"), ResponseStore(0, 0), None).chat.model_fields_set
    )


def test_what_codex_sends() -> None:
    """Its own fields, tools of all kinds, thoughts that it keeps encoded."""
    request = schema.ResponseRequest.model_validate(
        {
            "model": "m",
            "instructions": "You are a coding agent.",
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files"}]},
                {"type": "reasoning", "summary": [], "content": None, "encrypted_content": encoded("Hm")},
                {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "c1"},
                {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
            ],
            "tools": [
                {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
                {
                    "type": "custom",
                    "name": "apply_patch",
                    "format": {"type": "grammar", "syntax": "lark", "definition": ""},
                },
                {"type": "web_search", "external_web_access": False},
                {"type": "local_shell"},
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "k",
            "text": {"verbosity": "medium"},
            "client_metadata": {"a": "b"},
        }
    )
    assert list(unknown_params(request)) == []
    translated = translate(request, ResponseStore(0, 0), None)
    assert translated.dropped == ("the tool web_search", "the tool local_shell")
    system, user, turn, tool = translated.chat.messages
    assert (system.role, system.text) == ("system", "You are a coding agent.\n\nSandboxed.")
    assert (user.role, user.text) == ("user", "List files")
    assert turn.reasoning_content == "Hm"
    assert turn.tool_calls is not None
    assert turn.tool_calls[0].function.name == "shell"
    assert (tool.tool_call_id, tool.text) == ("c1", "a.txt")
    assert request.wants_encrypted
    assert not request.wants_logprobs
