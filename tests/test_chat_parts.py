"""What a chat is made of, without model and terminal: typed text, conversation, settings, files, lines that fit."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hopskip import SamplingParams
from hopskip.cli.console import status_line, table_lines
from hopskip.cli.talk import saved
from hopskip.cli.talk.conversation import Conversation, Exchange, Message
from hopskip.cli.talk.reading import LineReader
from hopskip.cli.talk.session import completions
from hopskip.cli.talk.settings import NAMES, Settings
from hopskip.cli.talk.typed import COMMANDS, Command, is_continued, is_open_block, parse, unknown_command
from hopskip.errors import ConfigError, PromptError

# -- typed text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("  Hello there \n", "Hello there"),
        ("", ""),
        ("/help", Command("help", "")),
        (" /SET  Temperature   0.5 ", Command("set", "Temperature   0.5")),
        ("/quit", Command("exit", "")),
        ("/bye", Command("exit", "")),
        ("/?", Command("help", "")),
        ("/reset", Command("clear", "")),
        ("/nonsense now", Command("nonsense", "now")),
        ("/", Command("", "")),
        ("//help is a command", "/help is a command"),
        ("// a comment", "// a comment"),
        ("///", "///"),
        ('"""/help"""', "/help"),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\n  one\ntwo\n"""', "  one\ntwo"),
        ('""""""', ""),
        ('"""', '"""'),
        ('"""a""" or """b"""', '"""a""" or """b"""'),
        ('"""\ndef f():\n    """Doc."""\n"""', 'def f():\n    """Doc."""'),
        ('"""Doc."""\nx = 1', '"""Doc."""\nx = 1'),
        ("\n  \n    indented\n  code\n\n", "    indented\n  code"),
        ("/usr/bin/env\nis a program", "/usr/bin/env\nis a program"),
        ("/save this\nin mind", "/save this\nin mind"),
        ("//comment\ncode", "//comment\ncode"),
        ("/system Be brief.\nBe kind.", Command("system", "Be brief.\nBe kind.")),
        ('/system """one\ntwo"""', Command("system", "one\ntwo")),
    ],
)
def test_what_text_means(text: str, meant: Command | str) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('"""', True),
        ('"""one\ntwo', True),
        ('  """one', True),
        ('/system """one', True),
        ('"""one"""', False),
        ('"""one"""\ntwo', False),
        ('one """', False),
        ('two words """', False),
        ("", False),
    ],
)
def test_open_blocks(text: str, is_open: bool) -> None:
    assert is_open_block(text) == is_open


def test_a_backslash_continues_unless_it_is_escaped() -> None:
    assert [is_continued("a" + "\\" * count) for count in range(4)] == [False, True, False, True]


def test_an_unknown_command_names_the_nearest() -> None:
    assert "no command /sytem; did you mean /system? /help" in unknown_command("sytem")
    assert "//zzzz begins a message" in unknown_command("zzzz")
    assert "did you mean" not in unknown_command("zzzz")


def lines(content: bytes) -> list[str]:
    reader = LineReader(io.BytesIO(content), is_interactive=False)
    return list(iter(reader.read, None))


def test_lines_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(b"\xef\xbb\xbfone\r\ntwo\n\nthree") == ["one", "two", "", "three"]
    assert lines(b'"""a\n\\\nb"""\nc\\\nd\\\\\ne\n') == ['"""a\n\\\nb"""', "c\nd\\\\", "e"]
    assert lines(b"a\\") == ["a\\"]
    assert lines('"""ä\nö\n'.encode()) == ['"""ä\nö"""']
    assert 'the block of """ is not closed' in capsys.readouterr().err


def test_a_pipe_that_is_not_utf8() -> None:
    with pytest.raises(PromptError, match="not valid UTF-8: byte 0xe9; convert it"):
        lines(b"caf\xe9\n")


def test_lines_of_a_terminal_that_only_shows_text(capsys: pytest.CaptureFixture[str]) -> None:
    reader = LineReader(io.BytesIO(b"caf\xe9\\\nau lait\ny\nYES\nno\n"), is_interactive=True)
    assert reader.read() == "caf\ufffd\nau lait"
    assert [reader.confirm("sure?") for _ in range(4)] == [True, True, False, False]
    assert reader.read() is None
    assert capsys.readouterr().err.startswith("> . sure? [y/N] sure? [y/N] ")


