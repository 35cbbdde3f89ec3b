"""LlamaIndex: OpenAILike."""

from __future__ import annotations

from typing import Any, Literal

import openai
from common import HISTORY, KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

llm = OpenAILike(
    model=MODEL,
    api_base=URL,
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    max_tokens=200,
    temperature=0,
    max_retries=0,
    context_window=8192,
)
MESSAGES = [ChatMessage(role=message["role"], content=message["content"]) for message in HISTORY]


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"Rain in {city} for {days} days"


TOOL: Any = FunctionTool.from_defaults(weather, fn_schema=Trip)


@check("text")
def text() -> None:
    assert llm.chat(MESSAGES, max_tokens=30).message.content
    plain = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=False, max_tokens=10, context_window=8192)
    assert plain.complete("Once upon a time").text


@check("stream")
def stream() -> None:
    assert "".join(part.delta or "" for part in llm.stream_chat(MESSAGES, max_tokens=30))


@check("tools")
def tools() -> None:
    answer = llm.chat_with_tools([TOOL], chat_history=MESSAGES, tool_required=True)
    arguments_ok(llm.get_tool_calls_from_response(answer)[0].tool_kwargs)


@check("schema")
def schema() -> None:
    arguments_ok(llm.as_structured_llm(Trip).complete(QUESTION).raw.model_dump())


@check("errors")
def errors() -> None:
    raises(openai.BadRequestError, lambda: llm.chat([ChatMessage(role="user", content=TOO_LONG)]))


@check("history")
def history() -> None:
    answer = llm.chat_with_tools([TOOL], chat_history=MESSAGES, tool_required=True)
    results = [
        ChatMessage(role="tool", content="Rain", additional_kwargs={"tool_call_id": call.tool_id})
        for call in llm.get_tool_calls_from_response(answer)
    ]
    assert llm.chat([*MESSAGES, answer.message, *results], max_tokens=10).message.role == "assistant"


report("llama-index-llms-openai-like")
