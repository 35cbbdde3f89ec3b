"""`hopskip serve --restart`: a parent process that holds the socket, and starts the server again when it dies.

The socket stays open in between, so that clients who come while the model is loaded wait instead of being refused.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_STABLE_SECONDS = 60.0
"""A worker that has lived so long starts the delays over."""


def _log(message: str, **fields: object) -> None:
    print(
        json.dumps({"level": "warning", "logger": "hopskip.serve.supervisor", "message": message, **fields}),
        file=sys.stderr,
    )


class Supervisor:
    """Runs a command again and again until it ends by itself with code 0 or 2, or a signal tells to stop.

    Args:
        command: the worker; it is given `--inherit-socket FD,FD`: the listening socket, and a pipe that closes when
            this process dies.
    """

    def __init__(self, command: list[str], listener: socket.socket) -> None:
        self._command = command
        self._listener = listener
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> int:
        """The exit code of the last worker."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        delay = _FIRST_DELAY
        while True:
            started = time.monotonic()
            code = self._run_once()
            # 0: told to stop; 2: a setting is wrong, and will be next time too
            if self._is_stopping or code in (0, 2):
                return code
            if time.monotonic() - started > _STABLE_SECONDS:
                delay = _FIRST_DELAY
            _log("the server has died; starting it again", exit_code=code, delay_seconds=delay)
            time.sleep(delay)
            if self._is_stopping:
                return code
            delay = min(2 * delay, _LONGEST_DELAY)

    def _run_once(self) -> int:
        ours, theirs = os.pipe()
        fds = (self._listener.fileno(), ours)
        try:
            self._worker = subprocess.Popen([*self._command, "--inherit-socket", f"{fds[0]},{fds[1]}"], pass_fds=fds)
            os.close(ours)
            if self._is_stopping:
                self._worker.terminate()
            return self._worker.wait()
        finally:
            os.close(theirs)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._worker is not None and self._worker.poll() is None:
            self._worker.send_signal(number)
