"""Tokens that may not come, for other reasons than a grammar: too early an end, and texts that are not wanted.

Shape letters: M draft tokens, N = M + 1 rows, W words of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from hopskip.sequence import Constraint, Mask, Sequence, all_allowed, paths_of, without


def restrict(sequence: Sequence, vocab_size: int) -> None:
    """Put all that restricts a new sequence's tokens into its `constraint`. A grammar goes first: where it leaves
    nothing that the others allow, it alone decides."""
    request = sequence.request
    found = [] if request.constraint is None else [request.constraint]
    if request.banned is not None:
        found.append(request.banned)
    if request.params.min_tokens:
        found.append(MinTokens(request.params.min_tokens, sequence.stop_token_ids, vocab_size))
    if found:
        sequence.constraint = found[0] if len(found) == 1 else AllOf(found)


class MinTokens:
    """No token that ends the text before so many others; a `Constraint`."""

    is_complete = False

    def __init__(self, count: int, last_token_ids: Iterable[int], vocab_size: int) -> None:
        self._num_left = count
        self._last_token_ids = frozenset(last_token_ids)
        self._all_W = all_allowed(vocab_size)
        self._early_W = without(self._all_W, self._last_token_ids)

    def accept(self, token: int) -> None:
        self._num_left -= 1

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        early = draft_ids[: max(0, self._num_left)]
        return next((i for i, token in enumerate(early) if token in self._last_token_ids), len(draft_ids))

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        depths = [len(path) for path in paths_of(draft_ids, parents)]
        return np.stack([self._early_W if depth < self._num_left else self._all_W for depth in depths])


class AllOf:
    """What all of several constraints allow; if that is nothing, what the first of them does."""

    def __init__(self, constraints: Seq[Constraint]) -> None:
        self._constraints = constraints

    @property
    def is_complete(self) -> bool:
        return any(constraint.is_complete for constraint in self._constraints)

    def accept(self, token: int) -> None:
        for constraint in self._constraints:
            constraint.accept(token)

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        return min(constraint.num_allowed(draft_ids) for constraint in self._constraints)

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        masks = [constraint.masks(draft_ids, parents) for constraint in self._constraints]
        common_NW = np.bitwise_and.reduce(masks)
        return np.where(common_NW.any(axis=1, keepdims=True), common_NW, masks[0])
