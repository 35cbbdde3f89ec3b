"""Texts that must not appear: no token comes that would complete one, whichever way it is cut into tokens.

Shape letters: M draft tokens, N = M + 1 rows, W words of a mask.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from hopskip.sequence import Mask, all_allowed, paths_of, without
from hopskip.text.tokenizer import Tokenizer


class Bans:
    """Looks up in a vocabulary which tokens complete a text. Safe for use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._table = lru_cache(maxsize=64)(self._make_table)

    def constraint(self, words: tuple[str, ...]) -> BannedTexts:
        """A fresh constraint that keeps these texts away. The first call takes up to a second, to read the
        vocabulary."""
        return BannedTexts(self._table(words), self)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text."""
        return b"" if self._tokenizer.is_silent(token_id) else self._tokenizer.token_bytes(token_id)

    @cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        """The bytes of every token that adds to the text."""
        known = ((self.bytes_of(token_id), token_id) for token_id in range(self._vocab_size))
        return sorted(pair for pair in known if pair[0])

    @cached_property
    def _silent(self) -> list[tuple[bytes, int]]:
        """Special tokens, with what they are called."""
        silent = filter(self._tokenizer.is_silent, range(self._vocab_size))
        return [(self._tokenizer.token_bytes(token_id), token_id) for token_id in silent]

    def _starting_with(self, text: bytes) -> list[int]:
        first = last = bisect_left(self._sorted, (text, -1))
        while last < len(self._sorted) and self._sorted[last][0].startswith(text):
            last += 1
        return [token_id for _, token_id in self._sorted[first:last]]

    def _make_table(self, words: tuple[str, ...]) -> _Table:
        encoded = [word.encode("utf-8", "surrogatepass") for word in words]
        always = [token_id for text, token_id in self._sorted + self._silent if any(word in text for word in encoded)]
        after: dict[bytes, list[int]] = {}
        for word in encoded:
            for length in range(1, len(word)):
                if completing := self._starting_with(word[length:]):
                    after.setdefault(word[:length], []).extend(completing)
        allowed_W = without(all_allowed(self._vocab_size), always)
        return _Table(allowed_W, {beginning: np.array(ids) for beginning, ids in after.items()})


class _Table:
    """Which tokens complete a text.

    Args:
        allowed_W: all but those that have a whole one in them.
        after: by the beginning of a text, those that complete it.
    """

    def __init__(self, allowed_W: Mask, after: dict[bytes, NDArray[np.int64]]) -> None:
        self._allowed_W = allowed_W
        self._after = after
        self.num_bytes = max(map(len, after), default=0)
        """Of a text's end that matter."""

    def mask(self, end: bytes) -> Mask:
        """[W], for a text that ends so."""
        forbidden = [self._after[end[first:]] for first in range(len(end)) if end[first:] in self._after]
        return without(self._allowed_W, np.concatenate(forbidden)) if forbidden else self._allowed_W


class BannedTexts:
    """Keeps texts away from what one sequence generates; a `Constraint`."""

    is_complete = False

    def __init__(self, table: _Table, bans: Bans) -> None:
        self._table = table
        self._bans = bans
        self._end = b""

    def accept(self, token: int) -> None:
        self._end = self._after((token,))

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        for index, (token, mask_W) in enumerate(zip(draft_ids, self.masks(draft_ids), strict=False)):
            if not mask_W[token // 32] >> np.uint32(token % 32) & 1:
                return index
        return len(draft_ids)

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        return np.stack([self._table.mask(self._after(path)) for path in paths_of(draft_ids, parents)])

    def _after(self, path: Seq[int]) -> bytes:
        """The end of the text once these tokens have come."""
        text = self._end + b"".join(map(self._bans.bytes_of, path))
        return text[max(0, len(text) - self._table.num_bytes) :]
