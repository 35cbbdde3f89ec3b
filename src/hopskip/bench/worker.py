"""One process per contender. They take turns: while one works, the others are blocked on their pipes, so no thread pool
of theirs spins beside it, and no library's settings leak from one contender into another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from hopskip.bench.contenders import AbsentError, Contender, Footprint, Measurement

_SETTLE_SECONDS = 0.02
"""Before each run: thread pools spin for some milliseconds after their last task before they sleep."""


class WorkerError(Exception):
    """A contender could not be loaded, or failed in a run; `is_absent` if it cannot take part on this machine."""

    def __init__(self, message: str, *, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_absent = is_absent


class Worker:
    """A contender in its process. Starting it loads the model."""

    def __init__(self, contender: Contender, threads: int, max_model_len: int) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(contender, threads, max_model_len, theirs), name=contender.name, daemon=True
        )
        self._process.start()
        theirs.close()  # the child's end: when the child dies, reading here ends instead of waiting
        try:
            self.footprint: Footprint = self._receive()
        except BaseException:
            self.close()
            raise

    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        """One run.

        Raises:
            WorkerError: it failed, or its process died.
        """
        with contextlib.suppress(OSError):  # the process is dead then, as receiving will say
            self._connection.send((prompt_ids, num_tokens))
        measurement: Measurement = self._receive()
        return measurement

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerError(f"its process died (exit code {self._process.exitcode})") from None
        if kind == "result":
            return value
        raise WorkerError(value, is_absent=kind == "absent")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(contender: Contender, threads: int, max_model_len: int, connection: Connection) -> None:
    """The child's loop: load, then one run per message, until the parent hangs up."""
    # a library's chatter must not get into the report on the parent's stdout
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        runner = contender.start(threads, max_model_len)
        connection.send(("result", runner.footprint))
        while True:
            prompt_ids, num_tokens = connection.recv()
            time.sleep(_SETTLE_SECONDS)
            connection.send(("result", runner.generate(prompt_ids, num_tokens)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except AbsentError as error:
        connection.send(("absent", str(error)))
    except Exception as error:  # whatever it is, the parent reports it and goes on with the others
        connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))
