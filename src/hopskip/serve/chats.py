"""What a chat asks for beside its messages: tools, thinking, and how its answer is to be read."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal

from hopskip.errors import ConfigError
from hopskip.serve import schema
from hopskip.serve.policy import ParameterError
from hopskip.text.answer_reader import AnswerFormat
from hopskip.text.chat import tool_format_of
from hopskip.text.grammar_build import Kind
from hopskip.text.inputs import THINKING_SWITCHES, template_variables
from hopskip.text.reasoning import ReasoningFormat, ReasoningMarks, reasoning_of_template
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tools.base import Marks, Tool
from hopskip.text.tools.formats import ToolFormatName

_OWN = ("tools", "add_generation_prompt")
"""What templates are told by parameters of their own."""
_NO_EFFORT = ("none", "minimal")


class ChatFormat:
    """How one model writes what is no plain text, and what its template is told.

    Args:
        tool_format: `auto` is the template's own.
        reasoning_format: `auto` splits off what the template marks as thoughts.
    """

    def __init__(self, tokenizer: Tokenizer, tool_format: ToolFormatName, reasoning_format: ReasoningFormat) -> None:
        self._tokenizer = tokenizer
        self._marks = Marks(tokenizer.added_ids)
        self.tool_format = tool_format_of(tokenizer, tool_format)
        self._reasoning: ReasoningMarks | None = None
        if tokenizer.chat is not None:
            self._reasoning = reasoning_of_template(tokenizer.chat.source, reasoning_format)

    def variables(self, request: schema.ChatPrompt) -> dict[str, Any]:
        """What the chat template is told of a request.

        Raises:
            ConfigError: the template has no use for one of `chat_template_kwargs`.
        """
        known = self._tokenizer.template_variables
        given = dict(request.chat_template_kwargs or {})
        for name in _OWN:
            if name in given:
                message = f"chat_template_kwargs has {name!r}; give it as a parameter of the request"
                raise ParameterError(message, param="chat_template_kwargs")
        switched = [given.pop(name) for name in THINKING_SWITCHES if isinstance(given.get(name), bool)]
        effort = request.reasoning_effort
        wanted = next((value for value in (*switched, request.enable_thinking) if value is not None), None)
        if wanted is None and effort is not None:
            wanted = effort not in _NO_EFFORT
        can_switch = any(name in known for name in THINKING_SWITCHES)
        if effort is not None and "reasoning_effort" in known:
            given.setdefault("reasoning_effort", effort)
        # clients send the switch to all models; those without one go on as they do
        return template_variables(self._tokenizer, wanted if can_switch else None, given)

    def answer_format(
        self, request: schema.ChatRequest, tools: Seq[schema.Tool], prompt_ids: Seq[int]
    ) -> AnswerFormat | None:
        """How the answer to a prompt is to be read; None if it is plain text.

        Args:
            tools: those that the model is told of.
        """
        is_open = self._reasoning.is_open(self._tokenizer, prompt_ids) if self._reasoning is not None else False
        reasoning = None if is_open is False else self._reasoning
        if reasoning is None and not tools:
            return None
        must_call = bool(tools) and choice_of(request) != "auto"
        marks = set(self.tool_format.marks if tools else ())
        marks |= {reasoning.opening, reasoning.closing} if reasoning is not None else set()
        return AnswerFormat(
            reasoning=reasoning,
            is_open=bool(is_open),
            tool_format=self.tool_format if tools else None,
            tools=[_tool(tool) for tool in _named(tools, choice_of(request))],
            must_call=must_call,
            parallel=request.parallel_tool_calls is not False,
            special_ids={mark: index for mark in marks if (index := self._tokenizer.special_id(mark)) is not None},
        )

    def calls_grammar(self, request: schema.ChatRequest, answer: AnswerFormat) -> tuple[tuple[Kind, str], list[str]]:
        """The grammar of the calls that a request wants, and what of its schemas is not enforced.

        Raises:
            ConfigError: a tool cannot be called in the model's format, or its strict schema cannot be enforced.
        """
        assert answer.tool_format is not None
        parallel = answer.parallel and choice_of(request) == "required"
        grammar = answer.tool_format.grammar(answer.tools, self._marks, parallel=parallel)
        dropped: list[str] = []
        for tool in answer.tools:
            missing = answer.tool_format.unenforced(tool)
            if missing and tool.strict:
                raise ConfigError(f"the JSON schema is strict, but this cannot be enforced: {'; '.join(missing)}")
            dropped += missing
        return ("lark", grammar), dropped

    def before_answer(self, answer: AnswerFormat | None) -> str:
        """The grammar of what may come before a constrained answer: thoughts. Empty if there are none."""
        if answer is None or answer.reasoning is None:
            return ""
        return answer.reasoning.grammar(self._marks, is_open=True if answer.is_open else None)


def choice_of(request: schema.ChatRequest) -> Literal["none", "auto", "required"] | schema.NamedTool:
    """Whether tools must be called: any, or the named one."""
    choice = request.tool_choice
    return choice.allowed_tools.mode if isinstance(choice, schema.AllowedToolsChoice) else choice or "auto"


def allowed_tools(tools: Seq[schema.Tool], choice: Any) -> list[schema.Tool]:
    """The tools that a `tool_choice` leaves.

    Raises:
        ParameterError: it names another.
    """
    if not isinstance(choice, schema.AllowedToolsChoice):
        return list(tools)
    named = [tool for allowed in choice.allowed_tools.tools for tool in _named(tools, allowed)]
    return [tool for tool in tools if tool in named]


def _named(tools: Seq[schema.Tool], choice: str | schema.NamedTool) -> list[schema.Tool]:
    if isinstance(choice, str):
        return list(tools)
    chosen = [tool for tool in tools if tool.function.name == choice.function.name]
    if not chosen:
        message = f"tool_choice names {choice.function.name!r}, which is not among the tools"
        raise ParameterError(message, param="tool_choice")
    return chosen[:1]


def _tool(tool: schema.Tool) -> Tool:
    function = tool.function
    return Tool(name=function.name, parameters=function.parameters, strict=bool(function.strict))


def thoughts_of(message: schema.Message) -> dict[str, Any]:
    """The thoughts of an earlier answer, under the names that templates have for them."""
    thoughts = message.reasoning_content or message.reasoning
    return {"reasoning_content": thoughts, "reasoning": thoughts} if thoughts else {}
