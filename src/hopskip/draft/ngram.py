"""Drafting by lookup: what followed the last few tokens when they stood in the text before (prompt lookup decoding)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from hopskip.backends.rows import Cache
from hopskip.draft.base import Draft, Drafter
from hopskip.sequence import Sequence
from hopskip.speculative import LOOKUP

MAX_MATCH = 16
"""Longer matches are as good as certain, and not told apart."""


class NgramIndex:
    """Where each n-gram of a growing text last ended, for n from `min_size` to `max_size`.

    >>> index = NgramIndex(min_size=2, max_size=3)
    >>> index.propose([7, 8, 9, 5, 7, 8], limit=3)
    [9, 5, 7]
    """

    def __init__(self, *, min_size: int, max_size: int) -> None:
        self._sizes = range(max_size, min_size - 1, -1)
        self._next_position: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        """Up to `limit` tokens to follow `token_ids`, which must extend the text of the calls before.

        The longest n-gram decides, and of its occurrences the latest. A copy that runs into the end of the text goes on
        with what it has just copied, so that a repeating pattern is drafted at any length.
        """
        start = self.find(token_ids)
        return [] if start is None else self.copy(token_ids, start, limit)

    @staticmethod
    def copy(token_ids: Seq[int], start: int, limit: int) -> list[int]:
        period = len(token_ids) - start
        return [token_ids[start + i % period] for i in range(limit)]

    def find(self, token_ids: Seq[int]) -> int | None:
        """The position after the match that decides, None without one."""
        self._extend(token_ids)
        for size in self._sizes:
            start = self._next_position.get(tuple(token_ids[-size:])) if len(token_ids) > size else None
            if start is not None:
                return start
        return None

    def _extend(self, token_ids: Seq[int]) -> None:
        # an n-gram is entered once the token after it is known, so the text's own end is never its own match
        for size in self._sizes:
            first = max(self._num_indexed, size)
            tokens = token_ids[first - size : -1]
            grams = zip(*(tokens[shift:] for shift in range(size)), strict=False)
            self._next_position.update(zip(grams, range(first, len(token_ids)), strict=False))
        self._num_indexed = len(token_ids)


class NgramDrafter(Drafter):
    """Copies from the sequence's own prompt and output, up to a token that would end the text. Runs no layers; proposes
    nothing without a match."""

    def __init__(self, *, min_size: int = 2, max_size: int = 4) -> None:
        self._min_size, self._max_size = min_size, max_size
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        return [
            self._lookup(sequence, limit) if limit > 0 else Draft()
            for sequence, limit in zip(sequences, limits, strict=True)
        ]

    def _lookup(self, sequence: Sequence, limit: int) -> Draft:
        text, index = sequence.token_ids, self._index(sequence)
        start = index.find(text)
        if start is None:
            return Draft()
        matched = match_length(text, start)
        tokens = index.copy(text, start, limit)
        ends = next((i + 1 for i, token in enumerate(tokens) if token in sequence.stop_token_ids), limit)
        return Draft(LOOKUP, tokens[:ends], buckets=list(range(matched, matched + ends)))

    def _index(self, sequence: Sequence) -> NgramIndex:
        if sequence not in self._indexes:
            self._indexes[sequence] = NgramIndex(min_size=self._min_size, max_size=self._max_size)
        return self._indexes[sequence]


def match_length(token_ids: Seq[int], position: int) -> int:
    """How many tokens before `position` are the same as those at the end, `MAX_MATCH` at most.

    >>> match_length([7, 8, 9, 5, 8, 9], 3)
    2
    """
    length = 0
    while length < min(position, MAX_MATCH) and token_ids[position - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length
