"""The bodies of requests to `/v1/messages`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from hopskip.serve.messages import Body, Text
from hopskip.serve.schema import MaxTokens, Parameters, Sampling

_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result", "document")


def _known_block(block: Any) -> Any:
    if isinstance(block, str):
        return {"type": "text", "text": block}
    kind = block.get("type") if isinstance(block, dict) else None
    if kind is not None and kind not in _BLOCKS:
        what = "images are" if kind == "image" else f"blocks of type {str(kind)[:40]!r} are"
        raise ValueError(f"{what} not supported: this model reads text only; leave the block out")
    return block


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str = ""


class RedactedBlock(Body):
    """Another server's thoughts: nobody can read them here."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any] = Field(default_factory=dict)


class _TextSource(Body):
    type: Literal["text"]
    data: str


class DocumentBlock(Body):
    """A text of its own."""

    type: Literal["document"]
    source: _TextSource
    title: str | None = None


InResult = Annotated[
    Annotated[TextBlock | DocumentBlock, Field(discriminator="type")],
    BeforeValidator(_known_block),
]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: str | list[InResult] = ""
    is_error: bool = False
    """Accepted, without effect: the content says what went wrong."""


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock | DocumentBlock,
        Field(discriminator="type"),
    ],
    BeforeValidator(_known_block),
]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Body):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class HostedTool(Body):
    """A tool of Anthropic's. There are none here: it is left out, and the answer says so."""

    type: Text
    name: str | None = None


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if kind in (None, "custom") else "hosted"


AnyTool = Annotated[Annotated[Tool, Tag("custom")] | Annotated[HostedTool, Tag("hosted")], Discriminator(_tool_kind)]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    """Accepted, without effect: thoughts end where the model ends them, and count as output."""


class JSONFormat(Parameters):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Parameters):
    format: JSONFormat | None = None
    effort: str | None = None
    """As `reasoning_effort` of chats."""


class Prompt(Sampling):
    """What a prompt is made of."""

    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[AnyTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    """Lets the model think first or not, where its template has a switch for that."""
    output_config: OutputConfig | None = None
    output_format: JSONFormat | None = None
    """Another name of `output_config.format`."""
    cache_control: Any = None
    """Accepted, without effect, like all that follow: prompts are kept as long as there is room."""
    context_management: Any = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    betas: Any = None


class MessagesRequest(Prompt):
    max_tokens: MaxTokens
    """More than there is room for is as much as there is room for."""
    stop_sequences: list[str] | None = None
    stream: bool | None = False
