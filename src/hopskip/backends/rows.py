"""Which rows a pass computes: tokens of any mix of sequences, and where each of them lies in the cache.

One call serves a prompt, a draft to verify, a batch and a tree. Positions and slots are plain integers that the caller
owns; a backend gets them as int32 arrays on the host. A cache stores what they have left, and knows no lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array of a backend's namespace: a numpy array, or a PyTorch tensor."""


@dataclass(frozen=True)
class Segment:
    """`count` tokens of the sequence in `slot`, the first at position `start`: consecutive ones, or a tree of them."""

    slot: int
    start: int
    count: int
    parents: tuple[int, ...] | None = None
    """Of a tree: for each row the row of the segment that it follows, an earlier one; -1 for the first, the root. The
    rows of a path through it have consecutive positions, but keys and values lie in the order of the rows, so that
    paths do not overwrite each other. `Cache.keep_path` brings one of them into place."""

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many steps each row is from the first."""
        if self.parents is None:
            return tuple(range(self.count))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    def places_to(self, row: int) -> list[int]:
        """Cache positions of a tree's row and of those that it follows, from the first on."""
        assert self.parents is not None
        places = []
        while row >= 0:
            places.append(self.start + row)
            row = self.parents[row]
        return places[::-1]


class Rows:
    """Where each of the N rows of a hidden-state tensor lives in the cache.

    Rows come in segments: consecutive tokens of one sequence (a prompt, a draft to verify), a tree of them, one token
    of many sequences (a batch), or all at once. No two segments share a slot.

    >>> Rows([Segment(slot=0, start=7, count=3), Segment(slot=2, start=40, count=1)]).positions.tolist()
    [7, 8, 9, 40]
    >>> Rows([Segment(slot=0, start=7, count=4, parents=(-1, 0, 1, 0))]).positions.tolist()
    [7, 8, 9, 8]
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    @cached_property
    def slots(self) -> NDArray[np.int32]:
        """Cache slot of each row, int32 [N]."""
        return np.array([s.slot for s in self.segments for _ in range(s.count)], dtype=np.int32)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Position of each row in its sequence, int32 [N]."""
        return np.array([s.start + depth for s in self.segments for depth in s.depths], dtype=np.int32)

    @cached_property
    def parent_offsets(self) -> NDArray[np.int32] | None:
        """How many rows before each row its parent is, 0 for the first of a segment: int32 [N]. None if no segment is a
        tree."""
        if all(segment.parents is None for segment in self.segments):
            return None
        steps: list[int] = []
        for segment in self.segments:
            parents = segment.parents or range(-1, segment.count - 1)
            steps += [0, *(row - parent for row, parent in enumerate(parents) if row)]
        return np.array(steps, dtype=np.int32)

    @property
    def max_position(self) -> int:
        """The last position of the cache that is written."""
        return max(segment.start + segment.count - 1 for segment in self.segments)

    @cached_property
    def last_rows(self) -> list[int]:
        """Index of the last row of each segment."""
        return [stop - 1 for stop in accumulate(segment.count for segment in self.segments)]


class Cache(ABC):
    """Keys and values of every layer, for `num_slots` sequences of up to `length` positions. What it stores, and how,
    is its backend's affair."""

    num_slots: int
    length: int
    """Positions per slot."""
    nbytes: int
    bytes_per_position: int
    """Of one slot."""

    @abstractmethod
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""

    @abstractmethod
    def keep_path(self, slot: int, start: int, rows: Seq[int]) -> None:
        """Move what a tree's rows have left to where consecutive tokens have it.

        Args:
            start: position of the tree's first row.
            rows: the path to keep, from the first row on; each comes after the one that it follows.
        """

    @abstractmethod
    def copy_from(self, other: Cache) -> None:
        """Take over every slot of a smaller cache of the same backend (when it must grow, never to reject)."""

    @abstractmethod
    def clear(self) -> None:
        """Set everything to zero: what lies in fresh memory may be slow to compute with."""
