"""A chat as it runs, with a user and a model that are scripted: answers, Ctrl-C, every command."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from hopskip import SamplingParams
from hopskip.cli.talk.conversation import Conversation, Exchange
from hopskip.cli.talk.session import Session, stopping
from hopskip.cli.talk.settings import Settings
from hopskip.errors import ConfigError
from hopskip.llm import GenerationResult, StreamPiece
from hopskip.sequence import SpeculativeStats, Token

CONTEXT = 64


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class ScriptedModel:
    """Answers with the words that it is told to; an answer is a list of words and of things to do between them."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, SamplingParams, int | None]] = []
        self.num_closed = 0

    def encode(self, messages: Any) -> list[int]:
        return [ord(char) for char in "|".join(m["content"] for m in messages)]

    def stream(
        self, prompt: list[int], params: SamplingParams, *, max_draft_tokens: int | None = None
    ) -> Iterator[StreamPiece]:
        self.asked.append(("".join(map(chr, prompt)), params, max_draft_tokens))
        script = self.answers.pop(0) if self.answers else ["Well", "."]
        words = [item for item in script if isinstance(item, str)][: params.max_new_tokens]
        is_cut = len(words) == params.max_new_tokens
        stats = SpeculativeStats(num_prompt_tokens=len(prompt), decode_seconds=1.0)
        try:
            for item in script:
                if not isinstance(item, str):
                    item()
                    continue
                stats.num_tokens += 1
                stats.num_target_passes += stats.num_tokens % 2
                is_last = stats.num_tokens == len(words)
                result = GenerationResult(
                    text="", tokens=[], finish_reason="length" if is_cut else "stop", prompt_token_ids=[], stats=stats
                )
                yield StreamPiece(
                    text=item,
                    token=Token(0, "target"),
                    stats=stats,
                    seed=params.seed if params.temperature else None,
                    result=result if is_last else None,
                )
                if is_last:
                    return
        finally:
            self.num_closed += 1


class ScriptedUser:
    """Writes these lines, and answers every question with the same."""

    def __init__(self, *lines: str, is_interactive: bool = True, says: bool = True) -> None:
        self._lines = list(lines)
        self.is_interactive = is_interactive
        self._says = says
        self.questions: list[str] = []

    def read(self) -> str | None:
        return self._lines.pop(0) if self._lines else None

    def confirm(self, question: str) -> bool:
        self.questions.append(question)
        return self._says and self.is_interactive

    def holding_keys(self) -> AbstractContextManager[None]:
        return nullcontext()


