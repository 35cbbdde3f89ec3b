"""The engine in a thread of its own, and an asyncio face on it: submit, iterate over what comes, cancel.

The thread alone touches the engine. It steps as long as there is work, takes orders between two steps, and hands every
step's tokens to the event loop in one go.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from hopskip.engine.engine import Engine
from hopskip.engine.slots import PrefixStats
from hopskip.errors import BusyError as BusyError
from hopskip.errors import ConfigError, HopskipError
from hopskip.sequence import Request
from hopskip.serve.batch import Batch, Generation, Job, Piece
from hopskip.serve.queue import Queue, Room
from hopskip.serve.race import Race
from hopskip.text.tokenizer import TextStream

_log = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""The engine is dead when so many steps in a row have failed for every request that took part."""
_STALL_SECONDS = 120.0
"""A step that takes longer than this hangs."""


class UnavailableError(HopskipError):
    """The engine has died, or the server is shutting down."""


class GenerationError(HopskipError):
    """This request has failed inside the engine; the others go on."""


class Observer(Protocol):
    """Told by the engine's thread what happens; metrics are kept so."""

    def on_step(self, num_running: int, num_waiting: int, cache_usage: float, prefixes: PrefixStats) -> None: ...

    def on_tokens(self, generation: Generation, num_tokens: int, now: float) -> None: ...

    def on_finish(self, generation: Generation, now: float) -> None: ...


class _Nobody:
    """An observer who does not care."""

    def on_step(self, num_running: int, num_waiting: int, cache_usage: float, prefixes: PrefixStats) -> None: ...

    def on_tokens(self, generation: Generation, num_tokens: int, now: float) -> None: ...

    def on_finish(self, generation: Generation, now: float) -> None: ...


