"""pydantic-ai: chats and responses."""

from __future__ import annotations

from typing import Any, Literal

from common import KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}"


def add_checks(row: str, kind: Any) -> None:
    model = kind(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
    settings: Any = {"temperature": 0, "max_tokens": 200}

    @check("text", row)
    def text() -> None:
        result = Agent(model, model_settings=settings, instructions="Be brief.").run_sync(QUESTION)
        assert result.output
        assert result.usage.output_tokens > 0

    @check("stream", row)
    def stream() -> None:
        result = Agent(model, model_settings=settings).run_stream_sync(QUESTION)
        assert "".join(result.stream_text(delta=True))

    @check("tools", row)
    def tools() -> None:
        # the output itself is a tool, which must be called
        result = Agent(model, output_type=ToolOutput(Trip), model_settings=settings).run_sync(QUESTION)
        arguments_ok(result.output.model_dump())
        assert Agent(model, tools=[weather], model_settings=settings).run_sync(QUESTION).output

    @check("schema", row)
    def schema() -> None:
        result = Agent(model, output_type=NativeOutput(Trip), model_settings=settings).run_sync(QUESTION)
        arguments_ok(result.output.model_dump())

    @check("errors", row)
    def errors() -> None:
        error = raises(ModelHTTPError, lambda: Agent(model).run_sync(TOO_LONG))
        assert error.status_code == 400, error

    @check("history", row)
    def history() -> None:
        first = Agent(model, output_type=ToolOutput(Trip), model_settings=settings).run_sync(QUESTION)
        agent = Agent(model, model_settings={**settings, "max_tokens": 10})
        assert agent.run_sync("Thanks", message_history=first.all_messages()).output


add_checks("chat", OpenAIChatModel)
add_checks("responses", OpenAIResponsesModel)
report("pydantic-ai-slim")
