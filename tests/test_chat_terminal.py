"""`hopskip chat` in a real terminal, with a tiny model: what is pasted, typed, stopped, searched and kept."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from hopskip.cli.talk.prompt import history_path, open_history
from tests.terminal import Terminal
from tests.tiny import write_checkpoint

STATUS = r"\[(cut|stopped)[^]]*\]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that can go on for long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama2-mha", tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def start(model: Path, home: Path, *options: str, columns: int = 100, **environment: str) -> Terminal:
    chat: list[str | Path] = ["chat", "-m", model, "--ignore-eos", *options]
    return Terminal(*chat, columns=columns, XDG_STATE_HOME=str(home), **environment)


def messages(terminal: Terminal, path: Path) -> list[str]:
    """What the user has said, by way of /save."""
    terminal.send(f"/save {path}\r")
    terminal.wait_for(r"\[saved to [^]]*\]")
    said = json.loads(path.read_text(encoding="utf-8"))["messages"]
    path.unlink()
    return [message["content"] for message in said if message["role"] == "user"]


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Path]]:
    """One chat for several tests, each of which leaves it at an empty prompt; and a folder for its files."""
    folder = tmp_path_factory.mktemp("shared")
    with start(model, folder, "-n", "8") as terminal:
        terminal.wait_for(r"(?m)^>")
        yield terminal, folder
        terminal.send("\x04")
        assert terminal.end() == 0


def test_start(shared: tuple[Terminal, Path]) -> None:
    terminal, _ = shared
    assert "/help shows commands and keys" in terminal.text
    assert "Colours: drafted by an exit, copied from earlier text (n-gram), " in terminal.text
    assert "\x1b[32mdrafted by an exit" in terminal.raw


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("Hello\r", "Hello"),
        ("Hello\n", "Hello"),  # a program that sends keys may use the code of Ctrl-J
        ('"""one\r  two\rthree"""\r', "one\n  two\nthree"),
        ("one\\\rtwo\\\\\r", "one\ntwo\\\\"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("//one\r", "/one"),
        ("一二\x7f三 🙂\r", "一三 🙂"),
        ("wrong\x03right\r", "right"),
    ],
)
def test_typed_messages(shared: tuple[Terminal, Path], keys: str, said: str) -> None:
    terminal, folder = shared
    terminal.send(keys)
    terminal.wait_for(STATUS)
    assert messages(terminal, folder / "chat.json")[-1] == said


@pytest.mark.parametrize(
    "text", ["one\n\n  two\nthree", "/usr/bin\nis a folder", "one\ntwo\\", '"""Doc."""\nx = 1', "你好\n🙂"]
)
def test_pasted_messages(shared: tuple[Terminal, Path], text: str) -> None:
    terminal, folder = shared
    before = messages(terminal, folder / "chat.json")
    terminal.paste(text)
    terminal.send(" end\r")
    terminal.wait_for(STATUS)
    assert messages(terminal, folder / "chat.json") == [*before, f"{text} end"]


def test_commands(shared: tuple[Terminal, Path]) -> None:
    terminal, folder = shared
    terminal.send("/und\t\r")
    terminal.wait_for(r"forgotten|nothing to undo")
    terminal.send("exit\r")
    terminal.wait_for(re.escape("leave the chat? [y/N]"))
    terminal.send("n\r/hlep\r")
    terminal.wait_for(r"no command /hlep; did you mean /help\?")
    terminal.send("searched for\r")
    terminal.wait_for(STATUS)
    terminal.send("\x12arched\r\r")  # Ctrl-R; Enter takes what is found, and Enter sends it
    terminal.wait_for(STATUS)
    assert messages(terminal, folder / "chat.json")[-2:] == ["searched for", "searched for"]
    path = folder / "chat.json"
    path.write_text("mine")
    terminal.send(f"/save {path}\r")
    terminal.wait_for(r"overwrite it\? \[y/N\]")
    terminal.send("\r")
    terminal.wait_for(r"is\s+left\s+as\s+it\s+is")
    assert path.read_text() == "mine"
    path.unlink()


def test_ctrl_c_stops_and_what_was_typed_meanwhile_waits(model: Path, home: Path) -> None:
    with start(model, home, "-n", "150000") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.send("Hello\r")
        terminal.wait_for(r"Hello\s*\n.")  # the answer has begun
        terminal.paste("typed\nmeanwhile")
        terminal.interrupt()
        status = terminal.wait_for(STATUS)
        assert "stopped by Ctrl-C" in status
        assert "meanwhile" not in status
        terminal.wait_for(r"typed\s+.\s*meanwhile")
        terminal.send("\x03")
        terminal.send("/set max_new_tokens 4\r")
        terminal.wait_for(r"\[max_new_tokens 4\]")
        terminal.send("And?\r")
        terminal.wait_for(STATUS)
        assert messages(terminal, home / "chat.json") == ["Hello", "And?"]
        terminal.send("quit\r")
        terminal.wait_for(r"leave the chat\? \[y/N\]")
        terminal.send("y\r")
        assert terminal.end() == 0


def test_a_narrow_terminal(model: Path, home: Path) -> None:
    """No line but the model's own is cut or broken inside a word, also after the terminal has become narrower."""
    with start(model, home, "-n", "2", columns=100, NO_COLOR="1") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.send("Hello\r")
        assert len(terminal.wait_for(STATUS).split("\n")[-1]) > 40
        for columns in 40, 24:
            terminal.wait_for(r"(?m)^>")
            terminal.resize(columns)
            terminal.send("Hello\r")
            terminal.wait_for("Hello\n")
            assert 8 <= max(map(len, terminal.wait_for(STATUS).split("\n")[-2:])) < columns
            for command, end in (
                ("/help", r"message\s+that\s+begins\s+with\s+/\n"),
                ("/set", r"draft\s+on\n"),
                ("/set top_p 7", r"at\s+most\s+1\n"),
                ("/hlep", r"begins\s+a\s+message\n"),
            ):
                terminal.wait_for(r"(?m)^>")
                terminal.send(f"{command}\r")
                terminal.wait_for(re.escape(f"{command}\n"))
                shown = terminal.wait_for(end).split("\n")
                assert len(shown) > 2
                assert max(map(len, shown)) < columns
        assert not re.search(r"\x1b\[[0-9;]*3[1-7]m", terminal.raw)
        assert "Colours" not in terminal.text
        terminal.wait_for(r"(?m)^>")
        terminal.send("\x04")
        assert terminal.end() == 0


