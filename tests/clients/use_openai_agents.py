"""OpenAI Agents: on responses, its default, and on chats."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from common import KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel, Field

set_tracing_disabled(True)


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}"


def add_checks(row: str, kind: Any) -> None:
    def agent(**options: Any) -> Any:
        model = kind(model=MODEL, openai_client=AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0))
        settings = options.pop("settings", {})
        given = ModelSettings(temperature=0, max_tokens=200, **settings)
        return Agent(name="Guide", instructions="Be brief.", model=model, model_settings=given, **options)

    def run(asked: Any, question: Any = QUESTION, **options: Any) -> Any:
        return asyncio.run(Runner.run(asked, question, max_turns=3, **options))

    @check("text", row)
    def text() -> None:
        assert run(agent()).final_output

    @check("stream", row)
    def stream() -> None:
        async def collect() -> str:
            result = Runner.run_streamed(agent(), QUESTION)
            pieces = [
                event.data.delta
                async for event in result.stream_events()
                if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
            ]
            assert "".join(pieces) == result.final_output
            return str(result.final_output)

        assert asyncio.run(collect())

    @check("tools", row)
    def tools() -> None:
        # the first turn must call; after it the SDK leaves the choice to the model
        result = run(agent(tools=[weather], settings={"tool_choice": "required"}))
        kinds = [item.type for item in result.new_items]
        assert "tool_call_item" in kinds, kinds
        assert "tool_call_output_item" in kinds, kinds
        assert result.final_output

    @check("schema", row)
    def schema() -> None:
        arguments_ok(run(agent(output_type=Trip)).final_output.model_dump())

    @check("errors", row)
    def errors() -> None:
        error = raises(openai.BadRequestError, lambda: run(agent(), TOO_LONG))
        assert error.code == "context_length_exceeded", error

    @check("history", row)
    def history() -> None:
        first = run(agent(tools=[weather], settings={"tool_choice": "required"}))
        assert run(agent(), [*first.to_input_list(), {"role": "user", "content": "Thanks"}]).final_output

        async def in_session() -> Any:
            session = SQLiteSession("one")
            await Runner.run(agent(), QUESTION, session=session)
            return await Runner.run(agent(), "And more?", session=session)

        assert asyncio.run(in_session()).final_output


add_checks("responses", OpenAIResponsesModel)
add_checks("chat", OpenAIChatCompletionsModel)
report("openai-agents")
