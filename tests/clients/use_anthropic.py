"""anthropic-sdk-python."""

from __future__ import annotations

from typing import Any

import anthropic
from anthropic import Anthropic
from common import CITY, HISTORY, KEY, MODEL, ROOT, TOO_LONG, arguments_ok, check, raises, report
from pydantic import BaseModel

client = Anthropic(base_url=ROOT, api_key=KEY, max_retries=0)
WEATHER: Any = {"name": "weather", "description": "The weather of a city", "input_schema": CITY}
ASKED: Any = {"model": MODEL, "max_tokens": 40, "system": HISTORY[0]["content"], "messages": HISTORY[1:]}
ASKED["extra_body"] = {"temperature": 0}


class Trip(BaseModel):
    city: str
    days: int


def ask(**options: Any) -> Any:
    return client.messages.create(**{**ASKED, **options})


@check("text")
def text() -> None:
    answer = ask(metadata={"user_id": "me"}, thinking={"type": "disabled"})
    assert answer.content[0].text
    assert answer.usage.output_tokens > 0
    counted = client.messages.count_tokens(model=MODEL, system=ASKED["system"], messages=ASKED["messages"])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert Anthropic(base_url=ROOT, auth_token=KEY).messages.create(**ASKED).content


@check("stream")
def stream() -> None:
    with client.messages.stream(**ASKED) as streamed:
        shown = "".join(streamed.text_stream)
    final = streamed.get_final_message()
    assert shown == final.content[0].text == ask().content[0].text
    assert final.stop_reason in ("end_turn", "max_tokens")
    assert final.usage.output_tokens > 0


@check("tools")
def tools() -> None:
    for choice in {"type": "any"}, {"type": "tool", "name": "weather"}:
        options = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
        answer = ask(**options)
        assert answer.stop_reason == "tool_use"
        arguments_ok(answer.content[0].input)
        with client.messages.stream(**{**ASKED, **options}) as streamed:
            arguments_ok(streamed.get_final_message().content[0].input)


@check("schema")
def schema() -> None:
    form = {"format": {"type": "json_schema", "schema": CITY}}
    arguments_ok(ask(output_config=form, max_tokens=200).content[0].text)
    parsed = client.messages.parse(**{**ASKED, "max_tokens": 200}, output_format=Trip)
    assert isinstance(parsed.parsed_output, Trip)


@check("errors")
def errors() -> None:
    raises(anthropic.NotFoundError, lambda: ask(model="nobody"))
    raises(
        anthropic.AuthenticationError, lambda: Anthropic(base_url=ROOT, api_key="wrong-secret").messages.create(**ASKED)
    )
    error = raises(anthropic.BadRequestError, lambda: ask(messages=[{"role": "user", "content": TOO_LONG}]))
    assert error.body["error"]["type"] == "invalid_request_error", error.body
    raises(anthropic.BadRequestError, lambda: ask(extra_body={"stop_sequence": ["x"]}))


@check("history")
def history() -> None:
    answer = ask(tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=200)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Rain"}
        for block in answer.content
        if block.type == "tool_use"
    ]
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": results},
    ]
    assert ask(messages=messages, tools=[WEATHER]).role == "assistant"


report("anthropic")
