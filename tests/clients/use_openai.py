"""openai-python: chats and responses. Also run with older versions."""

from __future__ import annotations

from typing import Any

import openai
from common import CITY, HISTORY, KEY, MODEL, QUESTION, TOO_LONG, TOOL, URL, arguments_ok, check, raises, report
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
FUNCTION: Any = {"type": "function", "strict": None, **TOOL["function"]}
chats: Any = client.chat.completions


class Trip(BaseModel):
    city: str
    days: int


def ask(**options: Any) -> Any:
    return chats.create(model=MODEL, messages=HISTORY, temperature=0, max_tokens=40, **options)


def respond(**options: Any) -> Any:
    given = {"input": QUESTION, "max_output_tokens": 40, **options}
    return client.responses.create(model=MODEL, temperature=0, **given)


@check("text", "chat")
def text() -> None:
    answer = ask(store=True, metadata={"a": "b"}, user="me", service_tier="auto")
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > answer.usage.prompt_tokens > 0


@check("stream", "chat")
def stream() -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == ask().choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0


@check("tools", "chat")
def tools() -> None:
    for choice in "required", {"type": "function", "function": {"name": "weather"}}:
        answer = chats.create(model=MODEL, messages=HISTORY, temperature=0, tools=[TOOL], tool_choice=choice)
        (call, *_) = answer.choices[0].message.tool_calls
        arguments_ok(call.function.arguments)
    parts = list(
        chats.create(model=MODEL, messages=HISTORY, temperature=0, tools=[TOOL], tool_choice=choice, stream=True)
    )
    calls = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
    assert calls[0].id
    arguments_ok("".join(call.function.arguments or "" for call in calls))


@check("schema", "chat")
def schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY, "strict": True}}
    arguments_ok(
        chats.create(model=MODEL, messages=HISTORY, temperature=0, response_format=form).choices[0].message.content
    )
    parse = chats.parse if hasattr(chats, "parse") else client.beta.chat.completions.parse
    answer = parse(model=MODEL, messages=HISTORY, temperature=0, response_format=Trip)
    assert isinstance(answer.choices[0].message.parsed, Trip)


@check("errors", "chat")
def errors() -> None:
    raises(openai.NotFoundError, lambda: chats.create(model="nobody", messages=HISTORY))
    raises(openai.AuthenticationError, lambda: OpenAI(base_url=URL, api_key="wrong-secret").models.list())
    long = [{"role": "user", "content": TOO_LONG}]
    error = raises(openai.BadRequestError, lambda: chats.create(model=MODEL, messages=long))
    assert error.code == "context_length_exceeded", error
    raises(openai.BadRequestError, lambda: ask(extra_body={"temprature": 1}))


@check("history", "chat")
def history() -> None:
    message = (
        chats.create(model=MODEL, messages=HISTORY, temperature=0, tools=[TOOL], tool_choice="required")
        .choices[0]
        .message
    )
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Rain"} for call in message.tool_calls]
    for fed_back in message, message.model_dump():
        again = [*HISTORY, fed_back, *results, {"role": "user", "content": "Thanks"}]
        answer = chats.create(model=MODEL, messages=again, max_tokens=5, tools=[TOOL])
        assert answer.choices[0].message.role == "assistant"
    said = ask().choices[0].message.model_dump()
    assert chats.create(model=MODEL, max_tokens=5, messages=[*HISTORY, said, HISTORY[1]]).choices


@check("text", "responses")
def response_text() -> None:
    assert respond(instructions="Be brief.").output_text


@check("stream", "responses")
def response_stream() -> None:
    events = list(respond(stream=True))
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    whole = events[-1].response.output_text
    assert whole == "".join(event.delta for event in events if event.type == "response.output_text.delta") != ""


@check("tools", "responses")
def response_tools() -> None:
    (call, *_) = respond(tools=[FUNCTION], tool_choice="required", max_output_tokens=200).output
    assert call.type == "function_call"
    arguments_ok(call.arguments)
    events = list(respond(tools=[FUNCTION], tool_choice="required", max_output_tokens=200, stream=True))
    arguments_ok(next(event.arguments for event in events if event.type == "response.function_call_arguments.done"))


@check("schema", "responses")
def response_schema() -> None:
    if hasattr(client.responses, "parse"):
        answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=Trip, temperature=0)
        assert isinstance(answer.output_parsed, Trip)
    form = {"format": {"type": "json_schema", "name": "trip", "schema": CITY, "strict": True}}
    arguments_ok(respond(text=form, max_output_tokens=200).output_text)


@check("errors", "responses")
def response_errors() -> None:
    raises(openai.NotFoundError, lambda: client.responses.retrieve("resp_nobody"))
    error = raises(openai.BadRequestError, lambda: respond(input=TOO_LONG))
    assert error.code == "context_length_exceeded", error


@check("history", "responses")
def response_history() -> None:
    first = respond(tools=[FUNCTION], tool_choice="required", max_output_tokens=200)
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
        for call in first.output
        if call.type == "function_call"
    ]
    question = {"role": "user", "content": QUESTION}
    fed_back = respond(input=[question, *first.output, *outputs], tools=[FUNCTION])
    kept = respond(input=outputs, previous_response_id=first.id, tools=[FUNCTION])
    assert kept.output_text == fed_back.output_text


report("openai")
