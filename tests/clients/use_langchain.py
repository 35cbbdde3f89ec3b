"""LangChain: ChatOpenAI on chats and on responses, and an agent."""

from __future__ import annotations

from typing import Any, Literal

import openai
from common import HISTORY, KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


@tool
def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"Rain in {city} for {days} days"


def add_checks(row: str, **options: Any) -> None:
    model = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_retries=0, max_tokens=200, **options)

    @check("text", row)
    def text() -> None:
        answer = model.invoke(HISTORY, max_tokens=30)
        assert answer.text
        assert answer.usage_metadata["output_tokens"] > 0

    @check("stream", row)
    def stream() -> None:
        assert "".join(part.text for part in model.stream(HISTORY, max_tokens=30))

    @check("tools", row)
    def tools() -> None:
        answer = model.bind_tools([weather], tool_choice="required").invoke(HISTORY)
        assert {"city", "days"} == set(answer.tool_calls[0]["args"])
        parts = list(model.bind_tools([weather], tool_choice="weather").stream(HISTORY))
        whole = parts[0]
        for part in parts[1:]:
            whole += part
        assert {"city", "days"} == set(whole.tool_calls[0]["args"])

    @check("schema", row)
    def schema() -> None:
        for method in "json_schema", "function_calling":
            found = model.with_structured_output(Trip, method=method).invoke(QUESTION)
            arguments_ok(found.model_dump())

    @check("errors", row)
    def errors() -> None:
        error = raises(openai.BadRequestError, lambda: model.invoke(TOO_LONG))
        assert error.code == "context_length_exceeded", error

    @check("history", row)
    def history() -> None:
        answer = model.bind_tools([weather], tool_choice="required").invoke(HISTORY)
        results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls]
        again = model.bind_tools([weather]).invoke([*HISTORY, answer, *results], max_tokens=10)
        assert isinstance(again, AIMessage)
        agent = create_agent(model, [weather])
        assert agent.invoke({"messages": HISTORY}, {"recursion_limit": 4})["messages"][-1]


add_checks("chat")
add_checks("responses", use_responses_api=True)
report("langchain", "langchain-openai")
