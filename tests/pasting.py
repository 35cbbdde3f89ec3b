"""Pastes what the documentation prints into a shell: a page's console lines and Python blocks, one after the other.

A block is run as it stands, in the order of the page, in one shell, so that a virtual environment that one line
activates holds for the next. What a reader knows and a program does not stands in a comment before the block:

    <!-- paste: slow; extras=eval -->

| note | |
|---|---|
| `skip=REASON` | cannot run where this is tried; the reason is listed |
| `slow` | not in the quick form, which the tests run |
| `extras=NAME,...` | of hopskip, which the page has said how to install |
| `exit=N` | the commands exit with N instead of 0 |
| `setup=COMMAND` | makes what the reader is said to have, such as a file |
| `server` | runs until the end of the page, and answers at `SERVER`; then it is stopped, and exits with 0 |
| `fresh` | nothing is installed before the page; its own lines do it |
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guide", "python", "serving", "speculation", "training", "deploy")),
]
"""The pages whose examples are for everybody. Those of measurements (benchmarks, notes) have hours to run."""
SERVER = "http://127.0.0.1:8000"

_NOTES = ("skip", "slow", "extras", "exit", "setup", "server", "fresh")
_FENCE = re.compile(
    r"(?:^<!-- paste: (?P<notes>[^\n]*?) -->\n\n?)?^```(?P<language>console|python)\n(?P<text>.*?)^```$", re.M | re.S
)
_MARK = "@@pasted@@"
_PASSED_ON = re.compile(r"PIP_\w+|\w+_proxy|\w+_PROXY|SSL_CERT_\w+|LANG|TERM|TMPDIR")


@dataclass(frozen=True)
class Block:
    """Console lines, or a Python program, of a page."""

    page: str
    line: int
    language: str
    text: str
    notes: Mapping[str, str]

    @property
    def commands(self) -> list[str]:
        """What a reader would paste behind the prompt; lines without a prompt are output, or go on after a `\\`."""
        joined = re.sub(r"\\\n(?:> )?", "\\\n", self.text)
        return [match[1] for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", joined, re.M)]

    @property
    def needs_checkout(self) -> bool:
        return self.language == "console" and any(
            command.startswith(("scripts/", "python -m benchmarks.")) for command in self.commands
        )

    def obstacle(self, *, quick: bool) -> str | None:
        """Why the block is left out, if it is."""
        if "skip" in self.notes:
            return self.notes["skip"]
        if self.needs_checkout:
            return "is for a checkout"
        if quick and self.language == "python":
            return "runs in the tests (tests/test_readme.py)"
        left_out = [name for name in ("slow", "extras", "server", "fresh") if quick and name in self.notes]
        return f"takes too long for the quick form ({left_out[0]})" if left_out else None


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: a note is not known, or lacks its value; or a block of commands has none.
    """
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        block = Block(page.name, line, match["language"], match["text"], _read_notes(match["notes"] or "", page, line))
        if block.language == "console" and not block.commands:
            raise ValueError(f"{page.name}:{line}: a console block without a line that begins with '$ '")
        blocks.append(block)
    pasted = text.count("<!-- paste:")
    if pasted != sum(bool(block.notes) for block in blocks):
        raise ValueError(f"{page.name}: a note for pasting does not stand right before a block")
    return blocks


def _read_notes(text: str, page: Path, line: int) -> dict[str, str]:
    notes: dict[str, str] = {}
    for note in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = note.partition("=")
        if name not in _NOTES or bool(equals) is not (name in ("skip", "extras", "exit", "setup")):
            raise ValueError(f"{page.name}:{line}: {note!r} is no note for pasting; see tests/pasting.py")
        notes[name] = value
    return notes


def reader_environment(home: Path, path: str) -> dict[str, str]:
    """The environment of a reader whose home is empty: of this one, only what leads to packages and the network."""
    passed_on = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    return {**passed_on, "HOME": str(home), "PATH": path, "COLUMNS": "120"}


