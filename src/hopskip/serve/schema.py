"""The bodies of requests. Types are strict, and an unknown parameter is an error: nothing is ignored silently.

Limits that depend on the server's settings are checked where requests are turned into jobs (`jobs.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Speculative(_Model):
    """How to draft for this request, within what the server was started with."""

    enabled: bool = True
    """False decodes plainly."""
    num_draft_tokens: Annotated[int, Field(ge=0, le=1024)] | None = None
    """At most so many tokens in a round."""
    exit_layer: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Early-exit drafts run so many layers."""
    race: bool = False
    """Answer twice, in turn: choice 0 with drafts, choice 1 plainly, so that their speeds compare."""


class JSONSchema(_Model):
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Refuse a schema of which a part cannot be enforced; otherwise such parts are dropped, and the answer says so."""


class TextFormat(_Model):
    type: Literal["text"]


class JSONObjectFormat(_Model):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class JSONSchemaFormat(_Model):
    type: Literal["json_schema"]
    json_schema: JSONSchema


class RegexFormat(_Model):
    type: Literal["regex"]
    pattern: Text


class GrammarFormat(_Model):
    type: Literal["grammar"]
    grammar: Text
    """In Lark's notation, as llguidance reads it."""


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


class Generation(_Model):
    """What completions and chats have in common. Defaults are OpenAI's, but for what the model's makers recommend."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    """0 is greedy; the truncations below and the seed then make no difference, and are accepted."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Sample from the k most probable tokens; 0 is all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample from tokens at least this fraction as probable as the best."""
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: Text | list[Text] | None = None
    stop_token_ids: list[TokenId] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    speculative: Speculative | None = None
    return_tokens: bool | Literal["origins"] = False
    """Add to each choice its tokens with id, text, origin and log-probability, and what drafting has given so far.
    `origins` leaves out log-probabilities, which cost speed."""
    cache_salt: Text | None = None
    """The prompt starts only from what requests with the same one, and the same API key, have left in the cache."""
    user: str | None = None
    """Accepted for the sake of clients that always send it; nothing depends on it."""

    @model_validator(mode="after")
    def _options_go_with_streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream=true; leave it out")
        return self


class CompletionRequest(Generation):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


class TextPart(_Model):
    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    name: Text
    arguments: str


class ToolCall(_Model):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls belong to assistant messages, not to those of {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of {self.role} has no content")
        return self


class Function(_Model):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    name: Text


class NamedTool(_Model):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(_Model):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _is_one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Model):
    model: str | None = None
    tokens: list[TokenId]
