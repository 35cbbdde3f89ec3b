"""Which draft tokens to accept. Pure functions: they know neither where a draft came from nor the model.

Shape letters: M draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopskip.sampling import draw


class Verdict(NamedTuple):
    """The first `num_accepted` draft tokens stand, then comes `next_token`.

    `next_token` is the *bonus* token if all were accepted, else the *recovered* token in place of the rejected one.
    """

    num_accepted: int
    next_token: int


def verify_greedy(draft_ids: Sequence[int], target_ids: Sequence[int]) -> Verdict:
    """Accept the longest prefix of the draft that plain greedy decoding would have produced.

    Args:
        draft_ids: M proposed tokens.
        target_ids: M + 1 tokens, the target's best after 0, 1, .. M draft tokens.

    >>> verify_greedy([5, 9, 7], [5, 9, 2, 4])
    Verdict(num_accepted=2, next_token=2)
    """
    assert len(target_ids) == len(draft_ids) + 1
    num_accepted = 0
    while num_accepted < len(draft_ids) and draft_ids[num_accepted] == target_ids[num_accepted]:
        num_accepted += 1
    return Verdict(num_accepted, target_ids[num_accepted])


def verify_sampled(
    draft_ids: Sequence[int],
    draft_probs: Sequence[Tensor] | None,
    target_probs: Tensor,
    generator: torch.Generator,
) -> Verdict:
    """Token-wise rejection sampling (arXiv 2211.17192, 2302.01318): the tokens kept are distributed as the target's.

    Draft token x is accepted with probability min(1, target(x) / draft(x)); after the first rejection the token is
    drawn from max(0, target - draft), renormalised.

    Args:
        draft_ids: M proposed tokens.
        draft_probs: for each the distribution it was drawn from, [V]; None if they were proposed with certainty
            (n-gram lookup), which is a distribution with all its mass on the token.
        target_probs: the target's distributions, [M + 1, V], after the same temperature, truncation and penalties.
        generator: advanced by one uniform per draft token looked at, and one for the last token.
    """
    for index, token in enumerate(draft_ids):
        target_V = target_probs[index]
        draft_probability = 1.0 if draft_probs is None else float(draft_probs[index][token])
        if float(torch.rand((), generator=generator)) * draft_probability < float(target_V[token]):
            continue
        if draft_probs is None:
            residual_V = target_V.clone()
            residual_V[token] = 0
        else:
            residual_V = (target_V - draft_probs[index]).clamp_min(0)
        if not float(residual_V.sum()) > 0:
            # the two distributions are equal but for rounding: a rejection then has no mass of its own to draw from
            residual_V = target_V
        return Verdict(index, draw(residual_V, generator))
    return Verdict(len(draft_ids), draw(target_probs[len(draft_ids)], generator))
