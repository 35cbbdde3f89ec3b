"""Reads an answer as it comes: thoughts, text and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from hopskip.text.reasoning import ReasoningMarks, ReasoningSplitter
from hopskip.text.tools.base import Delta, Tool, ToolFormat, joined
from hopskip.text.tools.reader import CallReader


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """What there is to read in an answer."""

    reasoning: ReasoningMarks | None = None
    """None leaves thoughts, if there are any, in the text."""
    is_open: bool = False
    """The prompt has opened the block of thoughts."""
    tool_format: ToolFormat | None = None
    """None: there are no calls."""
    tools: Seq[Tool] = ()
    must_call: bool = False
    """A grammar makes the answer calls."""
    parallel: bool = True
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Marks that are special tokens, which texts do not show."""

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that have to be in the text."""
        return frozenset(self.special_ids.values())


class AnswerReader:
    """Pieces of text in, what is new of the answer out."""

    def __init__(self, format: AnswerFormat) -> None:
        reasoning, tool_format = format.reasoning, format.tool_format
        self._splitter = ReasoningSplitter(reasoning, is_open=format.is_open) if reasoning is not None else None
        self._calls = (
            CallReader(
                tool_format,
                format.tools,
                is_certain=format.must_call,
                parallel=format.parallel,
                hidden=frozenset(format.special_ids),
            )
            if tool_format is not None
            else None
        )
        self.num_reasoning_pieces = 0
        """Of those pushed: tokens, if each piece was one's text."""
        self.has_calls = False

    def push(self, piece: str) -> Delta:
        """Add text; returns what is certain now."""
        if self._splitter is None:
            return self._read("", piece)
        was_inside = self._splitter.is_inside
        thoughts, text = self._splitter.push(piece)
        self.num_reasoning_pieces += was_inside or self._splitter.is_inside
        return self._read(thoughts, text)

    def finish(self, *, is_cut: bool) -> Delta:
        """The text ends, perhaps before the model had ended it: returns the rest."""
        delta = self._read(*(self._splitter.finish() if self._splitter is not None else ("", "")))
        if self._calls is not None and not (self._splitter is not None and self._splitter.is_inside):
            delta = joined([delta, self._calls.finish(is_cut=is_cut)])
        self.has_calls = self.has_calls or bool(delta.calls)
        return delta

    def _read(self, thoughts: str, text: str) -> Delta:
        delta = self._calls.push(text) if self._calls is not None and text else Delta(content=text)
        delta.reasoning = thoughts
        self.has_calls = self.has_calls or bool(delta.calls)
        return delta
