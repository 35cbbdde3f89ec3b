"""Responses: whole, or as the events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from hopskip.errors import HopskipError
from hopskip.serve.door import ChatAnswer
from hopskip.serve.responses.output import Event, Output
from hopskip.serve.responses.schema import ResponseRequest
from hopskip.serve.responses.translate import Translated


class ResponseAnswer:
    """One response as it grows.

    Args:
        answer: to `translated.chat`.
        is_stored: it can be gone on from.
    """

    def __init__(
        self, request: ResponseRequest, translated: Translated, answer: ChatAnswer, model_name: str, *, is_stored: bool
    ) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self.dropped = (*translated.dropped, *answer.dropped)
        self._is_cancelled = False
        self._answer = answer
        reasoning = request.reasoning
        self._output = Output(
            custom_tools=translated.custom_tools,
            is_summary=reasoning is not None and reasoning.is_summary,
            has_encoded=request.wants_encrypted,
        )
        self._response = {**_echo(request, answer), "id": self.id, "created_at": int(time.time())}
        self._response |= {"model": model_name, "store": is_stored}

    def cancel(self) -> dict[str, Any]:
        """End it early. Returns what there is."""
        self._is_cancelled = True
        self._answer.cancel()
        return self._snapshot("cancelled")

    def whole(self, chat: dict[str, Any]) -> dict[str, Any]:
        """The response, from the whole answer to the chat."""
        choice = chat["choices"][0]
        for _ in self._output.add(choice["message"], (choice["logprobs"] or {}).get("content")):
            pass
        for _ in self._output.finish(_status(choice["finish_reason"])):
            pass
        return self._ended(choice)

    async def events(self) -> AsyncIterator[Event]:
        """The events of a stream. The last one has the whole response."""
        number = 0
        async for event in self._events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self) -> AsyncIterator[Event]:
        yield {"type": "response.created", "response": self._snapshot("in_progress")}
        yield {"type": "response.in_progress", "response": self._snapshot("in_progress")}
        last: dict[str, Any] = {}
        try:
            async for chunk in self._answer.chunks():
                for choice in chunk["choices"]:
                    last = choice
                    logprobs = (choice["logprobs"] or {}).get("content")
                    for event in self._output.add(choice["delta"], logprobs):
                        yield event
        except HopskipError as error:
            if not self._is_cancelled:
                failure = {"code": "server_error", "message": str(error)}
                yield {"type": "response.failed", "response": {**self._snapshot("failed"), "error": failure}}
                return
            last = {**last, "finish_reason": "length"}
        for event in self._output.finish(_status(last["finish_reason"])):
            yield event
        response = self._ended(last)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        yield {"type": f"response.{kind}", "response": response}

    def _snapshot(self, status: str) -> dict[str, Any]:
        return {**self._response, "status": status, "output": list(self._output.items)}

    def _ended(self, choice: dict[str, Any]) -> dict[str, Any]:
        status = "cancelled" if self._is_cancelled else _status(choice["finish_reason"])
        response = {**self._snapshot(status), "usage": _usage(self._answer.usage)}
        if status == "completed":
            response["completed_at"] = int(time.time())
        elif status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        more = {"seed": choice["seed"]} if "seed" in choice else {}
        more |= {"dropped": list(self.dropped)} if self.dropped else {}
        return {**response, "hopskip": more} if more else response


def _status(finish_reason: str) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _echo(request: ResponseRequest, answer: ChatAnswer) -> dict[str, Any]:
    """What a response repeats of its request, and what is not known before its end."""
    params = answer.params
    form = request.text.format if request.text is not None else None
    reasoning = request.reasoning
    tools = [tool for tool in request.tools or () if tool.type in ("function", "custom")]
    choice = request.tool_choice
    return {
        "object": "response",
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "background": False,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None,
        },
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"strict": None, **tool.model_dump(exclude_none=True)} for tool in tools],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage["completion_tokens_details"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": details,
        "total_tokens": usage["total_tokens"],
    }
