"""The contract of the formats of tool calls, and what readers give out."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar

SPACE = " \t\r\n"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments, an object."""
    strict: bool = False
    """Refuse a schema of which a part cannot be enforced."""


@dataclass(frozen=True, kw_only=True)
class CallDelta:
    """What is new of one call."""

    index: int
    """Of the call in its answer."""
    id: str | None = None
    name: str | None = None
    """Id and name come with a call's first delta."""
    arguments: str = ""
    """A fragment of the arguments' JSON text. Joined they are an object, unless the answer was cut or the model wrote
    something else."""

    def followed_by(self, other: CallDelta) -> CallDelta:
        """The two as one."""
        return replace(self, arguments=self.arguments + other.arguments)


@dataclass(kw_only=True)
class Delta:
    """What is new of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


def joined(deltas: Iterable[Delta]) -> Delta:
    """Several, one after the other, as one."""
    whole = Delta()
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        whole.reasoning += delta.reasoning
        whole.content += delta.content
        for call in delta.calls:
            before = calls.get(call.index)
            calls[call.index] = call if before is None else before.followed_by(call)
    whole.calls = list(calls.values())
    return whole


class Calls:
    """Collects the calls of one answer.

    Args:
        tools: of which the names are known; a body may read others too.
        new_id: makes the id of a call.
        limit: calls beyond so many are left out.
    """

    def __init__(self, tools: Seq[Tool], new_id: Callable[[], str], limit: int | None = None) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.num_begun = 0
        self._new_id = new_id
        self._limit = limit
        self._deltas: list[CallDelta] = []

    def begin(self, name: str, arguments: str = "", *, id: str | None = None) -> None:
        self.num_begun += 1
        if self._is_wanted:
            index = self.num_begun - 1
            self._deltas.append(CallDelta(index=index, id=id or self._new_id(), name=name, arguments=arguments))

    def add(self, arguments: str) -> None:
        """More of the arguments of the call that began last."""
        if arguments and self._is_wanted:
            self._deltas.append(CallDelta(index=self.num_begun - 1, arguments=arguments))

    def take(self) -> list[CallDelta]:
        """Deltas since the last time."""
        taken, self._deltas = self._deltas, []
        return joined([Delta(calls=taken)]).calls

    @property
    def _is_wanted(self) -> bool:
        return self._limit is None or self.num_begun <= self._limit


class State(Enum):
    """Of what is being read."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


class Body(ABC):
    """Reads what follows the opening mark of a call.

    A call begins (`Calls.begin`) as soon as it is certain that it is one. A body that fails before has read text.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.state = State.OPEN

    @abstractmethod
    def read(self, text: str, at: int) -> int:
        """Read on from `at`; returns up to where. What is left while it stays open is given again, with more behind
        it; what is left by a body that is done or has failed is not its own."""

    def finish(self) -> None:  # noqa: B027 (most have nothing to say)
        """The model has ended its text in the middle of a call that has begun."""

    def name_so_far(self, rest: str) -> str:
        """The beginning of the name of a call that has not begun, with `rest` unread; empty if nothing is known."""
        return ""


@dataclass(frozen=True)
class Marks:
    """How the marks of a format stand in a grammar: as the vocabulary's own token where it has one for them."""

    ids: Mapping[str, int]
    """Of added tokens, by their text."""

    def lark(self, mark: str) -> str:
        return f"<[{self.ids[mark]}]>" if mark in self.ids else literal(mark)

    def text_until(self, mark: str, name: str) -> tuple[str, str]:
        """Any text and a mark behind it: an expression, and the rules that it needs, whose names begin with `name`."""
        if mark in self.ids:
            return f"{name.upper()} {self.lark(mark)}", f"{name.upper()}: /(?s:.*)/\n"
        pattern = "".join(f"\\{char}" if char in r"\/.[]{}()*+?^$|" else char for char in mark)
        return name, f"{name}[lazy]: /(?s:.*){pattern}/\n"


class ToolFormat(ABC):
    """How a family of models writes calls."""

    name: str
    """For `--tool-format`."""
    openings: ClassVar[Mapping[str, Callable[[Calls], Body]]]
    """Marks that calls begin with, and what reads on behind them."""
    reads_bare: bool = False
    """A JSON object, or a list of such, that names one of the tools is a call without marks too."""
    closing: str = ""
    """The mark that may stand behind such an object all the same."""
    marks: tuple[str, ...] = ()
    """All marks of the format that may be special tokens of a vocabulary."""
    example: str
    """A call, as it is explained to models."""

    @abstractmethod
    def grammar(self, tools: Seq[Tool], marks: Marks, *, parallel: bool) -> str:
        """A Lark grammar whose texts are calls of these tools: one, or several if `parallel` (and the format has a way
        to write them).

        Raises:
            ConfigError: the format cannot write the arguments of a tool.
        """

    def unenforced(self, tool: Tool) -> list[str]:
        """Parts of a tool's schema that the grammar leaves out, such as `pattern at tool:f#/properties/a`."""
        return []

    @abstractmethod
    def write(self, calls: Seq[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls (name, arguments) as models write them."""

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def history(self, messages: Seq[Mapping[str, Any]]) -> Seq[Mapping[str, Any]]:
        """Messages as templates of this family take them."""
        return messages


def literal(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def skip_space(text: str, at: int, also: str = "") -> int:
    """Index of the next character that is no white space, and none of `also`."""
    while at < len(text) and text[at] in SPACE + also:
        at += 1
    return at


def may_follow(text: str, at: int, mark: str) -> bool:
    """True if the text ends at `at` within a mark, or before it."""
    return len(text) - at < len(mark) and mark.startswith(text[at:])