def test_nobody_answers_in_a_pipe() -> None:
    lines = io.BytesIO(b"y\n")
    assert not LineReader(lines, is_interactive=False).confirm("sure?")
    assert lines.read() == b"y\n"


def test_ctrl_c_discards_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline()
            if line == b"!\n":
                raise KeyboardInterrupt
            return line

    reader = LineReader(Interrupted(b"a\\\n!\nb\n!\n"), is_interactive=True)
    assert [reader.read(), reader.read(), reader.confirm("sure?")] == ["", "b", False]
    assert "[Ctrl-D or /exit leaves the chat]" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        LineReader(Interrupted(b"!\n"), is_interactive=False).read()


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("/s", ["/system", "/set", "/save"]),
        ("/", [f"/{name}" for name in COMMANDS]),
        ("/set top", ["/set top_k", "/set top_p"]),
        ("/set draft ", ["/set draft default", "/set draft on", "/set draft off"]),
        ("/set seed ", ["/set seed default"]),
        ("/set magic ", []),
        ("/set seed 1 ", []),
        ("/undo ", []),
        ("hello /s", []),
        ("", []),
    ],
)
def test_completions(typed: str, found: list[str]) -> None:
    assert completions(typed) == found


# -- conversation ------------------------------------------------------------------------------------------------------


def encode(messages: Any) -> list[int]:
    """A token for each word, and two for each message."""
    if messages[0]["role"] == "system" and "forbidden" in messages[0]["content"]:
        raise PromptError("the template knows no such message")
    return [0] * sum(2 + len(message["content"].split()) for message in messages)


def conversation_of(*sizes: int, context: int = 80, system: str | None = None) -> Conversation:
    """One whose exchanges, numbered from 1, have so many tokens; of 80 tokens, 10 are kept for an answer."""
    conversation = Conversation(encode, context, system)
    conversation.start([Exchange(f"m{number}", "w " * (size - 5)) for number, size in enumerate(sizes, start=1)])
    return conversation


def test_a_turn_that_fits() -> None:
    conversation = conversation_of(20, system="Be brief.")
    turn = conversation.prepare("How are you?", 30)
    assert len(turn.prompt_ids) == 4 + 20 + 5
    assert (turn.num_dropped, turn.max_new_tokens, turn.fills_context) == (0, 30, False)
    conversation.keep(turn, "Well.")
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "m1"},
        {"role": "assistant", "content": "w " * 15},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Well."},
    ]


def test_an_answer_may_fill_the_context_and_no_more() -> None:
    assert conversation_of(20).prepare("Hi", 57).max_new_tokens == 57
    turn = conversation_of(20).prepare("Hi", 57)
    assert (turn.max_new_tokens, turn.fills_context) == (57, True)
    turn = conversation_of(20).prepare("Hi", 56)
    assert (turn.max_new_tokens, turn.fills_context) == (56, False)
    turn = conversation_of(20).prepare("Hi", 1000)
    assert (turn.max_new_tokens, turn.fills_context) == (57, True)


@pytest.mark.parametrize(
    ("sizes", "num_dropped"), [((67,), 0), ((68,), 1), ((30, 37), 0), ((30, 38), 1), ((10, 10, 68), 3), ((9, 70, 9), 2)]
)
def test_the_oldest_exchanges_are_dropped(sizes: tuple[int, ...], num_dropped: int) -> None:
    conversation = conversation_of(*sizes)
    turn = conversation.prepare("Hi", 1000)
    assert turn.num_dropped == num_dropped
    assert len(turn.prompt_ids) == sum(sizes[num_dropped:]) + 3
    assert turn.max_new_tokens == 80 - len(turn.prompt_ids)
    assert len(conversation.exchanges) == len(sizes)  # nothing is changed before there is an answer
    conversation.keep(turn, "Well.")
    assert len(conversation.exchanges) == len(sizes) + 1  # and all of it can be saved


def test_the_system_message_is_never_dropped() -> None:
    turn = conversation_of(65, system="Be brief.").prepare("Hi", 1000)
    assert (turn.num_dropped, len(turn.prompt_ids)) == (1, 7)


