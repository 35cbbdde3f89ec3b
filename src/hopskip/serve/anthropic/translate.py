"""From Anthropic's messages to those of a chat."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from hopskip.serve.anthropic import schema
from hopskip.serve.door import chat_request
from hopskip.serve.policy import ParameterError
from hopskip.serve.schema import ChatRequest

_PREFILL = {"continue_final_message": True, "add_generation_prompt": False}
"""A last message of the assistant is the beginning of the answer."""


def translate(request: schema.Prompt) -> tuple[ChatRequest, tuple[str, ...]]:
    """The chat, and what of the request cannot be done and is left out.

    Raises:
        ParameterError: the request cannot be served.
    """
    tools = [tool for tool in request.tools or () if isinstance(tool, schema.Tool)]
    hosted = [tool.name or tool.type for tool in request.tools or () if isinstance(tool, schema.HostedTool)]
    choice = request.tool_choice
    messages = [{"role": "system", "content": text}] if (text := _text(request.system)) else []
    for message in request.messages:
        messages += _messages(message)
    chat = chat_request(
        request,
        messages=messages,
        tools=[_tool(tool) for tool in tools] or None,
        tool_choice=_choice(choice) if tools or (choice is not None and choice.type in ("any", "tool")) else None,
        parallel_tool_calls=False if tools and choice is not None and choice.disable_parallel_tool_use else None,
        response_format=_response_format(request),
        enable_thinking=None if request.thinking is None else request.thinking.type != "disabled",
        reasoning_effort=request.output_config.effort if request.output_config is not None else None,
        **(_PREFILL if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls") else {}),
        **(_answering(request) if isinstance(request, schema.MessagesRequest) else {}),
    )
    return chat, tuple(f"the tool {name[:64]}" for name in dict.fromkeys(hosted))


def _answering(request: schema.MessagesRequest) -> dict[str, Any]:
    own = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return {
        "stream": bool(request.stream),
        "max_completion_tokens": request.max_tokens,
        "stop": [*own, *(request.stop_sequences or ())] or None,
    }


def _messages(message: schema.Message) -> list[dict[str, Any]]:
    """A message as one or more of a chat's: each result of a tool is one."""
    blocks = message.content
    if isinstance(blocks, str):
        return [{"role": message.role, "content": blocks}]
    if message.role == "assistant":
        return [_assistant(blocks)]
    results: list[dict[str, Any]] = []
    texts = []
    for block in blocks:
        if isinstance(block, schema.ToolResultBlock):
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)})
        elif isinstance(block, schema.TextBlock | schema.DocumentBlock):
            texts.append(block)
        else:
            raise ParameterError(f"a block of type '{block.type}' belongs to assistant messages", param="messages")
    # results come before what the user says beside them, as Anthropic wants it
    return results + ([{"role": message.role, "content": _text(texts)}] if texts or not results else [])


def _assistant(blocks: Seq[schema.Block]) -> dict[str, Any]:
    calls = []
    for block in blocks:
        if isinstance(block, schema.ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, schema.ToolResultBlock):
            raise ParameterError("a block of type 'tool_result' belongs to user messages", param="messages")
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, schema.ThinkingBlock))
    message: dict[str, Any] = {"role": "assistant", "content": _text(blocks)}
    message |= {"reasoning_content": thoughts} if thoughts else {}
    return message | ({"tool_calls": calls} if calls else {})


def _text(content: str | Seq[Any] | None) -> str:
    """Of blocks those that are text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block in content:
        if isinstance(block, schema.TextBlock):
            texts.append(block.text)
        elif isinstance(block, schema.DocumentBlock):
            texts.append(f"{block.title}\n{block.source.data}" if block.title else block.source.data)
    return "\n".join(texts)


def _tool(tool: schema.Tool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
    function |= {"description": tool.description}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _choice(choice: schema.ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise ParameterError("tool_choice of type 'tool' has no name", param="tool_choice")
        return {"type": "function", "function": {"name": choice.name}}
    return {"any": "required"}.get(choice.type, choice.type)


def _response_format(request: schema.Prompt) -> Any:
    form = request.output_format or (request.output_config.format if request.output_config is not None else None)
    return form and {"type": "json_schema", "json_schema": {"schema": form.schema_}}
