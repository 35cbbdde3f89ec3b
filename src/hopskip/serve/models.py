"""What the routes answer, for the description of the API. Tests hold the answers against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetails(_Shape):
    message: str
    type: str
    param: str | None
    """The parameter concerned."""
    code: str | None


class Error(_Shape):
    """An error in OpenAI's shape."""

    error: ErrorDetails


class PromptTokensDetails(_Shape):
    cached_tokens: int


class CompletionTokensDetails(_Shape):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    """Draft tokens accepted."""
    rejected_prediction_tokens: int


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    speedup_over_plain: float | None = None
    """Over decoding without drafts, by estimate; none without drafts."""


class Dropped(_Shape):
    dropped: list[str]
    """Parts of a JSON schema that are not enforced."""


class Details(_Shape):
    """Under `return_tokens`."""

    tokens: list[dict[str, Any]]
    stats: dict[str, Any]
    race: dict[str, Any] | None = None


class PromptLogprob(_Shape):
    logprob: float
    rank: int
    decoded_token: str


class _Answer(_Shape):
    id: str
    created: int
    model: str
    hopskip: Dropped | None = None


class _Choice(_Shape):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    """None as long as a stream goes on."""
    seed: int | None = None
    """Of a drawn text: a request with it gets the text again."""
    hopskip: Details | None = None


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(_Shape):
    name: str
    arguments: str
    """JSON."""


class ToolCall(_Shape):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(_Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    message: Message
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class FunctionDelta(_Shape):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(_Shape):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(_Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class ChatChunk(_Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    hopskip: dict[str, Any]


class ModelList(_Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(_Shape):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None
    """Under `return_token_strs`."""


class Prompt(_Shape):
    prompt: str


class Health(_Shape):
    status: Literal["ok", "draining", "dead"]