def test_what_is_dropped_stays_dropped() -> None:
    conversation = conversation_of(30, 38)
    conversation.keep(conversation.prepare("Hi", 1000), "Well.")
    conversation.undo()
    turn = conversation.prepare("Hi", 1)  # for which all would have room
    assert (turn.num_dropped, conversation.num_dropped) == (1, 1)
    conversation.undo()
    conversation.undo()
    assert conversation.num_dropped == 0
    assert conversation.undo() is None
    conversation.num_dropped = 3
    conversation.start()
    assert conversation.num_dropped == 0


def test_short_answers_need_little_room() -> None:
    assert conversation_of(75).prepare("Hi", 2).num_dropped == 0
    assert conversation_of(76).prepare("Hi", 2).num_dropped == 1


@pytest.mark.parametrize(
    ("system", "named"), [(None, "the message alone has 71"), ("Be brief.", "system message alone")]
)
def test_a_message_that_does_not_fit(system: str | None, named: str) -> None:
    conversation = conversation_of(20, 20, system=system)
    with pytest.raises(PromptError, match=named) as error:
        conversation.prepare("word " * 69, 1000)
    assert "10 kept for an answer" in str(error.value)
    assert "context of 80" in str(error.value)
    assert (len(conversation.exchanges), conversation.num_dropped) == (2, 0)
    assert conversation_of(20).prepare("word " * 68, 1000).max_new_tokens == 10


def test_a_context_of_few_tokens() -> None:
    assert Conversation(encode, 4).prepare("Hi", 1000).max_new_tokens == 1


def test_an_answer_again() -> None:
    conversation = conversation_of(20, 20)
    turn = conversation.prepare("m2", 10, again=True)
    assert len(turn.prompt_ids) == 20 + 3
    conversation.keep(turn, "Another.")
    assert [item.answer for item in conversation.exchanges] == ["w " * 15, "Another."]


def test_another_system_message() -> None:
    conversation = conversation_of(20)
    conversation.set_system("Be kind.")
    with pytest.raises(PromptError):
        conversation.set_system("This is forbidden.")
    assert conversation.system == "Be kind."
    conversation.set_system(None)
    assert conversation.messages[0]["role"] == "user"


# -- settings ----------------------------------------------------------------------------------------------------------


def settings(can_draft: bool = True, **params: Any) -> Settings:
    return Settings(SamplingParams(**params), can_draft=can_draft)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_new_tokens", "7", 7),
        ("max_tokens", "7", 7),
        ("num_predict", "7", 7),
        ("--max-new-tokens", "7", 7),
        ("TEMPERATURE", "0.5", 0.5),
        ("temp", ".5", 0.5),
        ("temperature", "1", 1.0),
        ("top_k", "40", 40),
        ("top_p", "1e-1", 0.1),
        ("min_p", "0.1", 0.1),
        ("repeat_penalty", "1.1", 1.1),
        ("presence_penalty", "-1", -1.0),
        ("frequency_penalty", "0.5", 0.5),
        ("logit_bias", '{"15": -5}', {15: -5.0}),
        ("logit_bias", "none", {}),
        ("seed", "-3", -3),
        ("seed", "none", None),
        ("stop", "END OF IT", ("END OF IT",)),
        ("stop", '"\\n\\n"', ("\n\n",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "42", ("42",)),
        ("stop", "True", ("True",)),
        ("stop", "None", ()),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("stop_token_ids", "2", (2,)),
        ("ignore_eos", "on", True),
        ("ignore_eos", "1", True),
        ("ignore_eos", "FALSE", False),
        ("draft", "off", False),
        ("draft", "no", False),
    ],
)
def test_settings(name: str, text: str, value: object) -> None:
    changed = settings()
    full = changed.set(name, text)
    assert changed[full] == value
    assert type(changed[full]) is type(value)
    changed.set("temperature", "0.9")
    if full not in ("draft", "temperature"):
        assert getattr(changed.params(), full) == value
    # what is shown can be typed again, and what is saved loaded
    again = settings()
    again.set(full, changed.text_of(full))
    assert again[full] == changed[full]
    again.load(json.loads(json.dumps(changed.as_dict())))
    assert again.as_dict() == changed.as_dict()


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("tempratur", "1", ("no setting 'tempratur'; did you mean temperature? /set",)),
        ("zzzz", "1", ("no setting 'zzzz'; /set shows all",)),
        ("logprobs", "1", ("no setting 'logprobs'",)),
        ("temperature", "hot", ("temperature is 'hot'", "a number, such as 0.7")),
        ("temperature", "0,7", ("'0,7'", "a number")),
        ("temperature", "-1", ("temperature is -1.0", "0 (greedy) or above")),
        ("temperature", "nan", ("temperature is nan",)),
        ("temperature", "true", ("a number",)),
        ("top_p", "5", ("top_p is 5.0", "at most 1")),  # though it has no effect yet
        ("max_new_tokens", "0", ("at least 1",)),
        ("max_new_tokens", "1.5", ("max_new_tokens is 1.5", "a whole number")),
        ("max_new_tokens", "none", ("a whole number",)),
        ("top_k", "many", ("a whole number",)),
        ("seed", "x", ("a whole number, or none",)),
        ("seed", str(2**64), ("64 bits",)),
        ("ignore_eos", "maybe", ("on or off",)),
        ("ignore_eos", "2", ("on or off",)),
        ("stop", "[1]", ("a text, several such as",)),
        ("stop", '""', ("non-empty",)),
        ("stop_token_ids", "x", ("a whole number, several such as [1, 2]",)),
        ("logit_bias", "15", ("a bias for each token id",)),
        ("logit_bias", '{"x": 1}', ("a bias for each token id",)),
    ],
)
def test_wrong_settings(name: str, text: str, named: tuple[str, ...]) -> None:
    changed = settings()
    with pytest.raises(ConfigError) as error:
        changed.set(name, text)
    assert all(part in str(error.value) for part in named), error.value
    assert changed.as_dict() == settings().as_dict()