def test_history_comes_back(model: Path, home: Path) -> None:
    file = home / "hopskip" / "chat-history"
    file.parent.mkdir()
    file.write_text("\n# 2026-01-01\n+/set top_k 5\n+\n\n# 2026-01-01\n+/set seed 5\n")
    file.chmod(0o644)
    with start(model, home, "-n", "2") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.interrupt()  # there is nothing to stop
        terminal.send("\x1b[A\r")
        terminal.wait_for(r"\[seed 5\]")
        terminal.send("/set min_p 0.5\r")
        terminal.wait_for(r"\[min_p 0.5\]")
    assert file.read_text().endswith("\n+/set min_p 0.5\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_history_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOPSKIP_HISTORY", raising=False)
    assert history_path() == Path("/home/somebody/.local/state/hopskip/chat-history")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/hopskip/chat-history")
    monkeypatch.setenv("HOPSKIP_HISTORY", "~/typed")
    assert history_path() == Path("/home/somebody/typed")
    monkeypatch.setenv("HOPSKIP_HISTORY", "")
    assert history_path() is None


def test_history_that_cannot_be_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(open_history(None), InMemoryHistory)
    assert isinstance(open_history(Path(os.devnull)), InMemoryHistory)
    assert capsys.readouterr().err == ""
    (home / "file").touch()
    for path in home, home / "file" / "history":
        assert isinstance(open_history(path), InMemoryHistory)
        assert f"[history is not kept: {'not a file' if path is home else 'File exists'}" in capsys.readouterr().err
    history = open_history(home / "new" / "history")
    assert stat.S_IMODE((home / "new" / "history").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "new").stat().st_mode) == 0o700
    (home / "new" / "history").unlink()
    (home / "new" / "history").mkdir()
    history.append_string("one")
    history.append_string("two")
    assert capsys.readouterr().err == "[history is not kept any more: Is a directory]\n"


def test_a_long_history_keeps_its_newer_half(home: Path) -> None:
    entries = [f"\n# 2026-01-01\n+entry {number} {'x' * 1000}\n" for number in range(1100)]
    file = home / "history"
    file.write_text("".join(entries))
    kept = list(open_history(file).load_history_strings())
    assert kept[0] == f"entry 1099 {'x' * 1000}"
    assert kept[-1].startswith("entry ")
    assert 400 < len(kept) < 520
    assert file.stat().st_size <= 2**19
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    size = file.stat().st_size
    open_history(file)
    assert file.stat().st_size == size
