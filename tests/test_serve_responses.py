"""The Responses API: with the `openai` client, and by hand where it has no words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

from hopskip import LLM, SamplingParams
from hopskip.serve.settings import Limits
from tests.serving import MODEL, Brake, Live, live_server

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "name": "weather", "description": "Of a city", "parameters": CITY}
CUSTOM: dict[str, Any] = {"type": "custom", "name": "shout", "description": "Any text"}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def openai(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def chat(openai: OpenAI, messages: list[Any], **options: Any) -> str:
    """What the chat route answers, which is what the others must answer."""
    answer = openai.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=12, **options)
    return answer.choices[0].message.content or ""


def test_a_text_is_the_chats(openai: OpenAI) -> None:
    response = openai.responses.create(input="Hi there", **GREEDY)
    assert response.output_text == chat(openai, [{"role": "user", "content": "Hi there"}])
    assert response.id.startswith("resp_")
    assert response.model == MODEL
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.completed_at is None
    (message,) = response.output
    assert message.type == "message"
    assert message.status == "incomplete"
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_what_has_ended_by_itself_is_completed(openai: OpenAI) -> None:
    response = openai.responses.create(input="Hi", extra_body={"structured_outputs": {"choice": ["yes"]}}, **GREEDY)
    assert response.output_text == "yes"
    assert (response.status, response.output[0].status) == ("completed", "completed")
    assert response.incomplete_details is None
    assert response.completed_at is not None
    assert response.completed_at >= response.created_at > 1e9


def test_the_response_repeats_the_request(client: httpx.Client) -> None:
    asked = {
        "input": "Hi",
        "instructions": "Be kind.",
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": CITY}, "verbosity": "low"},
        "tools": [TOOL],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "temperature": 0.5,
        "top_p": 0.25,
        "max_output_tokens": 3,
        "top_logprobs": 2,
        "user": "me",
    }
    response = client.post("/v1/responses", json=asked).json()
    for name in set(asked) - {"input", "text", "tools"}:
        assert response[name] == asked[name], name
    assert response["text"]["format"]["schema"] == CITY
    assert response["tools"] == [{**TOOL, "strict": None}]
    assert (response["store"], response["background"]) == (True, False)
    named = {"input": "Hi", "reasoning": {"generate_summary": "concise"}, "max_output_tokens": 1}
    assert client.post("/v1/responses", json=named).json()["reasoning"] == {"effort": None, "summary": "concise"}
    plain = client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}).json()
    assert plain["text"] == {"format": {"type": "text"}}
    assert (plain["tool_choice"], plain["parallel_tool_calls"], plain["tools"]) == ("auto", True, [])
    assert (plain["temperature"], plain["top_p"], plain["metadata"], plain["top_logprobs"]) == (1.0, 1.0, {}, 0)
    assert plain["hopskip"]["seed"] >= 0


def test_items_are_messages(openai: OpenAI) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]},
        {"role": "user", "content": "Bye"},
    ]
    response = openai.responses.create(input=items, instructions="Be kind.", **GREEDY)
    messages = [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    assert response.output_text == chat(openai, messages)


def test_streamed_events(openai: OpenAI) -> None:
    whole = openai.responses.create(input="Hi there", **GREEDY)
    events = list(openai.responses.create(input="Hi there", stream=True, **GREEDY))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*TEXT_EVENTS, "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text
    created, last = events[0], events[-1]
    assert created.type == "response.created"
    assert (created.response.status, created.response.output, created.response.usage) == ("in_progress", [], None)
    assert last.type == "response.incomplete"
    assert last.response.id == created.response.id
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    item = last.response.output[0]
    for event in events[2:-1]:
        assert event.output_index == 0
        assert getattr(event, "item_id", item.id) == item.id


def test_the_events_have_names(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/responses", json={"input": "Hi", "stream": True, **GREEDY}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in text


def test_the_clients_helpers(openai: OpenAI) -> None:
    class Trip(BaseModel):
        city: str
        days: bool

    parsed = openai.responses.parse(input="Where to?", text_format=Trip, model=MODEL, temperature=0)
    assert isinstance(parsed.output_parsed, Trip)
    with openai.responses.stream(input="Where to?", text_format=Trip, model=MODEL, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: httpx.Client, stream: bool) -> None:
    asked = {"input": "Hi", "stream": stream, "top_logprobs": 2, "include": ["message.output_text.logprobs"], **GREEDY}
    response = final(client, asked)
    (part,) = response["output"][0]["content"]
    assert len(part["logprobs"]) == 12
    data = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
    assert data.decode("utf-8", "replace") == part["text"]
    assert {len(each["top_logprobs"]) for each in part["logprobs"]} == {2}
    assert (
        final(client, {**asked, "top_logprobs": None})["output"][0]["content"][0]["logprobs"][0]["top_logprobs"] == []
    )
    without = {**asked, "top_logprobs": None, "include": ["reasoning.encrypted_content"]}
    assert final(client, without)["output"][0]["content"][0]["logprobs"] == []


def final(client: httpx.Client, asked: dict[str, Any]) -> dict[str, Any]:
    """The response, also of a stream."""
    if not asked.get("stream"):
        response = client.post("/v1/responses", json=asked)
        assert response.status_code == 200, response.text
        return dict(response.json())
    return dict(events_of(client, asked)[-1]["response"])


def events_of(client: httpx.Client, asked: dict[str, Any]) -> list[Any]:
    with client.stream("POST", "/v1/responses", json={**asked, "stream": True}) as response:
        lines = list(response.iter_lines())
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_output(client: httpx.Client, stream: bool) -> None:
    asked = {"input": "Where?", "tools": [TOOL], "tool_choice": "required", "temperature": 0, "stream": stream}
    response = final(client, {**asked, "parallel_tool_calls": False})
    (call,) = response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert call["id"].startswith("fc_")
    assert json.loads(call["arguments"])["city"] in ("Rome", "Oslo")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain"}
    history = [{"role": "user", "content": "Where?"}, call, output]
    again = final(client, {**GREEDY, "input": history, "tools": [TOOL], "stream": stream})
    after = final(
        client,
        {**GREEDY, "input": [output], "tools": [TOOL], "previous_response_id": response["id"], "stream": stream},
    )
    assert again["output"][0]["content"] == after["output"][0]["content"]


def test_events_of_a_call(client: httpx.Client) -> None:
    asked = {"input": "Where?", "tools": [TOOL], "temperature": 0, "parallel_tool_calls": False}
    events = events_of(client, {**asked, "tool_choice": {"type": "function", "name": "weather"}})
    kinds = list(dict.fromkeys(event["type"] for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = events[-1]["response"]["output"]
    added = next(event for event in events if event["type"] == "response.output_item.added")
    assert added["item"] == {**call, "arguments": "", "status": "in_progress"}
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    assert (done["arguments"], done["name"], done["item_id"]) == (call["arguments"], "weather", call["id"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_takes_a_text(client: httpx.Client, stream: bool) -> None:
    (quote,) = client.post("/tokenize", json={"prompt": '"'}).json()["tokens"]
    asked = {"input": "Shout", "tools": [CUSTOM], "tool_choice": {"type": "custom", "name": "shout"}, "temperature": 0}
    asked |= {"logit_bias": {str(quote): 100}, "stream": stream}
    response = final(client, asked)
    (call,) = response["output"]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "shout", "")
    assert call["id"].startswith("ctc_")
    assert "arguments" not in call
    output = {
        "type": "custom_tool_call_output",
        "call_id": call["call_id"],
        "output": [{"type": "input_text", "text": "!"}],
    }
    assert final(client, {**GREEDY, "input": [{"role": "user", "content": "Shout"}, call, output]})["output"]


def test_allowed_tools(client: httpx.Client) -> None:
    other = {**TOOL, "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    asked = {"input": "Where?", "tools": [TOOL, other], "tool_choice": allowed, "temperature": 0}
    response = final(client, asked)
    assert {call["name"] for call in response["output"]} == {"other"}
    assert response["tool_choice"] == allowed
    allowed["tools"] = [{"type": "function", "name": "nobody"}]
    refused = client.post("/v1/responses", json=asked)
    assert refused.status_code == 400
    assert "'nobody'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_hosted_tools_are_left_out_and_told_of(client: httpx.Client, stream: bool) -> None:
    asked = {
        **GREEDY,
        "input": "Hi",
        "tools": [{"type": "web_search", "filters": {}}, {"type": "mcp"}],
        "stream": stream,
    }
    response = client.post("/v1/responses", json=asked)
    assert response.headers["x-hopskip-dropped"] == "the tool web_search; the tool mcp"
    whole = final(client, asked)
    assert whole["hopskip"]["dropped"] == ["the tool web_search", "the tool mcp"]
    assert whole["tools"] == []


# -- responses that are kept -------------------------------------------------------------------------------------------


def test_going_on_from_a_response(openai: OpenAI) -> None:
    first = openai.responses.create(input="Hi", instructions="Not carried over", **GREEDY)
    second = openai.responses.create(input="And?", previous_response_id=first.id, **GREEDY)
    third = openai.responses.create(input="Then?", previous_response_id=second.id, **GREEDY)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Then?"},
    ]
    assert third.output_text == chat(openai, messages)
    assert second.output_text == chat(openai, messages[:3])
    assert third.previous_response_id == second.id
    items = openai.responses.input_items.list(third.id, order="asc").data
    assert [item.type for item in items] == ["message"] * 5
    assert [item.role for item in items] == [message["role"] for message in messages]  # type: ignore[union-attr]


def test_a_streamed_response_is_kept(openai: OpenAI) -> None:
    *_, last = openai.responses.create(input="Hi", stream=True, **GREEDY)
    assert last.type == "response.incomplete"
    assert openai.responses.retrieve(last.response.id) == last.response


def test_pages_of_input_items(client: httpx.Client) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(25)]
    id = final(client, {**GREEDY, "input": items})["id"]

    def page(**query: Any) -> Any:
        return client.get(f"/v1/responses/{id}/input_items", params=query).json()

    first = page()
    texts = [item["content"][0]["text"] for item in first["data"]]
    assert texts == [str(number) for number in range(24, 4, -1)]
    assert first["has_more"] is True
    assert (first["first_id"], first["last_id"]) == (first["data"][0]["id"], first["data"][-1]["id"])
    rest = page(after=first["last_id"])
    assert [item["content"][0]["text"] for item in rest["data"]] == ["4", "3", "2", "1", "0"]
    assert rest["has_more"] is False
    assert page(order="asc", limit=25)["has_more"] is False
    assert [item["content"][0]["text"] for item in page(order="asc", limit=2)["data"]] == ["0", "1"]
    assert page(after=rest["last_id"]) == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert page(after="msg_x")["error"]["param"] == "after"
    assert client.get(f"/v1/responses/{id}/input_items", params={"limit": 101}).status_code == 400


def test_references_to_items(openai: OpenAI, client: httpx.Client) -> None:
    first = final(client, {**GREEDY, "input": "Hi"})
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    items = [{"role": "user", "content": "Hi"}, reference, {"role": "user", "content": "And?"}]
    text = first["output"][0]["content"][0]["text"]
    spelled = [items[0], {"role": "assistant", "content": text}, items[2]]
    assert final(client, {**GREEDY, "input": items})["output"][0]["content"][0]["text"] == chat(openai, spelled)
    items[1] = {"id": "msg_nobody"}
    refused = client.post("/v1/responses", json={**GREEDY, "input": items})
    assert refused.status_code == 400
    assert "Item with id 'msg_nobody' not found." in refused.json()["error"]["message"]


def test_what_is_not_kept(openai: OpenAI) -> None:
    response = openai.responses.create(input="Hi", store=False, **GREEDY)
    assert response.store is False
    with pytest.raises(NotFoundError, match=f"Response with id '{response.id}' not found"):
        openai.responses.retrieve(response.id)
    with pytest.raises(BadRequestError, match="Previous response with id") as error:
        openai.responses.create(input="Hi", previous_response_id=response.id, **GREEDY)
    assert error.value.code == "previous_response_not_found"
    assert error.value.param == "previous_response_id"


def test_deletion(openai: OpenAI, client: httpx.Client) -> None:
    id = openai.responses.create(input="Hi", **GREEDY).id
    assert client.delete(f"/v1/responses/{id}").json() == {"id": id, "object": "response", "deleted": True}
    assert client.delete(f"/v1/responses/{id}").status_code == 404
    assert client.get(f"/v1/responses/{id}").status_code == 404
    assert client.get(f"/v1/responses/{id}/input_items").status_code == 404


def test_keys_do_not_see_each_others(llm: LLM) -> None:
    with live_server(llm, api_keys=("alice-secret", "mallory-secret")) as live:
        alice = OpenAI(base_url=f"{live.url}/v1", api_key="alice-secret", max_retries=0)
        mallory = OpenAI(base_url=f"{live.url}/v1", api_key="mallory-secret", max_retries=0)
        with alice, mallory:
            response = alice.responses.create(input="Hi", **GREEDY)
            assert alice.responses.retrieve(response.id).id == response.id
            reference: Any = [{"type": "item_reference", "id": response.output[0].id}]
            for attempt in (
                lambda: mallory.responses.retrieve(response.id),
                lambda: mallory.responses.delete(response.id),
                lambda: mallory.responses.cancel(response.id),
                lambda: mallory.responses.create(input="Hi", previous_response_id=response.id, **GREEDY),
                lambda: mallory.responses.create(input=reference, **GREEDY),
            ):
                with pytest.raises(APIStatusError, match="not found"):
                    attempt()


def test_only_so_many_are_kept(llm: LLM) -> None:
    with live_server(llm, max_stored_responses=2) as live, live.client() as client:
        ids = [final(client, {**GREEDY, "input": "Hi"})["id"] for _ in range(2)]
        assert client.get(f"/v1/responses/{ids[0]}").status_code == 200  # it is the one used last now
        ids.append(final(client, {**GREEDY, "input": "Hi"})["id"])
        assert [client.get(f"/v1/responses/{id}").status_code for id in ids] == [200, 404, 200]
    with live_server(llm, max_stored_responses=0) as live, live.client() as client:
        response = final(client, {**GREEDY, "input": "Hi"})
        assert response["store"] is False
        refused = client.post("/v1/responses", json={"input": "Hi", "previous_response_id": response["id"]})
        assert "stores no responses" in refused.json()["error"]["message"]
    with live_server(llm, limits=Limits(stored_bytes=1000)) as live, live.client() as client:
        id = final(client, {**GREEDY, "input": "Hi"})["id"]
        assert client.get(f"/v1/responses/{id}").status_code == 404


def test_cancelling_a_stream(llm: LLM) -> None:
    brake = Brake(llm.engine)
    try:
        with live_server(llm) as live, live.client() as client, live.client() as other:
            asked = {"input": "Hi", "stream": True, "ignore_eos": True, "max_output_tokens": 200, "model": MODEL}
            with client.stream("POST", "/v1/responses", json=asked) as response:
                lines = response.iter_lines()
                id = next(json.loads(line[6:])["response"]["id"] for line in lines if line.startswith("data: "))
                cancelled = other.post(f"/v1/responses/{id}/cancel")
                assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
                last = json.loads([line for line in lines if line.startswith("data: ")][-1][6:])
            assert last["type"] == "response.incomplete"
            assert (last["response"]["status"], last["response"]["incomplete_details"]) == ("cancelled", None)
            assert last["response"]["usage"]["output_tokens"] < 200
            refused = other.post(f"/v1/responses/{id}/cancel")
            assert refused.status_code == 400
            assert "has ended" in refused.json()["error"]["message"]
            assert other.post("/v1/responses/resp_x/cancel").status_code == 404
    finally:
        brake.release()


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_row(llm: LLM) -> None:
    brake = Brake(llm.engine)
    try:
        with live_server(llm) as live:
            with live.client() as client:
                asked = {"input": "Hi", "stream": True, "ignore_eos": True, "model": MODEL}
                with client.stream("POST", "/v1/responses", json=asked) as response:
                    next(response.iter_lines())
            wait_until(lambda: live.server.engine.num_outstanding == 0)
    finally:
        brake.release()


def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("in vain")


def test_counting_tokens(openai: OpenAI, client: httpx.Client) -> None:
    asked = {"input": "Hi there", "instructions": "Be kind.", "tools": [TOOL]}
    count = client.post("/v1/responses/input_tokens", json=asked).json()
    usage = client.post("/v1/responses", json={**asked, "max_output_tokens": 1}).json()["usage"]
    assert count == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}
    assert openai.responses.input_tokens.count(input="Hi there").input_tokens < usage["input_tokens"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "input is missing"),
        ({"input": []}, "input"),
        ({"input": ""}, "input is missing"),
        ({"input": "x", "background": True}, "background is not supported"),
        ({"input": "x", "conversation": "conv_1"}, "use previous_response_id"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompts are not kept"),
        ({"input": "x", "truncation": "auto"}, "truncation 'auto' is not supported"),
        ({"input": "x", "max_tokens": 3}, "did you mean max_output_tokens?"),
        ({"input": "x", "temprature": 3}, "did you mean temperature?"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "text": {"formt": None, "fromat": 1}}, "text.fromat"),
        ({"input": "x", "tool_choice": "required"}, "no tools"),
        ({"input": "x", "tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "an item of type 'computer_call' is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "images are not supported"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
            "arguments of tool call 'c' are not JSON",
        ),
        ({"input": "x", "model": "gpt"}, "'gpt' is not served here"),
    ],
)
def test_refusals(client: httpx.Client, asked: dict[str, Any], message: str) -> None:
    refused = client.post("/v1/responses", json=asked)
    assert refused.status_code == (404 if "served" in message else 400)
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_stored_stream_is_not_played_again(openai: OpenAI, client: httpx.Client) -> None:
    id = openai.responses.create(input="Hi", **GREEDY).id
    refused = client.get(f"/v1/responses/{id}", params={"stream": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stream"


def test_a_too_long_input(openai: OpenAI, llm: LLM) -> None:
    with pytest.raises(BadRequestError) as error:
        openai.responses.create(input="word " * llm.engine.max_model_len, model=MODEL)
    assert error.value.code == "context_length_exceeded"


def test_the_seed_is_told(openai: OpenAI, llm: LLM) -> None:
    response = openai.responses.create(input="Hi", model=MODEL, max_output_tokens=12, extra_body={"seed": 3})
    (result,) = llm.generate(
        [[{"role": "user", "content": "Hi"}]], SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    )
    assert response.output_text == result.text
    assert response.model_extra is not None
    assert response.model_extra["hopskip"] == {"seed": 3}
