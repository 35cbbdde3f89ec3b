"""Log-probabilities of a prompt's own tokens.

Shape letters: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Segment
from hopskip.sampling import best_of, logprobs_of
from hopskip.sequence import Score, Sequence

ROWS_WITH_SCORES = 128
"""Most prompt tokens in a pass whose log-probabilities are wanted: the head takes longer than the layers of a small
model, and nobody steps meanwhile."""
_ROWS_AT_ONCE = 32
"""Whose logits are in memory at one time."""


def score_prompts(
    backend: Backend, parts: Seq[tuple[Sequence, Segment]], hidden_ND: Array
) -> dict[Sequence, list[Score]]:
    """Scores of the prompt tokens that come after a pass's rows, for the sequences that want them."""
    found: dict[Sequence, list[Score]] = {}
    first = 0
    for sequence, segment in parts:
        number = sequence.params.prompt_logprobs
        if number is not None:
            end = min(segment.start + segment.count + 1, sequence.num_prompt_tokens)
            following = sequence.token_ids[segment.start + 1 : end]
            found[sequence] = scores = []
            for start in range(0, len(following), _ROWS_AT_ONCE):
                ids = following[start : start + _ROWS_AT_ONCE]
                rows_ND = hidden_ND[first + start : first + start + len(ids)]
                logits_NV = backend.on_host(backend.logits(rows_ND))
                scores += [_score(logits_V, token, number) for logits_V, token in zip(logits_NV, ids, strict=True)]
        first += segment.count
    return found


def _score(logits_V: NDArray[np.float32], token: int, number: int) -> Score:
    logprobs_V = logprobs_of(logits_V)
    own = logprobs_V[token]
    return Score(float(own), 1 + int((logprobs_V > own).sum()), best_of(logprobs_V, number))
