"""What `/v1/responses` answers, for the description of the API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class _InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class _OutputDetails(BaseModel):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class Item(BaseModel):
    """A message, a call, an output of a call, or thoughts."""

    id: str
    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
    ]
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class Response(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "in_progress", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: Usage | None
    hopskip: dict[str, Any] | None = None
    """`seed` of a drawn text; `dropped`, what of the request was left out."""


class Items(BaseModel):
    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: bool


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int
