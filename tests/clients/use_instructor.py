"""instructor, in the modes that people use."""

from __future__ import annotations

from typing import Any, Literal

import instructor
from common import HISTORY, KEY, MODEL, TOO_LONG, URL, arguments_ok, check, raises, report
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field


class Place(BaseModel):
    city: Literal["Paris", "Rome"]


class Trip(BaseModel):
    """A trip."""

    place: Place
    days: int = Field(ge=1, le=9)


class City(BaseModel):
    """A city, and days there."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def client(mode: instructor.Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)


def ask(mode: instructor.Mode, kind: Any, **options: Any) -> Any:
    given = {"messages": HISTORY, "temperature": 0, "max_retries": 0, "max_tokens": 300, **options}
    return client(mode).chat.completions.create(model=MODEL, response_model=kind, **given)


@check("tools")
def tools() -> None:
    arguments_ok(ask(instructor.Mode.TOOLS, City).model_dump())
    assert 1 <= ask(instructor.Mode.TOOLS, Trip).days <= 9  # with $defs


@check("schema")
def schema() -> None:
    arguments_ok(ask(instructor.Mode.JSON_SCHEMA, City).model_dump())
    assert 1 <= ask(instructor.Mode.JSON_SCHEMA, Trip).days <= 9
    arguments_ok(ask(instructor.Mode.TOOLS_STRICT, City).model_dump())


@check("stream")
def stream() -> None:
    parts = list(
        client(instructor.Mode.TOOLS).chat.completions.create_partial(
            model=MODEL, response_model=City, messages=HISTORY, temperature=0, max_tokens=300
        )
    )
    arguments_ok(parts[-1].model_dump())


@check("errors")
def errors() -> None:
    too_long = [{"role": "user", "content": TOO_LONG}]
    error = raises(Exception, lambda: ask(instructor.Mode.TOOLS, City, messages=too_long))
    assert "context length" in str(error) or isinstance(error, BadRequestError), error


@check("history")
def history() -> None:
    answer, completion = client(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        model=MODEL, response_model=City, messages=HISTORY, temperature=0, max_tokens=300
    )
    message = completion.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "No"} for call in message.tool_calls]
    again = [*HISTORY, message.model_dump(), *results, {"role": "user", "content": "Correct it."}]
    arguments_ok(ask(instructor.Mode.TOOLS, City, messages=again).model_dump())
    assert answer


report("instructor")
