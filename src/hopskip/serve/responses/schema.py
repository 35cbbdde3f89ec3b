"""The bodies of requests to `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from hopskip.serve.messages import Body, Content, Function, Text
from hopskip.serve.schema import (
    GrammarFormat,
    JSONObjectFormat,
    JSONSchema,
    MaxTokens,
    Parameters,
    RegexFormat,
    Sampling,
    TextFormat,
    Whole,
)

_ITEMS = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "item_reference",
)


class Message(Body):
    id: str | None = None
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCall(Body):
    id: str | None = None
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: str = ""


class CustomCall(Body):
    id: str | None = None
    type: Literal["custom_tool_call"]
    call_id: Text
    name: Text
    input: str = ""


class CallOutput(Body):
    id: str | None = None
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Text
    output: Content


class _Thought(Body):
    text: str = ""


class Reasoning(Body):
    id: str | None = None
    type: Literal["reasoning"]
    summary: list[_Thought] = Field(default_factory=list)
    content: list[_Thought] = Field(default_factory=list)
    encrypted_content: str | None = None


class ItemReference(Body):
    type: Literal["item_reference"] = "item_reference"
    id: Text


def _kind(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    if kind is None and isinstance(item, dict):
        return "item_reference" if "id" in item and "role" not in item else "message"
    return "call_output" if kind in ("function_call_output", "custom_tool_call_output") else str(kind)


def _known_item(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind is not None and kind not in _ITEMS:
        raise ValueError(f"an item of type {str(kind)[:40]!r} is not supported; there are {', '.join(_ITEMS)}")
    return item


Item = Annotated[
    Annotated[
        Annotated[Message, Tag("message")]
        | Annotated[FunctionCall, Tag("function_call")]
        | Annotated[CustomCall, Tag("custom_tool_call")]
        | Annotated[CallOutput, Tag("call_output")]
        | Annotated[Reasoning, Tag("reasoning")]
        | Annotated[ItemReference, Tag("item_reference")],
        Discriminator(_kind),
    ],
    BeforeValidator(_known_item),
]


class FunctionTool(Function):
    type: Literal["function"]


class CustomTool(Body):
    """A tool that takes a text as it is."""

    type: Literal["custom"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None


class HostedTool(Body):
    """A tool of somebody else's server. There are none here: it is left out, and the answer says so."""

    type: Text


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "custom") else "hosted"


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_tool_kind),
]


class NamedTool(Body):
    type: Literal["function", "custom"]
    name: Text


class AllowedTools(Body):
    """Only these of the tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class JSONSchemaFormat(JSONSchema):
    type: Literal["json_schema"]


class TextConfig(Parameters):
    """What the text looks like."""

    format: (
        Annotated[
            TextFormat | JSONObjectFormat | JSONSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
        ]
        | None
    ) = None
    verbosity: Any = None
    """Accepted, without effect."""


class ReasoningConfig(Parameters):
    effort: str | None = None
    """As `reasoning_effort` of chats."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """With any of them, thoughts come as a summary (whole, for nobody shortens them); otherwise as content."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Another name of `summary`."""
    context: Any = None
    mode: Any = None

    @property
    def is_summary(self) -> bool:
        return (self.summary or self.generate_summary) is not None


class StreamOptions(Parameters):
    include_obfuscation: Any = None
    """Accepted, without effect."""


class PromptRequest(Sampling):
    """What a prompt is made of."""

    input: str | Annotated[list[Item], Field(min_length=1)] | None = None
    """A text, or messages, calls, their outputs and thoughts, and references to items that are stored here."""
    instructions: str | None = None
    """A system message. It is not part of what a later response goes on from."""
    previous_response_id: Text | None = None
    """Go on from a response that is stored here."""
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template is told beside the messages, by the names that it has for it."""
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Any = None
    prompt: Any = None

    @model_validator(mode="after")
    def _can_be_done(self) -> PromptRequest:
        if self.truncation == "auto":
            raise ValueError("truncation 'auto' is not supported: shorten the input yourself, and leave it out")
        if self.conversation is not None:
            raise ValueError("conversations are not kept here: use previous_response_id, and leave conversation out")
        if self.prompt is not None:
            raise ValueError("prompts are not kept here: give input and instructions, and leave prompt out")
        if not self.input and self.previous_response_id is None:
            raise ValueError("input is missing or empty; give a text or a list of items")
        return self


class ResponseRequest(PromptRequest):
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_output_tokens: MaxTokens | None = None
    """More than there is room for is as much as there is room for."""
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    include: list[str] | None = None
    """`message.output_text.logprobs` and `reasoning.encrypted_content` have an effect: thoughts that a client may send
    back without knowing what they are. They are encoded, not encrypted."""
    store: bool | None = True
    """Keep the response in memory, for `previous_response_id` and to be fetched."""
    metadata: dict[str, Any] | None = None
    background: bool | None = False
    max_tool_calls: Any = None
    """Accepted, without effect: no tool is called here."""
    context_management: Any = None
    client_metadata: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None

    @model_validator(mode="after")
    def _is_not_in_the_background(self) -> ResponseRequest:
        if self.background:
            raise ValueError("background is not supported; leave it out")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_encrypted(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or ())
