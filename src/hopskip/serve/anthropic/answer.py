"""Answers in Anthropic's shapes: whole, or as the events of a stream."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hopskip.errors import HopskipError
from hopskip.serve.anthropic.errors import error_body
from hopskip.serve.door import ChatAnswer
from hopskip.serve.engine_thread import UnavailableError

Event = dict[str, Any]

_EMPTY: dict[str, dict[str, Any]] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}


class MessageAnswer:
    """One message as it grows.

    Args:
        dropped: what of the request is left out, beside what the answer says.
    """

    def __init__(self, answer: ChatAnswer, model_name: str, dropped: tuple[str, ...]) -> None:
        self.dropped = (*dropped, *answer.dropped)
        self._answer = answer
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model_name}
        self._kind: str | int | None = None
        """Of the block that grows: `thinking`, `text`, or a call's index."""
        self._num_blocks = 0

    def whole(self, chat: dict[str, Any]) -> dict[str, Any]:
        """The message, from the whole answer to the chat."""
        choice = chat["choices"][0]
        message = choice["message"]
        content: list[dict[str, Any]] = []
        if thoughts := message.get("reasoning_content"):
            content.append({**_EMPTY["thinking"], "thinking": thoughts})
        if message["content"]:
            content.append({**_EMPTY["text"], "text": message["content"]})
        calls = message.get("tool_calls") or ()
        content += [{**_tool_use(call), "input": _input(call["function"]["arguments"])} for call in calls]
        ending = {"stop_reason": self._stop_reason(choice), "stop_sequence": self._answer.stop_text}
        more = {"hopskip": {"dropped": list(self.dropped)}} if self.dropped else {}
        return {**self._head, "content": content, **ending, "usage": _usage(self._answer.usage), **more}

    async def events(self) -> AsyncIterator[Event]:
        """The events of a stream."""
        usage = {
            "input_tokens": self._answer.num_prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield {"type": "message_start", "message": {**self._head, **empty}}
        yield {"type": "ping"}
        last: dict[str, Any] = {}
        try:
            async for chunk in self._answer.chunks():
                for choice in chunk["choices"]:
                    last = choice
                    for event in self._of_delta(choice["delta"]):
                        yield event
        except HopskipError as error:
            yield error_body(503 if isinstance(error, UnavailableError) else 500, str(error))
            return
        for event in self._close():
            yield event
        ending = {"stop_reason": self._stop_reason(last), "stop_sequence": self._answer.stop_text}
        yield {"type": "message_delta", "delta": ending, "usage": _usage(self._answer.usage)}
        yield {"type": "message_stop"}

    def _of_delta(self, delta: dict[str, Any]) -> Iterator[Event]:
        if thoughts := delta.get("reasoning_content"):
            yield from self._begin("thinking", _EMPTY["thinking"])
            yield self._delta({"type": "thinking_delta", "thinking": thoughts})
        if text := delta.get("content"):
            yield from self._begin("text", _EMPTY["text"])
            yield self._delta({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            yield from self._begin(call["index"], call)
            if arguments := call["function"].get("arguments"):
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _begin(self, kind: str | int, block: dict[str, Any]) -> Iterator[Event]:
        if kind == self._kind:
            return
        yield from self._close()
        self._kind = kind
        start = _tool_use(block) if isinstance(kind, int) else block
        yield {"type": "content_block_start", "index": self._num_blocks, "content_block": start}

    def _close(self) -> Iterator[Event]:
        if self._kind is not None:
            yield {"type": "content_block_stop", "index": self._num_blocks}
            self._kind = None
            self._num_blocks += 1

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}

    def _stop_reason(self, choice: dict[str, Any]) -> str:
        if self._answer.stop_text is not None:
            return "stop_sequence"
        return {"length": "max_tokens", "tool_calls": "tool_use"}.get(choice["finish_reason"], "end_turn")


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}


def _input(arguments: str) -> Any:
    """Of a call that was cut short, nothing: an object is all that may stand there."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    """In Anthropic's shape, where cached tokens count apart."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
