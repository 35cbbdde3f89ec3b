"""One engine for any number of threads: whoever waits for a text steps it, for all the others too."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol, TypeVar

from hopskip.errors import ClosedError
from hopskip.sequence import Sequence

T = TypeVar("T")

_PATIENCE_SECONDS = 0.5
"""A thread that waits looks by itself so often, lest an interrupt in another one has cost it its call."""


class Steps(Protocol):
    """What is needed of an engine here."""

    def step(self) -> None: ...

    def abort(self, sequence: Sequence) -> None: ...


class Turns:
    """Lets one thread at a time touch an engine.

    A thread that waits for something takes the turn if nobody has it, and steps until it has what it waits for. Those
    that come meanwhile wait; between two steps the thread that has the turn carries out what they have ordered (new
    requests, dropped ones) and looks for each of them whether it has what it waits for.
    """

    def __init__(self, engine: Steps) -> None:
        self._engine: Steps | None = engine
        self._turn = threading.Lock()
        """Held by the thread that touches the engine."""
        self._orders: deque[Callable[[], object]] = deque()
        self._waiting: list[_Waiting] = []

    @property
    def is_closed(self) -> bool:
        """True if the engine is not there any more."""
        return self._engine is None

    def do(self, action: Callable[[], T]) -> T:
        """Do something with the engine between two steps.

        Raises:
            ClosedError: the engine has been closed.
        """
        if self.is_closed:
            raise closed()
        order = _Order(action)
        self._orders.append(order.carry_out)
        self.wait(lambda: order.outcome)
        assert order.outcome is not None
        error = order.outcome[1]
        if error is not None:
            raise error
        result: T = order.outcome[0]
        return result

    def wait(self, look: Callable[[], T | None]) -> T:
        """Step until `look` finds something. It is called between two steps, in whichever thread has the turn.

        Raises:
            ClosedError: the engine has been closed.
        """
        mine = _Waiting(look)
        self._waiting.append(mine)
        try:
            while not mine.is_served:
                if self._turn.acquire(blocking=False):
                    try:
                        self._step_until_served(mine)
                    finally:
                        self._turn.release()
                else:
                    mine.call.wait(_PATIENCE_SECONDS)
                    mine.call.clear()
        finally:
            self._waiting.remove(mine)
            self._leave()
        if mine.error is not None:
            raise mine.error
        found: T = mine.found
        return found

    def drop(self, sequences: Seq[Sequence]) -> None:
        """End requests: now, or after the step that is under way. Never waits, since the garbage collector may close a
        stream in any thread, one that has the turn included."""
        self._orders.append(lambda: self._abort(sequences))
        self._leave()

    def close(self) -> None:
        """Serve nobody any more: whoever waits gets a ClosedError."""
        if not self.is_closed:
            self.do(self._forget)

    def _forget(self) -> None:
        self._engine = None

    def _abort(self, sequences: Seq[Sequence]) -> None:
        if self._engine is not None:
            for sequence in sequences:
                self._engine.abort(sequence)

    def _step_until_served(self, mine: _Waiting) -> None:
        while True:
            self._obey()
            for waiting in tuple(self._waiting):
                waiting.serve(is_last=self.is_closed)
            if mine.is_served:
                return
            assert self._engine is not None
            self._engine.step()

    def _obey(self) -> None:
        while self._orders:
            # an order goes only when it is done: who takes the next turn does again what an interrupt cut short
            self._orders[0]()
            self._orders.popleft()

    def _leave(self) -> None:
        """Do what has been ordered since nobody looked, and let another thread have the turn."""
        while self._orders and self._turn.acquire(blocking=False):
            try:
                self._obey()
            finally:
                self._turn.release()
        for waiting in tuple(self._waiting):
            waiting.call.set()


def closed() -> ClosedError:
    """What is said of a model that has been closed."""
    return ClosedError("this LLM has been closed; make a new one")


class _Order:
    """Something to be done between two steps, and what came of it."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.outcome: tuple[Any, Exception | None] | None = None

    def carry_out(self) -> None:
        if self.outcome is None:
            try:
                self.outcome = self._action(), None
            except Exception as error:  # for the thread that has ordered it
                self.outcome = None, error


class _Waiting:
    """A thread that waits."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look = look
        self.call = threading.Event()
        self.found: Any = None
        self.error: Exception | None = None

    @property
    def is_served(self) -> bool:
        return self.found is not None or self.error is not None

    def serve(self, *, is_last: bool) -> None:
        """Look for what this thread waits for, and call it if it is there, or never will be."""
        if self.is_served:
            return
        try:
            self.found = self._look()
        except Exception as error:  # for the thread that waits
            self.error = error
        if is_last and not self.is_served:
            self.error = closed()
        if self.is_served:
            self.call.set()
