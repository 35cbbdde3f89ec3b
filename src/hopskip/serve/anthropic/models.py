"""What `/v1/messages` answers, for the description of the API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    input_tokens: int
    """Those that were computed."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Block(BaseModel):
    """Text, thoughts, or a call."""

    type: Literal["text", "thinking", "tool_use"]


class Message(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: Usage
    hopskip: dict[str, Any] | None = None
    """`dropped`, what of the request was left out."""


class Count(BaseModel):
    input_tokens: int


class _Details(BaseModel):
    type: str
    message: str


class Error(BaseModel):
    """An error in Anthropic's shape."""

    type: Literal["error"]
    error: _Details
