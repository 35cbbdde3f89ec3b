"""Hidden states that a trained exit wants to see, kept by slot until a draft needs them.

Shape letters: N rows, A taps, D hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate, pairwise
from typing import Any

from hopskip.backends.rows import Array, Rows

_MOST_PASSES = 32
"""That are kept as they are, before their features are sorted by slot."""


class Features:
    """Outputs of the tapped layers, of the positions that the model has seen and the exit may not have.

    They come in parts, sorted and joined only when a draft wants them: many rounds may go by without one.

    Args:
        xp: namespace of the arrays.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._slots: dict[int, _Slot] = defaultdict(lambda: _Slot(xp))
        self._passes: list[tuple[Rows, Array]] = []
        """What the slots have yet to be told of: one pass, or several that follow each other. To tell of each by itself
        would take longer."""

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        """A pass over these rows, as `Drafter.observe`."""
        if self._passes and (len(self._passes) == _MOST_PASSES or not _follows(rows, self._passes[-1][0])):
            self._sort()
        self._passes.append((rows, features_NAD))

    def num_entered(self, slot: int) -> int:
        """Positions of a slot at which the exit's keys and values hold."""
        self._sort()
        return self._slots[slot].num_entered

    def enter(self, slot: int, start: int, last: int) -> tuple[Array, Array]:
        """The exit reads the tokens at start..last now: features of the token before each, and those of the tokens
        themselves but the last, which no pass has seen. What no later draft wants is dropped."""
        self._sort()
        found = self._slots[slot]
        before, own = found.take(start - 1, last), found.take(start, last)
        found.num_entered = last + 1
        found.forget(last)
        return before, own

    def _sort(self) -> None:
        """Tell the slots of the passes so far."""
        if not self._passes:
            return
        segments = self._passes[0][0].segments
        all_features = [features_NAD for _, features_NAD in self._passes]
        self._passes = []
        if len(all_features) > 1:  # each of one token a slot
            joined = self._xp.stack(all_features, axis=1)
            parts = [joined[index] for index in range(len(segments))]
        else:
            ends = accumulate((segment.count for segment in segments), initial=0)
            parts = [all_features[0][start:stop] for start, stop in pairwise(ends)]
        for segment, own in zip(segments, parts, strict=True):
            self._slots[segment.slot].observe(segment.start, len(own), own)


class _Slot:
    """Features of all positions of one slot that the model has seen from `_first` on."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.num_entered = 0
        """Positions that hold the exit's keys and values as the model's own states make them."""
        self._first = self._end = 0
        self._parts_NAD: list[Array] = []

    def observe(self, start: int, count: int, features_NAD: Array) -> None:
        """A pass over `count` positions from `start` on. What was known of them before is void, but for the token at
        `start`: it was committed when the pass began, so the exit's keys and values there hold."""
        self.num_entered = min(self.num_entered, start + 1) if start else 0
        if start < self._first or start > self._end:
            self._first, self._parts_NAD = start, []
        elif start < self._end:
            self._parts_NAD = [self._joined()[: start - self._first]]
        self._parts_NAD.append(features_NAD)
        self._end = start + count

    def take(self, start: int, stop: int) -> Array:
        """Features of positions start..stop-1; zeros for the position before the first."""
        features_NAD = self._joined()
        found = features_NAD[max(0, start - self._first) : stop - self._first]
        if start >= 0:
            return found
        return self._xp.concat((self._xp.zeros_like(features_NAD[:1]), found))

    def forget(self, stop: int) -> None:
        """Drop the features of positions before `stop`."""
        if stop > self._first:
            self._parts_NAD = [self._joined()[stop - self._first :]]
            self._first = stop

    def _joined(self) -> Array:
        if len(self._parts_NAD) > 1:
            self._parts_NAD = [self._xp.concat(self._parts_NAD)]
        return self._parts_NAD[0]


def _follows(after: Rows, before: Rows) -> bool:
    """Whether two passes have the same slots in the same order, and each one token, the next."""
    return len(after.segments) == len(before.segments) and all(
        b.slot == a.slot and b.start == a.start + 1 and a.count == b.count == 1
        for a, b in zip(before.segments, after.segments, strict=True)
    )
