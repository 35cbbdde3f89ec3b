"""What a model thinks before it answers, told from the answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from hopskip.text.tokenizer import Tokenizer, overlap
from hopskip.text.tools.base import SPACE, Marks

ReasoningFormat = Literal["auto", "none", "deepseek", "mistral"]

_NUM_LAST = 16
"""Tokens of a prompt that tell whether it ends inside a block of thoughts."""


@dataclass(frozen=True)
class ReasoningMarks:
    """Between which marks a model thinks."""

    opening: str
    closing: str

    def is_open(self, tokenizer: Tokenizer, prompt_ids: Seq[int]) -> bool | None:
        """True if a prompt ends inside a block of thoughts, False if it ends behind one; None if the model is free to
        begin one."""
        data = b"".join(map(tokenizer.token_bytes, prompt_ids[-_NUM_LAST:]))
        text = data.decode("utf-8", "replace").rstrip()
        if text.endswith(self.opening):
            return True
        return False if text.endswith(self.closing) else None

    def grammar(self, marks: Marks, *, is_open: bool | None) -> str:
        """A Lark grammar of the thoughts and then of `@answer`; empty if there are none."""
        if is_open is False:
            return ""
        body, rules = marks.text_until(self.closing, "thoughts")
        rules += "GAP: /[ \\n]{0,4}/\n"
        if is_open:
            return f"start: {body} GAP @answer\n{rules}"
        return f"start: block? @answer\nblock: GAP {marks.lark(self.opening)} {body} GAP\n{rules}"


REASONING: dict[str, ReasoningMarks] = {
    "deepseek": ReasoningMarks("<think>", "</think>"),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
}


def reasoning_of_template(source: str, name: ReasoningFormat = "auto") -> ReasoningMarks | None:
    """The marks of a format; of `auto` those that the chat template knows. None leaves the text as it is."""
    if name == "auto":
        return next((marks for marks in REASONING.values() if marks.closing in source), None)
    return REASONING.get(name)


class ReasoningSplitter:
    """Splits a text that grows into thoughts and answer. White space around either belongs to neither.

    Args:
        is_open: the text begins inside the block, since the prompt has opened it; some models open it once more.
    """

    def __init__(self, marks: ReasoningMarks, *, is_open: bool) -> None:
        self._marks = marks
        self._is_open = is_open
        self._state: Literal["before", "inside", "behind", "answer"] = "before"
        self._held = ""
        self._has_shown = False

    @property
    def is_inside(self) -> bool:
        """The text so far ends within thoughts."""
        return self._state == "inside" or (self._state == "before" and self._is_open)

    def push(self, piece: str) -> tuple[str, str]:
        """Add text; returns what of the thoughts and of the answer is certain now."""
        text, self._held = self._held + piece, ""
        thoughts = ""
        if self._state == "before":
            stripped = text.lstrip(SPACE)
            if stripped.startswith(self._marks.opening):
                text = stripped[len(self._marks.opening) :]
                self._state = "inside"
            elif self._marks.opening.startswith(stripped):
                self._held = text
                return "", ""
            else:
                self._state = "inside" if self._is_open else "answer"
        if self._state == "inside":
            thoughts, text = self._inside(text)
        if self._state == "behind":
            text = text.lstrip(SPACE)
            if text:
                self._state = "answer"
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        """The text ends: the rest of both."""
        held, self._held = self._held, ""
        return (held.rstrip(SPACE), "") if self.is_inside else ("", held)

    def _inside(self, text: str) -> tuple[str, str]:
        if not self._has_shown:
            text = text.lstrip(SPACE)
        end = text.find(self._marks.closing)
        if end >= 0:
            self._state = "behind"
            return text[:end].rstrip(SPACE), text[end + len(self._marks.closing) :]
        certain = text[: len(text) - overlap(text, self._marks.closing)].rstrip(SPACE)
        self._held = text[len(certain) :]
        self._has_shown = self._has_shown or bool(certain)
        return certain, ""