class EngineThread:
    """Runs an engine for many clients at once.

    Args:
        make_text: the text of a request as it grows.
        max_queue: sequences that may wait beyond those that are stepped together.
        room_of_client: what of one client may run or wait; None: as much as of all.
        observer: told of every step.
    """

    def __init__(
        self,
        engine: Engine,
        make_text: Callable[[Request], TextStream],
        *,
        max_queue: int,
        room_of_client: Room | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._make_text = make_text
        room = Room(num_sequences=engine.max_num_seqs + max_queue)
        self._queue = Queue(room, room_of_client or room)
        """Submitted and not ended. The event loop alone uses it."""
        self._observer = observer or _Nobody()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: list[Generation] = []
        """Those not ended yet. The engine's thread alone uses it."""
        self._races: list[Race] = []
        """Those that run. The engine's thread alone uses it."""
        self._submissions: set[asyncio.Future[Batch]] = set()
        """Those that the thread has not looked at yet. The event loop alone uses it."""
        self._num_failures = 0
        self._stepping_since: float | None = None
        self._is_stopped = False
        self._is_draining = False
        self._death: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="hopskip-engine", daemon=True)

    def start(self) -> None:
        """Start stepping, for the clients of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    # -- for the event loop --------------------------------------------------------------------------------------------

    @property
    def death(self) -> str | None:
        """Why the engine is dead; None while it lives."""
        since = self._stepping_since
        if self._death is None and since is not None and time.monotonic() - since > _STALL_SECONDS:
            return f"a step hangs for more than {_STALL_SECONDS:.0f} seconds"
        return self._death

    @property
    def is_ready(self) -> bool:
        """True if new requests are taken (there may still be no room for them)."""
        return self.death is None and self._thread.is_alive() and not self._is_draining

    @property
    def num_outstanding(self) -> int:
        """Sequences that run or wait."""
        return len(self._queue)

    async def submit(self, jobs: Seq[Job], *, is_race: bool = False) -> Batch:
        """Queue jobs, all or none.

        Args:
            is_race: they are two, of one prompt, with drafts and without: see `Race`.

        Raises:
            BusyError: the queue has no room for all of them now.
            UnavailableError: the engine is dead, or shutting down.
            PromptError, ConfigError: a job cannot be served.
        """
        if not self.is_ready:
            raise UnavailableError("the engine has died" if self.death else "the server is shutting down")
        self._queue.enter(jobs)
        assert self._loop is not None
        admitted: asyncio.Future[Batch] = self._loop.create_future()
        self._idle.clear()
        self._submissions.add(admitted)
        admitted.add_done_callback(self._submissions.discard)
        self._order(lambda: self._admit(jobs, admitted, is_race))
        try:
            return await asyncio.shield(admitted)
        except asyncio.CancelledError:
            # the client has gone before the thread looked at its jobs
            admitted.add_done_callback(_cancel_admitted)
            raise

    async def drain(self, timeout: float) -> bool:
        """Take no more jobs and wait for those there are; True if all of them ended by themselves within `timeout`."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def abort_all(self) -> None:
        """End everything that runs or waits."""
        self._is_draining = True
        self._order(lambda: self._abort(self._live))

    async def stop(self) -> None:
        """Abort what is left, and end the thread."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """As `stop`, for when no event loop runs."""
        if self._thread.is_alive():
            self.abort_all()
            self._order(self._stop)
            self._thread.join(10)

    # -- in the engine's thread ----------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)

    def _cancel(self, batch: Batch) -> None:
        self._order(lambda: self._abort(batch.generations))

    def _abort(self, generations: Seq[Generation]) -> None:
        for generation in generations:
            self._engine.abort(generation.sequence)

    def _stop(self) -> None:
        self._is_stopped = True

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._obey()
                if self._engine.has_work:
                    self._stepping_since = time.monotonic()
                    self._step()
                    self._stepping_since = None
                self._publish()
            self._abort(self._live)  # left where the event loop has ended before them
        except BaseException as error:  # whatever it is, nobody may wait for this thread any more
            _log.critical("the engine has died", exc_info=error)
            self._die(f"{type(error).__name__}: {error}")

    def _obey(self) -> None:
        """Carry out the orders that have come in; with nothing else to do, wait for one."""
        if not self._engine.has_work:
            self._orders.get()()
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _admit(self, jobs: Seq[Job], admitted: asyncio.Future[Batch], is_race: bool) -> None:
        batch = Batch(self._cancel)
        try:
            for job in jobs:
                text = self._make_text(job.request)
                sequence = self._engine.add(replace(job.request, is_stop=text.push))
                batch.generations.append(Generation(job, sequence, text, batch))
        except Exception as error:
            self._abort(batch.generations)
            self._tell(self._refuse, jobs, admitted, error)
            return
        self._live += batch.generations
        if is_race:
            batch.race = Race([generation.sequence for generation in batch.generations])
            self._races.append(batch.race)
        self._tell(admitted.set_result, batch)

    def _step(self) -> None:
        self._races = [race for race in self._races if not race.is_over]
        resting = {race: rest for race in self._races if (rest := race.take_turn()) is not None}
        started = time.perf_counter()
        try:
            self._engine.step(resting=list(resting.values()))
            self._num_failures = 0
            for race in resting:
                race.count(time.perf_counter() - started)
        except Exception as error:
            _log.exception("a step has failed; looking for the request at fault")
            self._num_failures += 1
            self._isolate()
            if self._num_failures >= _MAX_FAILURES:
                raise error

    def _isolate(self) -> None:
        """Step every running request by itself; those that fail again end, the others are none the worse."""
        for sequence in self._engine.running:
            try:
                self._engine.step(only=[sequence])
                self._num_failures = 0
            except Exception as error:  # noqa: PERF203
                sequence.fail(error)
        self._engine.step(only=[])  # gives their slots back

    def _publish(self) -> None:
        """Hand new pieces to their readers."""
        now = time.perf_counter()
        news: list[tuple[Generation, list[Piece], bool]] = []
        for generation in self._live:
            is_finished = generation.sequence.is_finished
            if num_new := generation.count_new():
                self._observer.on_tokens(generation, num_new, now)
                generation.last_token_at = now
            if is_finished:
                self._observer.on_finish(generation, now)
            pieces = generation.take()
            if pieces or is_finished:
                news.append((generation, pieces, is_finished))
        if any(is_finished for _, _, is_finished in news):
            self._live = [g for g in self._live if not g.sequence.is_finished]
        engine = self._engine
        self._observer.on_step(len(engine.running), engine.num_waiting, engine.cache_usage, engine.prefix_stats)
        if news:
            self._tell(self._deliver, news)

    def _die(self, reason: str) -> None:
        self._death = reason
        self._stepping_since = None
        dead, self._live = self._live, []
        self._tell(self._bury, dead)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back in the event loop, if it still runs."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            self._is_stopped = True

    # -- called back in the event loop ---------------------------------------------------------------------------------

    def _deliver(self, news: list[tuple[Generation, list[Piece], bool]]) -> None:
        for generation, pieces, is_finished in news:
            if pieces:
                generation.deliver(pieces)
            if is_finished:
                error = generation.sequence.error
                if isinstance(error, ConfigError):  # what the request asks for is at fault: a grammar, say
                    generation.deliver(error)
                elif error is not None:
                    _log.error("a request has failed", exc_info=error)
                    generation.deliver(GenerationError("generating this answer has failed"))
                else:
                    generation.deliver(None)
                self._settle([generation.job])

    def _refuse(self, jobs: Seq[Job], admitted: asyncio.Future[Batch], error: Exception) -> None:
        self._settle(jobs)
        admitted.set_exception(error)

    def _bury(self, dead: list[Generation]) -> None:
        for generation in dead:
            generation.deliver(UnavailableError("the engine has died"))
        self._settle([generation.job for generation in dead])
        for admitted in list(self._submissions):
            admitted.set_exception(UnavailableError("the engine has died"))

    def _settle(self, ended: Seq[Job]) -> None:
        self._queue.leave(ended)
        if not len(self._queue):
            self._idle.set()


def _cancel_admitted(admitted: asyncio.Future[Batch]) -> None:
    if not admitted.cancelled() and admitted.exception() is None:
        admitted.result().cancel()
