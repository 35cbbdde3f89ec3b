"""From the messages of a chat, and tools, to the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from hopskip.errors import PromptError
from hopskip.text.chat_template import check_messages, cut_after
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tools.base import ToolFormat
from hopskip.text.tools.formats import FORMATS, ToolFormatName, format_of_template
from hopskip.text.tools.prompt import needs_prompt, system_into_user, with_tools


def tool_format_of(tokenizer: Tokenizer, name: ToolFormatName = "auto") -> ToolFormat:
    """How a model writes calls; `auto` is as its chat template does."""
    if name != "auto":
        return FORMATS[name]
    knows_tools = tokenizer.chat is not None and tokenizer.chat.knows_tools
    return format_of_template(tokenizer.chat.for_tools.source if tokenizer.chat is not None else "", knows_tools)


def render_chat(
    tokenizer: Tokenizer,
    messages: Seq[Mapping[str, Any]],
    *,
    tools: Seq[Any] | None = None,
    tool_format: ToolFormat | None = None,
    **variables: Any,
) -> str:
    """The text of a chat, as `Tokenizer.render_chat`. A template that knows no tools is told of them in its own words.

    Args:
        tools: as OpenAI writes them.
        tool_format: None is the model's own.
        variables: for the template.

    Raises:
        PromptError: the model has no chat template, or it refuses these messages.
    """
    check_messages(messages)
    tool_format = tool_format or tool_format_of(tokenizer)
    messages = tool_format.history(messages)
    knows_tools = tokenizer.chat is None or tokenizer.chat.knows_tools
    if knows_tools or not needs_prompt(messages, tools):
        return tokenizer.render_chat(messages, **(variables | {"tools": tools} if tools else variables))
    told = with_tools(messages, tools, tool_format)
    try:
        return tokenizer.render_chat(told, **variables)
    except PromptError:
        plain = system_into_user(told)
        if plain == told:
            raise
        return tokenizer.render_chat(plain, **variables)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Seq[Mapping[str, Any]],
    *,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    **arguments: Any,
) -> list[int]:
    """Token ids of what `render_chat` makes of a chat.

    Args:
        continue_final_message: end behind the last message, for the model to go on with it; with
            `add_generation_prompt` false.
        add_special_tokens: put BOS first, which most templates do themselves.

    Raises:
        PromptError: as `render_chat`, or something is nested too deeply.
    """
    try:
        text = render_chat(tokenizer, messages, **arguments)
    except RecursionError:
        raise PromptError("the messages or tools hold JSON that is nested too deeply; flatten it") from None
    if continue_final_message:
        text = cut_after(text, str(messages[-1].get("content") or ""))
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
