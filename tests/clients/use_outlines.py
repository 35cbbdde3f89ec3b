"""Outlines: from_openai and from_vllm."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import openai
import outlines
from common import KEY, MODEL, QUESTION, TOO_LONG, URL, arguments_ok, check, raises, report
from outlines.inputs import Chat
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def add_checks(row: str, model: Any) -> None:
    options = {"temperature": 0, "max_tokens": 200}

    @check("text", row)
    def text() -> None:
        assert model(QUESTION, max_tokens=20)

    @check("stream", row)
    def stream() -> None:
        assert "".join(model.stream(QUESTION, max_tokens=20))

    @check("schema", row)
    def schema() -> None:
        arguments_ok(model(QUESTION, Trip, **options))
        if row == "vllm":
            assert model(QUESTION, Literal["red", "blue"], **options) in ("red", "blue")
            assert model(QUESTION, Colour, **options) in ("red", "blue")
            assert model(QUESTION, outlines.regex("[a-c]{3}"), **options).strip("abc") == ""

    @check("errors", row)
    def errors() -> None:
        error = raises(Exception, lambda: model(TOO_LONG))
        assert "context length" in str(error), error

    @check("history", row)
    def history() -> None:
        chat = Chat([{"role": "user", "content": "Hi"}])
        chat.add_assistant_message(model(chat, max_tokens=5))
        chat.add_user_message(QUESTION)
        assert model(chat, max_tokens=5)


add_checks("openai", outlines.from_openai(client, MODEL))
add_checks("vllm", outlines.from_vllm(client, MODEL))
report("outlines")