class Failed(Exception):  # noqa: N818 (no error of the program that pastes)
    """A line did not do what the page says."""


class Shell:
    """A shell that lines are pasted into. Use it as a context manager.

    Args:
        folder: where it starts.
        timeout: seconds that a line may take.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], timeout: float = 900) -> None:
        self._folder, self._timeout = folder, timeout
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._has_server = False

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def paste(self, block: Block) -> Iterator[tuple[str, str]]:
        """Run a block; yields each command and its output, once it has done what it should.

        Raises:
            Failed: it exits otherwise, takes too long, or prints nothing (a program).
        """
        if "setup" in block.notes:
            self._run(block.notes["setup"], 0)
        if block.language == "python":
            program = self._folder / "example.py"
            program.write_text(block.text, encoding="utf-8")
            output = self._run(f"python {shlex.quote(str(program))}", 0)
            if not output.strip():
                raise Failed(f"{block.page}:{block.line}: the program prints nothing")
            yield "python example.py", output
            return
        for command in block.commands:
            if "server" in block.notes:
                self._start_server(command)
                yield command, ""
            else:
                yield command, self._run(command, int(block.notes.get("exit", 0)))

    def stop_server(self) -> None:
        """End what was started as a server, if anything was, as a service manager would.

        Raises:
            Failed: it does not end well.
        """
        if self._has_server:
            self._has_server = False
            self._run("kill $pasted_server && wait $pasted_server", 0)

    def _start_server(self, command: str) -> None:
        address = urlsplit(SERVER)
        with socket.socket() as attempt:
            if attempt.connect_ex((str(address.hostname), int(address.port or 80))) == 0:
                raise Failed(f"something answers at {SERVER} already; stop it first")
        self._run(f"{{ exec {command}\n}} > server.log 2>&1 & pasted_server=$!", 0)
        self._has_server = True
        deadline = time.monotonic() + self._timeout
        while not _is_healthy():
            if time.monotonic() > deadline or self._run("kill -0 $pasted_server; echo $?", None).strip() != "0":
                log = (self._folder / "server.log").read_text(encoding="utf-8", errors="replace")
                raise Failed(f"{command}\ndoes not come to answer at {SERVER}:\n{log[-2000:]}")
            time.sleep(0.5)

    def _run(self, command: str, expected: int | None) -> str:
        """Everything that a command prints. It reads nothing: what is pasted after it is for the shell."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{ {command}\n}} < /dev/null\nprintf '\\n{_MARK} %s\\n' $?\n".encode())
        self._process.stdin.flush()
        output, code = self._read(command)
        if expected is not None and code != expected:
            raise Failed(f"{command}\nexits with {code} instead of {expected}:\n{output[-4000:]}")
        return output

    def _read(self, command: str) -> tuple[str, int]:
        assert self._process.stdout is not None
        end, output = re.compile(rf"\n{_MARK} (\d+)\n".encode()), b""
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while (found := end.search(output)) is None:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Failed(f"{command}\ntakes longer than {self._timeout:.0f} s:\n{_text(output)[-2000:]}")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise Failed(f"{command}\nends the shell:\n{_text(output)[-2000:]}")
                output += part
        return _text(output[: found.start()]), int(found[1])


def paste_page(page: Path, shell: Shell, *, quick: bool, report: Callable[[str], None]) -> list[tuple[Block, str]]:
    """Paste a whole page; returns the blocks that were left out, with the reason.

    Raises:
        Failed: the first line that did not do what it should.
    """
    left_out = []
    for block in read_blocks(page):
        if reason := block.obstacle(quick=quick):
            left_out.append((block, reason))
            continue
        started = time.monotonic()
        for command, _ in shell.paste(block):
            report(f"{block.page}:{block.line}: {command} ({time.monotonic() - started:.1f} s)")
            started = time.monotonic()
    shell.stop_server()
    return left_out


def _is_healthy() -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{SERVER}/health", timeout=5):
            return True
    except OSError:
        return False


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