def test_settings_of_drawn_texts_wait_for_a_temperature() -> None:
    changed = settings()
    for name, text in ("top_k", "5"), ("top_p", "0.5"), ("min_p", "0.1"), ("seed", "3"):
        assert not changed.has_effect(name)
        changed.set(name, text)
    assert changed.has_effect("max_new_tokens")
    assert changed.is_greedy
    assert changed.params() == SamplingParams()
    changed.set("temperature", "0.8")
    assert not changed.is_greedy
    wanted = SamplingParams(temperature=0.8, top_k=5, top_p=0.5, min_p=0.1, seed=3)
    assert changed.params() == wanted
    assert changed.params(max_new_tokens=5).max_new_tokens == 5
    changed.set("temperature", "0")
    assert changed.params() == SamplingParams()


def test_back_to_the_start() -> None:
    changed = settings(max_new_tokens=5)
    changed.set("max_new_tokens", "6")
    changed.set("max_new_tokens", "default")
    assert changed["max_new_tokens"] == 5


def test_a_model_without_drafts() -> None:
    changed = settings(can_draft=False)
    assert changed["draft"] is False
    with pytest.raises(ConfigError, match="loaded without"):
        changed.set("draft", "on")
    changed.load({"draft": True, "max_new_tokens": 3})  # saved beside another model
    assert (changed["draft"], changed["max_new_tokens"]) == (False, 3)


def test_rows_show_every_setting() -> None:
    rows = settings(stop=("a", "é")).rows()
    assert [row[0] for row in rows] == NAMES
    assert {"temperature", "top_k", "logit_bias", "stop", "seed", "draft"} <= set(NAMES)
    shown = {name: (value, text) for name, value, text in rows}
    assert shown["stop"][0] == '["a", "é"]'
    assert shown["draft"][0] == "on"
    assert shown["seed"] == ("none", "(not used at temperature 0) Same seed, same text (with a temperature).")
    assert shown["max_new_tokens"] == ("256", "Most tokens of an answer.")


def test_settings_are_loaded_whole_or_not_at_all() -> None:
    changed = settings()
    with pytest.raises(ConfigError, match="no setting 'magic'"):
        changed.load({"top_k": 5, "magic": 1})
    with pytest.raises(ConfigError, match="top_p is 7"):
        changed.load({"top_k": 5, "top_p": 7})
    assert changed["top_k"] == 0


# -- files -------------------------------------------------------------------------------------------------------------

MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🙂\n"},
    {"role": "assistant", "content": "Hallo\x1b"},
]


