"""What a response says, item by item: events of a stream, and the items when all is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hopskip.serve.responses.items import encoded, input_of_custom, new_id

Event = dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """Where the text of an item stands, and what its events are called."""

    place: str
    number: str
    part_event: str
    text_event: str
    empty: dict[str, Any]


_OUTPUT_TEXT = _Part(
    "content",
    "content_index",
    "response.content_part",
    "response.output_text",
    {"type": "output_text", "annotations": [], "logprobs": [], "text": ""},
)
_THOUGHTS = _Part(
    "content",
    "content_index",
    "response.content_part",
    "response.reasoning_text",
    {"type": "reasoning_text", "text": ""},
)
_SUMMARY = _Part(
    "summary",
    "summary_index",
    "response.reasoning_summary_part",
    "response.reasoning_summary_text",
    {"type": "summary_text", "text": ""},
)


@dataclass
class _Open:
    """The item that grows."""

    item: dict[str, Any]
    index: int
    part: _Part | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    call: int | None = None
    """The call's index among those of the chat's answer."""

    @property
    def at(self) -> dict[str, Any]:
        place = {"item_id": self.item["id"], "output_index": self.index}
        return place if self.part is None else {**place, self.part.number: 0}


class Output:
    """The items of a response. It is told the deltas of a chat, and says the events that follow from them.

    Args:
        custom_tools: names of tools that take a text instead of JSON.
        is_summary: thoughts are shown as a summary.
        has_encoded: thoughts come encoded, too.
    """

    def __init__(self, *, custom_tools: frozenset[str], is_summary: bool, has_encoded: bool) -> None:
        self._custom_tools = custom_tools
        self._thoughts = _SUMMARY if is_summary else _THOUGHTS
        self._has_encoded = has_encoded
        self.items: list[dict[str, Any]] = []
        self._open: _Open | None = None

    def add(self, delta: dict[str, Any], logprobs: list[Any] | None = None) -> Iterator[Event]:
        """What follows from a delta of a chat's choice, or from a message as its only one.

        Args:
            logprobs: of its tokens; those of text are kept.
        """
        if thoughts := delta.get("reasoning_content"):
            yield from self._text("reasoning", self._thoughts, thoughts, [])
        is_text = self._open is not None and self._open.part is _OUTPUT_TEXT and not delta.get("tool_calls")
        if delta.get("content") or (is_text and logprobs):
            yield from self._text("message", _OUTPUT_TEXT, delta.get("content") or "", logprobs or [])
        for index, call in enumerate(delta.get("tool_calls") or ()):
            yield from self._call(call.get("index", index), call)

    def finish(self, status: str) -> Iterator[Event]:
        """The text has ended.

        Args:
            status: of the last item: `completed` or `incomplete`.
        """
        if not self.items:
            yield from self._text("message", _OUTPUT_TEXT, "", [])
        yield from self._close(status)

    def _text(self, kind: str, part: _Part, text: str, logprobs: list[Any]) -> Iterator[Event]:
        if self._open is None or self._open.part is not part:
            yield from self._close()
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin({"id": new_id(kind), "type": kind, "status": "in_progress", "content": [], **more})
            assert self._open is not None
            self._open.part = part
            yield {"type": f"{part.part_event}.added", **self._open.at, "part": dict(part.empty)}
        item = self._open
        assert item is not None
        item.pieces.append(text)
        item.logprobs += logprobs
        if text or logprobs:
            more = {"logprobs": logprobs} if part is _OUTPUT_TEXT else {}
            yield {"type": f"{part.text_event}.delta", **item.at, "delta": text, **more}

    def _call(self, index: int, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if self._open is None or self._open.call != index:
            yield from self._close()
            name = function["name"]
            is_custom = name in self._custom_tools
            kind, given = ("custom_tool_call", "input") if is_custom else ("function_call", "arguments")
            head = {"id": new_id(kind), "type": kind, "status": "in_progress"}
            yield from self._begin({**head, "call_id": call["id"], "name": name, given: ""})
            assert self._open is not None
            self._open.call = index
        item = self._open
        assert item is not None
        arguments = function.get("arguments") or ""
        item.pieces.append(arguments)
        if arguments and item.item["type"] == "function_call":
            yield {"type": "response.function_call_arguments.delta", **item.at, "delta": arguments}

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open = _Open(item, len(self.items))
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": self._open.index, "item": dict(item)}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        item, self._open = self._open, None
        if item is None:
            return
        text = "".join(item.pieces)
        if item.part is not None:
            yield from self._close_text(item, item.part, text)
        elif item.item["type"] == "function_call":
            item.item["arguments"] = text
            head = {"type": "response.function_call_arguments.done", **item.at}
            yield {**head, "name": item.item["name"], "arguments": text}
        else:
            item.item["input"] = text = input_of_custom(text)
            yield {"type": "response.custom_tool_call_input.delta", **item.at, "delta": text}
            yield {"type": "response.custom_tool_call_input.done", **item.at, "input": text}
        item.item["status"] = status
        yield {"type": "response.output_item.done", "output_index": item.index, "item": item.item}

    def _close_text(self, item: _Open, part: _Part, text: str) -> Iterator[Event]:
        whole = {**part.empty, "text": text}
        more: dict[str, Any] = {}
        if part is _OUTPUT_TEXT:
            more = {"logprobs": item.logprobs}
        elif self._has_encoded:
            item.item["encrypted_content"] = encoded(text)
        item.item[part.place] = [whole | more]
        yield {"type": f"{part.text_event}.done", **item.at, "text": text, **more}
        yield {"type": f"{part.part_event}.done", **item.at, "part": whole | more}
