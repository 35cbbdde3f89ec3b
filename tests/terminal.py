"""A command in a terminal of its own, used as a person would: keys in, a picture of lines out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType

SOURCE = Path(__file__).parents[1] / "src"
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\x1b\][^\x07]*\x07")
_PATIENCE = 100  # seconds, for a machine that is very busy


class Terminal:
    """`hopskip` with these arguments in a terminal; ends with the block."""

    def __init__(self, *arguments: str | Path, columns: int = 100, **environment: str) -> None:
        self._controller, terminal = pty.openpty()
        self.resize(columns)
        unset = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "EDITOR", "VISUAL")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hopskip", *map(str, arguments)],
            env={**inherited, "PYTHONPATH": str(SOURCE), "TERM": "xterm-256color", **environment},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(terminal)
        self.raw = ""
        """All that came, with escape sequences."""
        self._num_seen = 0

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._controller, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def send(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def paste(self, text: str) -> None:
        """As a terminal does: in brackets, and with the Enter key's code for line ends."""
        self.send("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def interrupt(self) -> None:
        """What Ctrl-C does where it is no key, without discarding what was typed before it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, pattern: str) -> str:
        """Read until the text, less its escape sequences, has the pattern; returns the text up to its end. What was
        returned is not looked at again."""
        deadline = time.monotonic() + _PATIENCE
        while (found := re.search(pattern, self.text[self._num_seen :])) is None:
            ready, _, _ = select.select([self._controller], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text[self._num_seen :]!r}"
            try:
                self.raw += os.read(self._controller, 65_536).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"ended without {pattern!r} in {self.text[self._num_seen :]!r}") from None
        start = self._num_seen
        self._num_seen += found.end()
        return self.text[start : self._num_seen]

    @property
    def text(self) -> str:
        return re.sub("\r+\n", "\n", _SEQUENCE.sub("", self.raw))

    def end(self) -> int:
        """Wait until the command has ended; returns its exit code."""
        code, deadline = None, time.monotonic() + _PATIENCE
        while code is None:
            assert time.monotonic() < deadline, f"goes on after {self.text[-1000:]!r}"
            ready, _, _ = select.select([self._controller], [], [], 0.05)
            if ready:  # or it could not write its last words
                try:
                    self.raw += os.read(self._controller, 65_536).decode("utf-8", "replace")
                except OSError:
                    break
            code = self.process.poll()
        return self.process.wait(_PATIENCE)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)


def _own_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what it runs in the background with it ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
