"""A chat as it runs: reads what is typed, answers messages, and does commands."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hopskip.cli.answer import Answer
from hopskip.cli.console import (
    PieceWriter,
    print_colour_legend,
    print_error,
    print_note,
    print_rows,
    print_summary,
    terminal_width,
)
from hopskip.cli.talk import saved
from hopskip.cli.talk.conversation import Conversation, Exchange, Turn
from hopskip.cli.talk.settings import NAMES, Settings, values_of
from hopskip.cli.talk.typed import BARE_EXITS, COMMANDS, Command, parse, unknown_command
from hopskip.errors import HopskipError

if TYPE_CHECKING:
    from hopskip.cli.talk.reading import Reader
    from hopskip.llm import LLM

_KEYS = (
    ("Enter", "sends; pasted text is one message"),
    ("Alt+Enter", 'begins a new line, as \\ before Enter does; so does Enter between """ and """'),
    ("Ctrl-C", "stops an answer; clears what is typed"),
    ("Up, Ctrl-R", "bring back or search what was typed before"),
    ("Tab", "completes commands"),
    ("Ctrl-X Ctrl-E", "opens the text in $EDITOR"),
    ("//text", "sends a message that begins with /"),
)

_WIDTH_FOR_HELP = 70
"""Columns; in a narrower terminal /set shows names and values only."""


class Session:
    """One chat between a user and a model.

    Args:
        model: its name, for the files of `/save`.
    """

    def __init__(
        self, llm: LLM, conversation: Conversation, settings: Settings, reader: Reader, model: str = ""
    ) -> None:
        self._llm = llm
        self._conversation = conversation
        self._settings = settings
        self._reader = reader
        self._model = model

    def run(self) -> None:
        """Until the user leaves."""
        if self._reader.is_interactive:
            print_note("/help shows commands and keys, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
            self._show_colours()
        while self._take_next():
            pass

    def _take_next(self) -> bool:
        """Returns whether the chat goes on."""
        try:
            text = self._reader.read()
            return text is not None and self.take(text)
        except KeyboardInterrupt:  # between a prompt and an answer, where there is nothing to stop
            if not self._reader.is_interactive:
                raise
            return True

    def take(self, text: str) -> bool:
        """Do what a text that was typed says. Returns whether the chat goes on."""
        try:
            if self._reader.is_interactive and text.strip().lower() in BARE_EXITS:
                return not self._reader.confirm("leave the chat?")
            meant = parse(text)
            if not isinstance(meant, Command):
                if meant.strip():
                    self._ask(meant)
            elif meant.name == "exit":
                return False
            elif meant.name not in COMMANDS:
                print_error(unknown_command(meant.name))
            else:
                getattr(self, f"_do_{meant.name}")(meant.argument)
        except HopskipError as error:
            print_error(str(error))
        return True

    # -- answers -------------------------------------------------------------------------------------------------------

    def _ask(self, message: str, *, again: bool = False) -> None:
        """Answer a message, and keep both; a message that gets no answer is not kept.

        Args:
            again: it takes the place of the last exchange.
        """
        conversation = self._conversation
        conversation.unanswered = None if again else message
        turn = conversation.prepare(message, self._settings["max_new_tokens"], again=again)
        if turn.num_dropped > conversation.num_dropped:
            print_note(_dropped(turn, conversation.num_dropped, conversation.context))
        params = self._settings.params(max_new_tokens=turn.max_new_tokens)
        answer, writer = Answer(), PieceWriter()
        try:
            with stopping() as is_stopped:
                stream = self._llm.stream(turn.prompt_ids, params, max_draft_tokens=None if self._drafts else 0)
                try:
                    for piece in stream:
                        answer.add(piece)
                        writer.write(piece)
                        if is_stopped():
                            break
                finally:
                    stream.close()  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            pass
        finally:
            writer.end()
        if not answer.text.strip():
            why = "stopped before the answer began" if answer.finish_reason == "abort" else "the answer is empty"
            print_note(f"[{why}; {'the one before stays' if again else 'the message is not kept, /retry asks again'}]")
            return
        conversation.keep(turn, answer.text)
        assert answer.stats is not None
        ending = None if answer.finish_reason == "stop" else answer.ending
        if answer.finish_reason == "length" and turn.fills_context:
            ending = f"cut: the context of {conversation.context} tokens is full"
        print_summary(answer.stats, context=conversation.context, ending=ending, seed=answer.seed)
        if self._reader.is_interactive:
            print_note("")

    @property
    def _drafts(self) -> bool:
        return bool(self._settings["draft"])

    # -- commands ------------------------------------------------------------------------------------------------------

    def _do_help(self, argument: str) -> None:
        print_rows((f"/{name} {what_follows}".strip(), does) for name, (what_follows, does) in COMMANDS.items())
        print_note("")
        print_rows(_KEYS)
        self._show_colours()

    def _show_colours(self) -> None:
        if self._drafts:
            print_colour_legend()

    def _do_clear(self, argument: str) -> None:
        self._conversation.start()
        print_note("[a new chat]")

    def _do_system(self, argument: str) -> None:
        if argument:
            self._conversation.set_system(None if argument in ('""', "''") else argument)
        system = self._conversation.system
        print_note("[no system message]" if system is None else f"[system message: {system}]")

    def _do_set(self, argument: str) -> None:
        name, _, value = argument.replace("=", " ", 1).partition(" ") if argument else ("", "", "")
        if not name:
            is_narrow = (terminal_width() or _WIDTH_FOR_HELP) < _WIDTH_FOR_HELP
            print_rows(row[: 2 if is_narrow else 3] for row in self._settings.rows())
            return
        if value.strip():
            name = self._settings.set(name, value.strip())
        name = self._settings.find(name)
        _, shown, means = next(row for row in self._settings.rows() if row[0] == name)
        print_note(f"[{name} {shown}] {means}")

    def _do_retry(self, argument: str) -> None:
        conversation, settings = self._conversation, self._settings
        if conversation.unanswered is not None:
            self._ask(conversation.unanswered)
        elif not conversation.exchanges:
            print_error("there is no message to answer again; write one first")
        else:
            seed = settings["seed"]
            if settings.is_greedy:
                print_note("[at temperature 0 an answer stays the same; /set temperature 0.8 draws others]")
            elif seed is not None:
                settings.set("seed", str(seed + 1))
            self._ask(conversation.exchanges[-1].message, again=True)

    def _do_undo(self, argument: str) -> None:
        undone = self._conversation.undo()
        if undone is None:
            print_error("there is nothing to undo")
        else:
            print_note(f"[forgotten: {_beginning(undone)}]")

    def _do_save(self, argument: str) -> None:
        path = saved.path_of(argument)
        if path.is_file() and not self._reader.confirm(f"{path} exists; overwrite it?"):
            print_error(f"{path} exists and is left as it is; name another file")
            return
        saved.save(path, self._conversation.messages, self._settings.as_dict(), self._model)
        print_note(f"[saved to {path}]")

    def _do_load(self, argument: str) -> None:
        path = saved.path_of(argument)
        chat = saved.load(path)
        self._settings.load(chat.settings)
        self._conversation.system = chat.system
        self._conversation.start(chat.exchanges)
        other = f"; it was with {chat.model}" if chat.model not in (None, self._model) else ""
        num = len(chat.exchanges)
        print_note(f"[loaded {path}: {num} exchange{'' if num == 1 else 's'}{other}]")


def completions(typed: str) -> list[str]:
    """Ways to go on with a command.

    >>> completions("/sy"), completions("/set dr"), completions("/set draft o")
    (['/system'], ['/set draft'], ['/set draft on', '/set draft off'])
    """
    if not typed.startswith("/"):
        return []
    words = typed.split(" ")
    if len(words) == 1:
        found = [f"/{name}" for name in COMMANDS]
    elif words[0] == "/set" and len(words) == 2:
        found = [f"/set {name}" for name in NAMES]
    elif words[0] == "/set" and len(words) == 3 and words[1] in NAMES:
        found = [f"/set {words[1]} {value}" for value in values_of(words[1])]
    else:
        found = []
    return [text for text in found if text.startswith(typed)]


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed once something was asked of it: from then on it ends the answer between two
    pieces. Before, and when pressed again, it interrupts."""
    is_asked, is_pressed = False, False

    def is_stopped() -> bool:
        nonlocal is_asked
        is_asked = True
        return is_pressed

    def press(number: int, frame: object) -> None:
        nonlocal is_pressed
        if is_pressed or not is_asked:
            raise KeyboardInterrupt
        is_pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield is_stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _dropped(turn: Turn, num_before: int, context: int) -> str:
    """What to say of the exchanges that the model does not see any more."""
    gone = turn.earlier[num_before : turn.num_dropped]
    what = f"the oldest {len(gone)} exchanges are" if len(gone) > 1 else "the oldest exchange is"
    return f"[the context of {context} tokens is full: {what} dropped, from {_beginning(gone[0])}]"


def _beginning(exchange: Exchange, length: int = 40) -> str:
    text = " ".join(exchange.message.split())
    return f'"{text}"' if len(text) <= length else f'"{text[: length - 3]}..."'
