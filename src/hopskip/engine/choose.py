"""From final hidden states to tokens: each sequence's draft is held against what the target says.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array
from hopskip.draft.base import Draft
from hopskip.sampling import best_of, logprobs_of
from hopskip.sequence import NoTokenError, Origin, Place, Sequence, Token, paths_of


class Verdict(NamedTuple):
    """The draft tokens with these indices stand, each following the one before; then comes `next_token`.

    `next_token` is the *bonus* token if the draft does not go on there, else the *recovered* token in place of the
    rejected ones.
    """

    path: tuple[int, ...]
    next_token: int

    @property
    def num_accepted(self) -> int:
        return len(self.path)

    @property
    def rows(self) -> list[int]:
        """Rows of the verify pass that stand: that of the token before the draft, and those of the path."""
        return [0, *(index + 1 for index in self.path)]


def verify(draft_ids: Seq[int], target_ids: Seq[int], parents: Seq[int] | None = None) -> Verdict:
    """Accept what plain decoding would have produced, as far as the draft has it.

    Args:
        draft_ids: M proposed tokens.
        target_ids: M + 1 tokens, the target's choice before any draft token, and after each.
        parents: for each draft token the index of the one that it follows, -1 for none; None: the one before it.

    >>> verify([5, 9, 7], [5, 9, 2, 4])
    Verdict(path=(0, 1), next_token=2)
    >>> verify([5, 9, 7, 2], [5, 2, 0, 0, 4], parents=[-1, 0, 1, 0])
    Verdict(path=(0, 3), next_token=4)
    """
    assert len(target_ids) == len(draft_ids) + 1
    if parents is None:
        parents = range(-1, len(draft_ids) - 1)
    path: list[int] = []
    last = -1
    for index, (token, parent) in enumerate(zip(draft_ids, parents, strict=True)):
        if parent == last and token == target_ids[last + 1]:
            path.append(index)
            last = index
    return Verdict(tuple(path), target_ids[last + 1])


class Choice(NamedTuple):
    """What becomes of one sequence's draft."""

    verdict: Verdict
    tokens: list[Token]
    """To be committed, accepted ones first; none if the request has failed."""


_FAILED = Choice(Verdict((), -1), [])


def choose(backend: Backend, sequences: Seq[Sequence], drafts: Seq[Draft], hidden_ND: Array) -> list[Choice]:
    """Verify drafts, N = sum of (draft length + 1): states of each sequence's last token, and of its draft tokens.

    Whatever a request brings with it fails that request alone (`Sequence.error`).
    """
    logits_NV: Array | None = None
    if any(s.needs_logits for s in sequences):
        places: list[Place] = []
        reported: list[int] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            if sequence.params.logprobs is not None:
                reported += range(len(places), len(places) + len(draft.token_ids) + 1)
            places += _places(sequence, draft)
        target_ids, logits_NV = backend.choose(hidden_ND, places, reported)
    else:
        target_ids = backend.greedy(hidden_ND)
    choices: list[Choice] = []
    first = first_reported = 0
    for sequence, draft in zip(sequences, drafts, strict=True):
        num_rows = len(draft.token_ids) + 1
        verdict = verify(draft.token_ids, target_ids[first : first + num_rows], draft.parents)
        first += num_rows
        own_NV = None
        if sequence.params.logprobs is not None and logits_NV is not None:
            own_NV = backend.on_host(logits_NV[first_reported : first_reported + num_rows])
            first_reported += num_rows
        if verdict.next_token < 0 and sequence.error is None:
            sequence.fail(NoTokenError())
        has_failed = sequence.error is not None
        choices.append(_FAILED if has_failed else Choice(verdict, _tokens(sequence, draft, verdict, own_NV)))
    return choices


def _places(sequence: Sequence, draft: Draft) -> list[Place]:
    """Of the tokens after the sequence's last one, and after each of its draft."""
    masks_NW = None
    if sequence.constraint is not None:
        try:
            masks_NW = sequence.constraint.masks(draft.token_ids, draft.parents)
        except Exception as error:
            sequence.fail(error)
    length = len(sequence.token_ids)
    return [
        Place(sequence.rule, length + len(path), path, None if masks_NW is None else masks_NW[row])
        for row, path in enumerate(paths_of(draft.token_ids, draft.parents))
    ]


def _tokens(sequence: Sequence, draft: Draft, verdict: Verdict, logits_NV: NDArray[np.float32] | None) -> list[Token]:
    path = verdict.path
    ids = [*(draft.token_ids[index] for index in path), verdict.next_token]
    is_bonus = bool(path) and not draft.goes_on_after(path[-1])
    origins: list[Origin] = [draft.source.kind] * len(path)
    origins.append("bonus" if is_bonus else "target")
    num_logprobs = sequence.params.logprobs
    if logits_NV is None or num_logprobs is None:
        return [Token(i, origin) for i, origin in zip(ids, origins, strict=True)]
    tokens = []
    for i, origin, row in zip(ids, origins, verdict.rows, strict=True):
        logprobs_V = logprobs_of(logits_NV[row])
        tokens.append(Token(i, origin, float(logprobs_V[i]), best_of(logprobs_V, num_logprobs)))
    return tokens
