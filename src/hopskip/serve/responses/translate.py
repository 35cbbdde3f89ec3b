"""From a request for a response to one for a chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hopskip.serve.door import chat_request
from hopskip.serve.policy import ParameterError
from hopskip.serve.responses import schema
from hopskip.serve.responses.items import CUSTOM_ARGUMENT, chat_messages, shown
from hopskip.serve.responses.store import ResponseStore
from hopskip.serve.schema import ChatRequest

_TEXT_INPUT = {
    "type": "object",
    "properties": {CUSTOM_ARGUMENT: {"type": "string"}},
    "required": [CUSTOM_ARGUMENT],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Translated:
    """A request for a response as a chat."""

    chat: ChatRequest
    items: list[dict[str, Any]]
    """All that the response is given, those of earlier ones too."""
    custom_tools: frozenset[str]
    """Names of tools that take a text."""
    dropped: tuple[str, ...]
    """What of the request cannot be done, and is left out."""


def translate(request: schema.PromptRequest, store: ResponseStore, client: str | None) -> Translated:
    """Raises ParameterError: the request cannot be served."""
    items = _items(request, store, client)
    tools = [tool for tool in request.tools or () if not isinstance(tool, schema.HostedTool)]
    hosted = [tool.type[:64] for tool in request.tools or () if isinstance(tool, schema.HostedTool)]
    choice: Any = request.tool_choice
    if isinstance(choice, schema.AllowedTools):
        names = {allowed.name for allowed in choice.tools}
        if missing := names - {tool.name for tool in tools}:
            message = f"tool_choice allows {min(missing)[:64]!r}, which is not among the tools"
            raise ParameterError(message, param="tool_choice")
        tools = [tool for tool in tools if tool.name in names]
        choice = choice.mode
    elif isinstance(choice, schema.NamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    chat = chat_request(
        request,
        messages=chat_messages(items, request.instructions),
        tools=[_chat_tool(tool) for tool in tools] or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request.text),
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        chat_template_kwargs=request.chat_template_kwargs,
        **(_answering(request) if isinstance(request, schema.ResponseRequest) else {}),
    )
    return Translated(
        chat,
        items,
        frozenset(tool.name for tool in tools if isinstance(tool, schema.CustomTool)),
        tuple(f"the tool {name}" for name in dict.fromkeys(hosted)),
    )


def _answering(request: schema.ResponseRequest) -> dict[str, Any]:
    return {
        "stream": bool(request.stream),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": request.wants_logprobs,
        "top_logprobs": request.top_logprobs if request.wants_logprobs else None,
    }


def _items(request: schema.PromptRequest, store: ResponseStore, client: str | None) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if (id := request.previous_response_id) is not None:
        previous = store.get(client, id)
        if previous is None:
            raise ParameterError(
                f"Previous response with id '{id[:64]}' not found. {_remedy(store)}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        items += [*previous.items, *previous.response["output"]]
    given = request.input
    if isinstance(given, str):
        given = [schema.Message(role="user", content=given)]
    for item in given or ():
        if not isinstance(item, schema.ItemReference):
            items.append(shown(item))
        elif (found := store.item(client, item.id)) is not None:
            items.append(found)
        else:
            raise ParameterError(f"Item with id '{item.id[:64]}' not found. {_remedy(store)}", param="input")
    return items


def _remedy(store: ResponseStore) -> str:
    if not store.is_on:
        return "This server stores no responses: send the whole input."
    return "Responses are kept in memory, and only the last ones: send the whole input."


def _chat_tool(tool: schema.FunctionTool | schema.CustomTool) -> dict[str, Any]:
    if isinstance(tool, schema.CustomTool):
        function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": _TEXT_INPUT}
    else:
        function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _response_format(text: schema.TextConfig | None) -> Any:
    form = text.format if text is not None else None
    if isinstance(form, schema.JSONSchemaFormat):
        return {
            "type": "json_schema",
            "json_schema": form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True),
        }
    return form
