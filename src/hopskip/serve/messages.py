"""Messages and tools as clients send them. A message that any SDK has returned can be sent back as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and where it stands."""
_MEDIA = {"image": "images", "audio": "sounds", "video": "videos", "file": "files"}


class Body(BaseModel):
    """A JSON object of a request. A null is as good as nothing, and keys that are not known are ignored."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


def _read_part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        return part
    if kind not in _TEXTS:
        what = next((words for word, words in _MEDIA.items() if word in kind), f"parts of type {kind[:40]!r}")
        raise ValueError(f"{what} are not supported: this model reads text only; leave the part out")
    return {"type": "text", "text": part.get(_TEXTS[kind])}


class TextPart(Body):
    type: Literal["text"] = "text"
    text: str


Content = str | list[Annotated[TextPart, BeforeValidator(_read_part)]]


class FunctionCall(Body):
    name: Text
    arguments: str | dict[str, Any] = ""
    """JSON, or what it stands for. Empty is a call without arguments."""


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    """Stands for the content where there is none."""
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name for it."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to assistant messages, not to those of {self.role}")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of {self.role} has no content")
        return self

    @property
    def text(self) -> str:
        """The content as text; of parts all, one after the other."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Text


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(Body):
    """Only some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
