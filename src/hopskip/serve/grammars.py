"""Clients' grammars: tried in processes that can be killed, then compiled here.

A few processes (`hopskip.text.grammar_worker`) take turns. One that crashes, or takes too long, is replaced at once,
and the request whose grammar it was is refused; nobody else notices, and no lock or shared thread is held meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from hopskip.errors import BusyError, ConfigError
from hopskip.serve.settings import Limits
from hopskip.text.grammar import GrammarCompiler, GrammarConstraint, Source
from hopskip.text.grammar_build import Kind
from hopskip.text.grammar_worker import write_frame

T = TypeVar("T")

_Question = tuple[Kind, str, str]
"""A grammar's kind and text, and what may come before."""
_START_SECONDS = 60.0
_END_SECONDS = 5.0
_PATIENCE = 5
"""Clocks run faster than processor time: the engine comes first, and other processes may be about."""
_NUM_KEPT = 256
"""Answers that are kept: who comes with the same grammar again need not wait."""
_SMALL = 2**20
"""Compiled grammars up to so many bytes are kept."""
_RETRY_SECONDS = 5
"""What who finds the queue full is told to wait: as long as a few hostile grammars take."""


class Grammars:
    """Compiles untrusted grammars, for one event loop at a time.

    Args:
        compiler: has the vocabulary, and compiles what has been tried.
    """

    def __init__(self, compiler: GrammarCompiler, limits: Limits) -> None:
        self._compiler = compiler
        self._limits = limits
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._turns: asyncio.Semaphore | None = None
        self._num_waiting = 0
        self._answers: OrderedDict[_Question, dict[str, Any]] = OrderedDict()

    async def compile(self, kind: Kind, source: Source, *, before: str = "") -> GrammarConstraint:
        """A fresh constraint.

        Args:
            before: see `grammar_build.build`.

        Raises:
            ConfigError: the grammar is not valid, or takes too much time or memory.
            BusyError: too many others wait.
        """
        question = (kind, self._compiler.text_of(source), before)
        answer = self._answers.get(question) or await self._ask_in_turn(question)
        self._answers[question] = answer
        self._answers.move_to_end(question)
        while len(self._answers) > _NUM_KEPT:
            self._answers.popitem(last=False)
        if "error" in answer:
            raise ConfigError(answer["error"])
        keep = answer["bytes"] <= _SMALL
        compiling = _in_thread(lambda: self._compiler.adopt(answer["grammar"], answer["dropped"], keep=keep))
        try:
            return await asyncio.wait_for(compiling, self._limits.grammar_seconds * _PATIENCE)
        except asyncio.TimeoutError:
            raise ConfigError(self._too_slow) from None

    async def close(self) -> None:
        """End all processes."""
        self._idle, self._turns = [], None
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    async def _ask_in_turn(self, question: _Question) -> dict[str, Any]:
        if self._num_waiting >= self._limits.num_grammars:
            raise BusyError(f"{self._num_waiting} grammars wait to be compiled", _RETRY_SECONDS)
        if self._turns is None:
            self._turns = asyncio.Semaphore(self._limits.num_grammar_workers)
        self._num_waiting += 1
        try:
            async with self._turns:
                # the same one may have been answered while this one waited
                return self._answers.get(question) or await self._ask(question)
        finally:
            self._num_waiting -= 1

    async def _ask(self, question: _Question) -> dict[str, Any]:
        worker = self._idle.pop() if self._idle else self._new_worker()
        is_good = False
        try:
            await worker.started()
            kind, text, before = question
            asking = worker.ask({"kind": kind, "text": text, "strict": False, "before": before})
            answer = await asyncio.wait_for(asking, self._limits.grammar_seconds * _PATIENCE)
            is_good = not answer.pop("is_spent")
        except asyncio.TimeoutError:
            raise ConfigError(self._too_slow) from None  # not kept: it may be the machine that is slow
        except (asyncio.IncompleteReadError, ConnectionError):
            is_slow = await worker.ended() == -getattr(signal, "SIGPROF", 0)
            return {
                "error": self._too_slow
                if is_slow
                else "the grammar cannot be used: compiling it fails, or takes too much memory; make it simpler, and "
                "its numbers smaller"
            }
        else:
            return answer
        finally:
            if is_good:
                self._idle.append(worker)
            else:
                await worker.kill()
                self._workers.discard(worker)
                if self._turns is not None:
                    self._idle.append(self._new_worker())

    def _new_worker(self) -> _Worker:
        source = self._compiler.vocabulary_source()
        limits = {"memory_bytes": self._limits.grammar_bytes, "seconds": self._limits.grammar_seconds}
        worker = _Worker({**source, **limits})
        self._workers.add(worker)
        return worker

    @property
    def _too_slow(self) -> str:
        return f"the grammar takes longer than {self._limits.grammar_seconds:g} s to compile; make it simpler"


class _Worker:
    """One process. It starts at once, and is ready some time later."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process: Process | None = None
        self._is_killed = False
        self._killing: asyncio.Future[None] | None = None
        self._starting = asyncio.ensure_future(self._start(settings))
        self._starting.add_done_callback(lambda task: None if task.cancelled() else task.exception())

    async def started(self) -> None:
        """Raises ConfigError: it cannot work with this model's vocabulary, or does not start."""
        try:
            await asyncio.shield(self._starting)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            raise ConfigError(f"no grammar can be compiled: the process for it does not start ({error})") from None

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for the answer.

        Raises:
            IncompleteReadError, ConnectionError: the process has ended.
        """
        assert self._process is not None
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(write_frame(message))
        await requests.drain()
        [length] = struct.unpack("<I", await answers.readexactly(4))
        answer: dict[str, Any] = json.loads(await answers.readexactly(length))
        return answer

    async def ended(self) -> int | None:
        """How a process ended that has closed its pipe; None if it goes on."""
        assert self._process is not None
        # not by kill(), which takes the status of an ended process away from asyncio, and asyncio then makes one up
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        return self._process.returncode

    async def kill(self) -> None:
        """End the process, whatever it does."""
        self._is_killed = True
        if self._killing is None:
            self._killing = asyncio.ensure_future(self._kill())
        await asyncio.shield(self._killing)

    async def _kill(self) -> None:
        if self._process is None:
            await asyncio.wait([self._starting])
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.wait([self._starting])
        await self._process.communicate()

    async def _start(self, settings: dict[str, Any]) -> None:
        # it needs this one's modules, and none of its secrets
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HOPSKIP_")}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hopskip.text.grammar_worker",
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment,
        )  # fmt: skip
        if self._is_killed:
            return
        answer = await asyncio.wait_for(self.ask(settings), _START_SECONDS)
        if "error" in answer:
            raise ConfigError(answer["error"])


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Do this in a thread of its own, for which nobody waits at the end: the pool that others share stays free."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = (work(), None)
        except BaseException as error:
            outcome = (None, error)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="hopskip-grammar", daemon=True).start()
    return future
