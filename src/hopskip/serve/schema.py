"""The bodies of requests.

`policy.py` says what becomes of parameters that are not here. Limits that depend on the server's settings are checked
where requests are turned into jobs.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hopskip.serve.messages import AllowedToolsChoice, Body, Function, Message, NamedTool, Text, Tool, ToolCall

__all__ = ["AllowedToolsChoice", "Body", "Function", "Message", "NamedTool", "Text", "Tool", "ToolCall"]


def _whole(value: Any) -> Any:
    """Whole numbers as clients write them: 100, 100.0 and "100". A truth value is none."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", value.strip()):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    """Numbers as clients write them: 0.5 and "0.5"."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})", value.strip()):
        return float(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(_real)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
MaxTokens = Annotated[Whole, Field(ge=-1, le=2**31 - 1)]


class Parameters(Body):
    """A JSON object whose unknown keys are told of."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})


class StreamOptions(Parameters):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk has the usage so far."""
    include_obfuscation: bool = False
    """Accepted, without effect."""


class Speculative(Parameters):
    """How to draft for this request, within what the server was started with."""

    enabled: bool = True
    """False decodes plainly."""
    num_draft_tokens: Annotated[Whole, Field(ge=0, le=1024)] | None = None
    """At most so many tokens in a round."""
    exit_layer: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    """Early-exit drafts run so many layers."""
    race: bool = False
    """Answer twice, in turn: choice 0 with drafts, choice 1 plainly, so that their speeds compare."""


class JSONSchema(Parameters):
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Refuse a schema of which a part cannot be enforced; otherwise such parts are dropped, and the answer says so."""


class TextFormat(Parameters):
    type: Literal["text"]


class JSONObjectFormat(Parameters):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class JSONSchemaFormat(Parameters):
    type: Literal["json_schema"]
    json_schema: JSONSchema

    @model_validator(mode="before")
    @classmethod
    def _as_llama_cpp_has_it(cls, given: Any) -> Any:
        """The schema beside the type."""
        if isinstance(given, dict) and "json_schema" not in given and isinstance(given.get("schema"), dict):
            return {"type": given.get("type"), "json_schema": {"schema": given["schema"]}}
        return given


class RegexFormat(Parameters):
    type: Literal["regex"]
    pattern: Text


class GrammarFormat(Parameters):
    type: Literal["grammar"]
    grammar: Text
    """In Lark's notation, as llguidance reads it."""


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


class StructuredOutputs(Parameters):
    """What the text must look like, as vLLM has it: exactly one of the first five."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None
    """In Lark's notation or GBNF."""
    json_object: Literal[True] | None = None
    disable_fallback: bool = False
    """Accepted, without effect: there is one library that does it."""

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        names = ("json_", "regex", "choice", "grammar", "json_object")
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self


class Accepted(Parameters):
    """Parameters that clients send as a matter of course, and that change nothing here: accepted in any form."""

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    verbosity: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    prediction: Any = None
    request_id: Any = None
    priority: Any = None
    cache_prompt: Any = None
    spaces_between_special_tokens: Any = None


class Sampling(Accepted):
    """How tokens are chosen, in every API. Defaults are OpenAI's, but for what the model's makers recommend."""

    model: str | None = None
    temperature: Annotated[Real, Field(ge=0, le=2)] | None = 1.0
    """0 is greedy; the truncations below and the seed then make no difference, and are accepted."""
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] | None = None
    """Sample from the k most probable tokens; 0 and -1 are all."""
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    """Sample from tokens at least this fraction as probable as the best."""
    stop: str | list[str] | None = None
    """Empty texts stop nothing."""
    stop_token_ids: list[TokenId] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[Real, Field(gt=0, le=10)] | None = 1.0
    logit_bias: dict[str, Annotated[Real, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[Whole, Field(ge=0)] | None = None
    """Nothing ends the text before so many tokens."""
    bad_words: list[Text] | None = None
    """Texts that are kept away."""
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    speculative: Speculative | None = None
    cache_salt: Text | None = None
    """The prompt starts only from what requests with the same one, and the same API key, have left in the cache."""


class Generation(Sampling):
    """What completions and chats have in common."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    """More than there is room for is as much as there is room for, and so is -1."""
    n: Annotated[Whole, Field(ge=1)] | None = 1
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's BOS before the prompt; a chat's template does that itself. Default: true for completions."""
    prompt_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    """Log-probabilities of the prompt's tokens, with those of so many best ones, in whole answers."""
    return_tokens: bool | Literal["origins"] = False
    """Add to each choice its tokens with id, text, origin and log-probability, and what drafting has given so far.
    `origins` leaves out log-probabilities, which cost speed."""

    @field_validator("stream_options")
    @classmethod
    def _options_go_with_streams(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("it has no effect without stream=true; leave it out")
        return options


class CompletionRequest(Generation):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = False
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    suffix: str | None = None
    best_of: Annotated[Whole, Field(ge=1)] | None = None


class ChatPrompt(Parameters):
    """What makes a prompt of messages."""

    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    """End the prompt where the assistant begins to speak."""
    continue_final_message: bool = False
    """Go on from the last message; with `add_generation_prompt` false."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template is told beside the messages, by the names that it has for it."""
    enable_thinking: bool | None = None
    """Let the model think first or not, where its template has a switch for that."""
    reasoning_effort: str | None = None
    """`none` and `minimal` turn thinking off, others on, where the template has a switch; it may read the word too."""


class ChatRequest(Generation, ChatPrompt):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    modalities: list[str] | None = None
    """Text is all there is."""
    logprobs: bool | None = False
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("modalities")
    @classmethod
    def _are_text(cls, modalities: list[str]) -> list[str]:
        if set(modalities) - {"text"}:
            raise ValueError("this model answers with text only; leave it out")
        return modalities


class TokenizeRequest(ChatPrompt):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template does that itself."""
    return_token_strs: bool = False
    """Return each token's text, too."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools go with messages, not with a prompt; leave them out")
        return self


class DetokenizeRequest(Parameters):
    model: str | None = None
    tokens: list[TokenId]
