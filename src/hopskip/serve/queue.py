"""Who may have how much run or wait, and when to come again: counted as requests come and end."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from hopskip.errors import BusyError, ConfigError
from hopskip.serve.batch import Job

_LONGEST_WAIT = 600
"""Seconds that a client is told to wait, at most."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """The most that may run or wait at one time."""

    num_sequences: int
    num_tokens: float = math.inf
    """Of prompts, and of the texts at their longest."""


class Queue:
    """Counts what runs or waits, in all and by client (`Request.client`). For one thread.

    Args:
        room: of all together.
        room_of_client: of each client that has a name.
        clock: seconds.
    """

    def __init__(self, room: Room, room_of_client: Room, clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self._room_of_client, self._clock = room, room_of_client, clock
        self._sequences: Counter[str | None] = Counter()
        self._tokens: Counter[str | None] = Counter()
        self._ends: deque[float] = deque(maxlen=32)
        """When the last ones ended, and when it began before them."""

    def __len__(self) -> int:
        return self._sequences.total()

    def enter(self, jobs: Seq[Job]) -> None:
        """Take in jobs of one request, all or none.

        Raises:
            BusyError: there is no room for all of them now.
            ConfigError: there never is.
        """
        if not jobs:
            return
        client, num_tokens = jobs[0].request.client, sum(map(_num_tokens, jobs))
        self._check("all requests", self._room, len(jobs), num_tokens, len(self), self._tokens.total())
        if client is not None:
            own = self._sequences[client], self._tokens[client]
            self._check("your API key's", self._room_of_client, len(jobs), num_tokens, *own)
        if not len(self):
            self._ends.clear()
            self._ends.append(self._clock())
        self._sequences[client] += len(jobs)
        self._tokens[client] += num_tokens

    def leave(self, jobs: Seq[Job]) -> None:
        """They have ended."""
        for job in jobs:
            client = job.request.client
            self._sequences[client] -= 1
            self._tokens[client] -= _num_tokens(job)
            if not self._sequences[client]:
                del self._sequences[client], self._tokens[client]
            self._ends.append(self._clock())

    def _check(self, whose: str, room: Room, num_new: int, tokens_new: int, num_now: int, tokens_now: int) -> None:
        """Whether there is room for a request beside what its like have now."""
        if num_new > room.num_sequences:
            raise ConfigError(
                f"the request asks for {num_new} sequences; at most {room.num_sequences} may run or wait here"
            )
        if num_now + num_new > room.num_sequences:
            wait = self._seconds_until(num_now + num_new - room.num_sequences, num_now)
            raise BusyError(f"{num_now} sequences of {whose} run or wait; at most {room.num_sequences} may", wait)
        if num_now and tokens_now + tokens_new > room.num_tokens:
            mean = tokens_now / num_now
            wait = self._seconds_until(math.ceil((tokens_now + tokens_new - room.num_tokens) / mean), num_now)
            message = f"what runs or waits of {whose} may take {tokens_now} tokens; at most {room.num_tokens:.0f} may"
            raise BusyError(message, wait)

    def _seconds_until(self, num_ends: int, num_of: int) -> int:
        """Until so many of `num_of` sequences have ended, if they end as often as the last ones did."""
        ends_per_second = max(1, len(self._ends) - 1) / max(self._clock() - self._ends[0], 1e-3)
        share = num_of / len(self)
        return min(_LONGEST_WAIT, max(1, math.ceil(min(num_ends, num_of) / (ends_per_second * share))))


def _num_tokens(job: Job) -> int:
    return len(job.request.prompt_ids) + job.request.params.max_new_tokens
