"""LiteLLM: chats, responses, and its bridge from Anthropic's messages."""

from __future__ import annotations

from typing import Any

import litellm
from common import CITY, HISTORY, KEY, MODEL, QUESTION, ROOT, TOO_LONG, TOOL, URL, arguments_ok, check, raises, report

litellm.num_retries = 0


def add_checks(row: str, provider: str) -> None:
    def ask(**options: Any) -> Any:
        given = {"messages": HISTORY, "max_tokens": 200, "temperature": 0, **options}
        base = ROOT if provider == "anthropic" else URL
        return litellm.completion(model=f"{provider}/{MODEL}", api_base=base, api_key=KEY, **given)

    @check("text", row)
    def text() -> None:
        answer = ask(max_tokens=30)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens > 0

    @check("stream", row)
    def stream() -> None:
        assert "".join(part.choices[0].delta.content or "" for part in ask(max_tokens=30, stream=True))

    @check("tools", row)
    def tools() -> None:
        (call, *_) = ask(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
        arguments_ok(call.function.arguments)
        whole = litellm.stream_chunk_builder(list(ask(tools=[TOOL], tool_choice="required", stream=True)))
        arguments_ok(whole.choices[0].message.tool_calls[0].function.arguments)

    @check("schema", row)
    def schema() -> None:
        form = {
            "type": "json_schema",
            "json_schema": {"name": "trip", "schema": {**CITY, "additionalProperties": False}},
        }
        arguments_ok(ask(response_format=form).choices[0].message.content)

    @check("errors", row)
    def errors() -> None:
        too_long = [{"role": "user", "content": TOO_LONG}]
        kind = litellm.BadRequestError if provider == "anthropic" else litellm.ContextWindowExceededError
        raises(kind, lambda: ask(messages=too_long))
        raises(litellm.BadRequestError, lambda: ask(extra_body={"temprature": 1}, messages=[]))

    @check("history", row)
    def history() -> None:
        message = ask(tools=[TOOL], tool_choice="required").choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "Rain"} for call in message.tool_calls]
        messages = [*HISTORY, message.model_dump(), *results]
        assert ask(messages=messages, tools=[TOOL], max_tokens=10).choices[0].message.role == "assistant"


add_checks("openai", "openai")
add_checks("hosted_vllm", "hosted_vllm")
add_checks("anthropic", "anthropic")


def respond(**options: Any) -> Any:
    given = {"input": QUESTION, "max_output_tokens": 40, **options}
    return litellm.responses(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, temperature=0, **given)


@check("text", "responses")
def response_text() -> None:
    assert respond().output[0].content[0].text


@check("stream", "responses")
def response_stream() -> None:
    assert list(respond(stream=True))[-1].response.output[0].content[0].text


@check("history", "responses")
def response_history() -> None:
    first = respond()
    assert respond(previous_response_id=first.id).output


report("litellm")
