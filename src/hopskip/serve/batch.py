"""Requests between the engine's thread and the event loop: the jobs of one, and what has come of them so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from hopskip.sequence import FinishReason, Request, Sequence, Token
from hopskip.serve.race import Race
from hopskip.text.tokenizer import TextStream


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence to generate."""

    request: Request
    """Stop strings are looked for by the engine's thread."""
    num_choices: int = 1
    """Sequences that its prompt has in all."""
    counts_prompt: bool = True
    """It is the first of them: a prompt counts once."""
    is_streamed: bool = True
    """False: nobody looks at a piece before the last one is there, so all of them come then. The event loop that wakes
    for every step takes a core from the engine."""

    def of_client(self, client: str | None, cache_salt: str | None) -> Job:
        """The same as a client's own: its prompt starts from nothing that another has left in the cache."""
        salt = None if client is None and cache_salt is None else f"{client or ''}:{cache_salt or ''}"
        return replace(self, request=replace(self.request, client=client, cache_salt=salt))


@dataclass(frozen=True)
class Piece:
    """One token, and the text that became certain with it (possibly none)."""

    token: Token
    text: str


_News = list[Piece] | Exception | None
"""Of a generation: a step's pieces, why it has failed, or that it has ended."""


class Generation:
    """One job on its way, one of a `Batch`."""

    def __init__(self, job: Job, sequence: Sequence, text: TextStream, batch: Batch) -> None:
        self.job = job
        self.sequence = sequence
        self.submitted_at = time.perf_counter()
        self.last_token_at: float | None = None
        self.text = text
        self._index = len(batch.generations)
        self._queue = batch._queue
        self._num_counted = 0

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.sequence.finish_reason

    def count_new(self) -> int:
        """Tokens committed since the last call. Called by the engine's thread."""
        num_new = len(self.sequence.tokens) - self._num_counted
        self._num_counted += num_new
        return num_new

    def take(self) -> list[Piece]:
        """Pieces that are ready and have not been taken. Called by the engine's thread."""
        if not (self.job.is_streamed or self.sequence.is_finished):
            return []
        taken = self.text.take(self.sequence.tokens, is_finished=self.sequence.is_finished)
        return [Piece(token, text) for token, text in taken]

    def deliver(self, news: _News) -> None:
        """Called back in the event loop."""
        self._queue.put_nowait((self._index, news))


class Batch:
    """What was submitted together. Iterating yields the pieces of each step (all of a generation's at once, if not
    `Job.is_streamed`), with the generation's index and in the order in which the engine makes them; None in place of
    pieces where a generation has ended. It ends when all have.

    Args:
        cancel: ends the generations of the batch it is given.

    Raises:
        ConfigError: while iterating: a grammar has become too complex.
        GenerationError: while iterating: a generation has failed.
        UnavailableError: while iterating: the engine has died.
    """

    def __init__(self, cancel: Callable[[Batch], None]) -> None:
        self.generations: list[Generation] = []
        self.race: Race | None = None
        """Of a batch that is one."""
        self._cancel = cancel
        self._queue: asyncio.Queue[tuple[int, _News]] = asyncio.Queue()

    def cancel(self) -> None:
        """End them; their rows are free for the next step. Does nothing to those that have ended already."""
        self._cancel(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[Piece] | None]]:
        num_open = len(self.generations)
        while num_open:
            index, news = await self._queue.get()
            if isinstance(news, Exception):
                raise news
            num_open -= news is None
            yield index, news