class Chat:
    """A session, its parts, and what it showed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *answers: list[Any], **params: Any) -> None:
        self._capsys = capsys
        self.model = ScriptedModel(*answers)
        self.conversation = Conversation(self.model.encode, CONTEXT)
        self.settings = Settings(SamplingParams(**{"max_new_tokens": 8, **params}), can_draft=True)
        self.user = ScriptedUser()

    def run(self, *lines: str, **user: Any) -> str:
        """Returns what stderr showed, less the hint at the start."""
        self.user = ScriptedUser(*lines, **user)
        model: Any = self.model
        Session(model, self.conversation, self.settings, self.user, "the model").run()
        captured = self._capsys.readouterr()
        self.text = captured.out
        self.hint, _, shown = captured.err.partition("\n") if self.user.is_interactive else ("", "", captured.err)
        return shown

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(item.message, item.answer) for item in self.conversation.exchanges]


@pytest.fixture(autouse=True)
def heeds_ctrl_c() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str]) -> Chat:
    return Chat(capsys)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_messages_are_answered_and_kept(chat: Chat) -> None:
    chat.model.answers = [["Well", ", ", "well"], ["Bye"]]
    shown = chat.run("Hello", "", "  ", '""" """', "And?")
    assert chat.text == "Well, well\nBye\n"
    assert chat.said == [("Hello", "Well, well"), ("And?", "Bye")]
    assert [prompt for prompt, _, _ in chat.model.asked] == ["Hello", "Hello|Well, well|And?"]
    assert chat.model.asked[0][2] is None
    assert shown.splitlines() == [
        "[3 tokens; 2.0 tokens/s; 1.0 tokens a pass; context 8 of 64; prompt 5, 0 of it cached]",
        "",
        "[1 token; context 22 of 64; prompt 21, 0 of it cached]",
        "",
    ]
    assert "/help shows commands" in chat.hint
    assert chat.model.num_closed == 2


def test_a_pipe_gets_no_hints_and_no_questions(chat: Chat) -> None:
    shown = chat.run("exit", is_interactive=False)
    assert shown == "[2 tokens; 1.0 tokens/s; 1.0 tokens a pass; context 6 of 64; prompt 4, 0 of it cached]\n"
    assert chat.said == [("exit", "Well.")]
    assert chat.user.questions == []


def test_an_answer_that_is_cut(chat: Chat) -> None:
    chat.model.answers = [["a"] * 100]
    shown = chat.run("Hello")
    assert "[cut at --max-new-tokens 8; 8 tokens; " in shown
    assert chat.said == [("Hello", "a" * 8)]


def test_an_answer_that_fills_the_context(chat: Chat) -> None:
    chat.model.answers = [["a"] * 100, ["b"] * 100]
    shown = chat.run("/set max_new_tokens 1000", "Hello", "Hi")
    assert f"[cut: the context of {CONTEXT} tokens is full; 59 tokens; " in shown
    assert f'[the context of {CONTEXT} tokens is full: the oldest exchange is dropped, from "Hello"]' in shown
    assert [prompt for prompt, _, _ in chat.model.asked] == ["Hello", "Hi"]
    assert [params.max_new_tokens for _, params, _ in chat.model.asked] == [59, 62]


def test_what_is_dropped_is_said_once(chat: Chat) -> None:
    long = "a " * 10
    chat.conversation.start([Exchange(f"{number} {long}", "x") for number in range(2)])
    shown = chat.run("c" * 40, "d")
    assert shown.count("dropped") == 1
    assert 'the oldest 2 exchanges are dropped, from "0 a a a a a a a a a a"]' in shown
    chat.conversation.start([Exchange("e" * 41, "x")])
    assert f'from "{"e" * 37}..."]' in chat.run("f" * 30)


def test_a_message_that_does_not_fit(chat: Chat) -> None:
    chat.run("Hello")
    shown = chat.run("a" * 57)
    assert shown.startswith("hopskip: error: the message alone has 57 tokens; ")
    assert chat.said == [("Hello", "Well.")]


def test_ctrl_c_keeps_what_was_said(chat: Chat) -> None:
    chat.model.answers = [["One", " two", ctrl_c, " three", " four"], ["Yes"]]
    shown = chat.run("Count", "More")
    assert chat.text == "One two three\nYes\n"
    assert "[stopped by Ctrl-C; 3 tokens; " in shown
    assert chat.said == [("Count", "One two three"), ("More", "Yes")]
    assert chat.model.num_closed == 2


def test_ctrl_c_twice_interrupts_at_once(chat: Chat) -> None:
    chat.model.answers = [["One", ctrl_c, ctrl_c, " two"]]
    assert "[stopped by Ctrl-C; 1 token; " in chat.run("Count")
    assert chat.said == [("Count", "One")]
    assert chat.model.num_closed == 1


def test_ctrl_c_before_the_answer(chat: Chat) -> None:
    chat.model.answers = [[ctrl_c, "One"], ["Two"]]
    shown = chat.run("Count", "/retry")
    assert "[stopped before the answer began; the message is not kept, /retry asks again]" in shown
    assert chat.said == [("Count", "Two")]  # /retry asks what had no answer


def test_ctrl_c_with_nothing_to_stop(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.settings, "rows", ctrl_c)
    chat.run("/set", "Hello")
    assert chat.said == [("Hello", "Well.")]
    with pytest.raises(KeyboardInterrupt):
        chat.run("/set", "Hello", is_interactive=False)


def test_ctrl_c_is_as_before_after_an_answer() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping() as is_stopped:
        assert not is_stopped()
        ctrl_c()
        assert is_stopped()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_empty_answer_is_not_kept(chat: Chat) -> None:
    chat.run("Hello")
    chat.model.answers = [[""], ["\n"]]
    shown = chat.run("And?", "And?")
    assert shown.count("[the answer is empty; the message is not kept, /retry asks again]") == 2
    assert chat.said == [("Hello", "Well.")]
    assert "no message to answer again" in chat.run("/undo", "/retry")
    chat.run("Hello")
    chat.model.answers = [[""]]
    assert "the answer is empty; the one before stays" in chat.run("/retry")
    assert chat.said == [("Hello", "Well.")]


def test_an_error_leaves_the_chat_as_it_was(chat: Chat) -> None:
    def fail() -> None:
        raise ConfigError("it does not work")

    chat.model.answers = [["Hm", fail, "so"], ["Well"]]
    assert "hopskip: error: it does not work" in chat.run("Hello", "Again")
    assert chat.text == "Hm\nWell\n"
    assert chat.said == [("Again", "Well")]


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["exit", "quit", " Quit ", "exit()"])
def test_bare_words_ask(chat: Chat, word: str) -> None:
    chat.run(word, "Hello")
    assert (chat.user.questions, chat.said) == (["leave the chat?"], [])
    chat.run(word, "Hello", says=False)
    assert chat.said == [("Hello", "Well.")]


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye", "/EXIT"])
def test_leaving(chat: Chat, command: str) -> None:
    chat.run(command, "Hello")
    assert (chat.user.questions, chat.said) == ([], [])


def test_help_names_every_command(chat: Chat) -> None:
    shown = chat.run("/help")
    for text in "/exit", "/clear", "/system", "/set", "/retry", "/undo", "/save", "/load", "Ctrl-C", "//text":
        assert f"\n{text} " in shown


def test_unknown_commands(chat: Chat) -> None:
    assert "error: no command /hlep; did you mean /help?" in chat.run("/hlep me")
    assert chat.said == []


def test_clear_keeps_system_message_and_settings(chat: Chat) -> None:
    assert "[a new chat]" in chat.run("/system Be kind.", "/set top_k 3", "Hello", "/clear", "Hi")
    assert chat.model.asked[-1][0] == "Be kind.|Hi"
    assert chat.settings["top_k"] == 3


def test_the_system_message(chat: Chat) -> None:
    shown = chat.run("/system", "/system Be\x1b[31m kind.", "/system", "Hello", '/system ""', "Hi")
    assert shown.startswith("[no system message]\n[system message: Be[31m kind.]\n[system message: Be[31m kind.]\n")
    assert [prompt for prompt, _, _ in chat.model.asked] == ["Be\x1b[31m kind.|Hello", "Hello|Well.|Hi"]


def test_settings_have_effect(chat: Chat) -> None:
    shown = chat.run("/set draft off", "/set temperature=0.5", "/set top_k = 3", "/set seed 7", "Hello", "/set seed")
    assert chat.model.asked[0][1:] == (SamplingParams(max_new_tokens=8, temperature=0.5, top_k=3, seed=7), 0)
    assert "; seed 7]" in shown
    assert shown.startswith("[draft off] Draft; ")
    assert "[seed 7] Same seed" in shown
    assert "error: top_p is 3.0" in chat.run("/set top_p 3")
    assert "error: no setting 'sed'; did you mean seed?" in chat.run("/set sed")
    assert "\nrepetition_penalty   1.0   Above 1" in chat.run("/set")


def test_retry_of_a_greedy_answer(chat: Chat) -> None:
    chat.model.answers = [["One"], ["Two"]]
    shown = chat.run("Hello", "/retry")
    assert "[at temperature 0 an answer stays the same" in shown
    assert chat.said == [("Hello", "Two")]
    assert [prompt for prompt, _, _ in chat.model.asked] == ["Hello", "Hello"]


def test_retry_draws_with_another_seed(chat: Chat) -> None:
    shown = chat.run("/set temperature 1", "/set seed 7", "Hello", "/retry", "/set seed none", "/retry")
    assert [params.seed for _, params, _ in chat.model.asked] == [7, 8, None]
    assert "stays the same" not in shown


def test_nothing_to_answer_again_or_to_undo(chat: Chat) -> None:
    shown = chat.run("/retry", "/undo")
    assert "no message to answer again" in shown
    assert "nothing to undo" in shown


def test_undo(chat: Chat) -> None:
    shown = chat.run("Hello\nthere", "/undo", "Hi")
    assert '[forgotten: "Hello there"]' in shown
    assert chat.model.asked[-1][0] == "Hi"


def test_save_and_load(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    shown = chat.run(
        "/system Be kind.", "/set top_k 3", "Hello", f"/save {path}", "/clear", '/system ""', "/set top_k 0"
    )
    assert f"[saved to {path}]" in shown
    assert json.loads(path.read_text())["model"] == "the model"
    shown = chat.run(f'/load "{path}"', "Hi")
    assert f"[loaded {path}: 1 exchange]" in shown
    assert chat.model.asked[-1][0] == "Be kind.|Hello|Well.|Hi"
    assert chat.settings["top_k"] == 3


def test_save_asks_before_it_overwrites(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("mine")
    for user in {"says": False}, {"is_interactive": False}:
        assert "exists and is left as it is" in chat.run(f"/save {path}", **user)
        assert path.read_text() == "mine"
    assert chat.user.questions == [f"{path} exists; overwrite it?"]
    chat.run(f"/save {path}")
    assert path.read_text() != "mine"


def test_a_broken_file_changes_nothing(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    content: dict[str, Any] = {"messages": [{"role": "system", "content": "Be kind."}], "settings": {"top_p": 7}}
    path.write_text(json.dumps(content))
    chat.run("Hello")
    for line in f"/load {path}", f"/load {tmp_path}", "/load", "/save":
        shown = chat.run(line)
        assert shown.startswith("hopskip: error: ")
        assert shown.count("\n") == 1
        assert (chat.said, chat.conversation.system) == ([("Hello", "Well.")], None)
    path.write_text(json.dumps({**content, "settings": {}, "model": "another"}))
    assert f"[loaded {path}: 0 exchanges; it was with another]" in chat.run(f"/load {path}")