def test_a_saved_chat_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    saved.save(path, MESSAGES, {"top_k": 5}, "the model")
    chat = saved.load(path)
    assert (chat.system, chat.settings, chat.model) == ("Be brief.", {"top_k": 5}, "the model")
    assert chat.exchanges == (Exchange("Grüße 🙂\n", "Hallo\x1b"),)
    saved.save(path, [], {}, "")
    assert saved.load(path).exchanges == ()
    assert os.listdir(tmp_path) == ["a chat.json"]


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    saved.save(tmp_path / "link", MESSAGES, {}, "")
    assert (tmp_path / "link").is_symlink()
    assert saved.load(tmp_path / "file").system == "Be brief."


def test_a_chat_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    saved.save(path, MESSAGES, {}, "")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"chat\.json cannot be written"):
        saved.save(path, [{"role": "user", "content": "\ud800"}], {}, "")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["chat.json"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path, named in (
        (tmp_path, "is not a file"),
        (Path(os.devnull), "is not a file"),
        (tmp_path / "nowhere" / "chat.json", "nowhere does not exist"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(ConfigError, match=named):
            saved.save(path, MESSAGES, {}, "")
    assert os.listdir(tmp_path) == []


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", 'no list of "messages"'),
        (b'{"messages": {}}', 'no list of "messages"'),
        (b'{"messages": [], "hopskip_chat": 2}', "version 2; this hopskip reads 1"),
        (b'{"messages": [], "settings": []}', '"settings" are no object'),
        (b'{"messages": ["hi"]}', 'message 1 has no "role" and "content"'),
        (b'{"messages": [{"role": "user", "content": null}]}', "message 1 has no"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1 is not valid Unicode"),
        (turns("user").encode(), "its last message has no answer"),
        (turns("user", "tool").encode(), "message 2 is from 'tool', where 'assistant' is expected"),
        (turns("system", "system").encode(), "message 2 is from 'system', where 'user' is expected"),
        (turns("assistant", "user").encode(), "message 1 is from 'assistant'"),
    ],
)
def test_files_that_are_no_chat(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no saved chat") as error:
        saved.load(path)
    assert named in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, named in (tmp_path / "nowhere", "does not exist"), (tmp_path, "is not a file"):
        with pytest.raises(ConfigError, match=named):
            saved.load(path)


def test_a_file_of_others(tmp_path: Path) -> None:
    """Messages alone are enough."""
    (tmp_path / "chat.json").write_text("\ufeff" + turns("user", "assistant"), encoding="utf-8")
    chat = saved.load(tmp_path / "chat.json")
    assert (chat.system, chat.settings, chat.model, len(chat.exchanges)) == (None, {}, None, 1)


def test_names_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert saved.path_of("a b.json") == Path("a b.json")
    assert saved.path_of('"a b.json"') == saved.path_of("'a b.json'") == Path("a b.json")
    assert saved.path_of("~/chat") == Path("/home/somebody/chat")
    for text in "", '""', "a\0b", "~nobody-of-this-name/x":
        with pytest.raises(ConfigError):
            saved.path_of(text)


# -- lines that fit ----------------------------------------------------------------------------------------------------


def test_a_status_line_drops_fields_from_the_right() -> None:
    fields = ["12 tokens", "3.0 tokens/s", "context 5 of 9"]
    assert status_line(fields, None) == "[12 tokens; 3.0 tokens/s; context 5 of 9]"
    assert status_line(fields, 41) == "[12 tokens; 3.0 tokens/s; context 5 of 9]"
    assert status_line(fields, 40) == "[12 tokens; 3.0 tokens/s]"
    assert status_line(fields, 24) == "[12 tokens]"
    assert status_line(fields, 3) == "[12 tokens]"


def test_tables_fit() -> None:
    rows = [("a", "1", "first of all"), ("bcd", "22", "then another")]
    assert table_lines(rows, 80) == ["a    1   first of all", "bcd  22  then another"]
    assert table_lines(rows, 18) == ["a    1   first of", "         all", "bcd  22  then", "         another"]
    assert table_lines(rows, 17) == ["a    1", "  first of all", "bcd  22", "  then another"]
    assert table_lines([("你好", "x"), ("a", "")], 80) == ["你好  x", "a"]
