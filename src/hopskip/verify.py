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
    """Accept or reject so that the tokens kept are distributed as the target's.

    A draft may have been ended by what its tokens are, but not by what the next would have been.

    Args:
        draft_ids: M proposed tokens.
        draft_probs: for each the distribution it was drawn from, [V]; None if they were proposed with certainty
            (n-gram lookup), which is a distribution with all its mass on the token.
        target_probs: the target's distributions, [M + 1, V], after the same temperature, truncation and penalties.
        generator: advanced by a uniform for each draft token that is looked at, and one for the last token.
    """
    if draft_probs is None:
        return _verify_certain(draft_ids, target_probs, generator)
    return _verify_block(draft_ids, draft_probs, target_probs, generator)


def _verify_certain(draft_ids: Sequence[int], target_probs: Tensor, generator: torch.Generator) -> Verdict:
    """Token by token (arXiv 2211.17192, 2302.01318): accept with the target's probability; at the first rejection draw
    from the others. For drafts with certainty block verification would come to the same."""
    for index, token in enumerate(draft_ids):
        target_V = target_probs[index]
        if float(torch.rand((), generator=generator)) < float(target_V[token]):
            continue
        residual_V = target_V.clone()
        residual_V[token] = 0
        return Verdict(index, _draw_residual(residual_V, target_V, generator))
    return Verdict(len(draft_ids), draw(target_probs[len(draft_ids)], generator))


def _verify_block(
    draft_ids: Sequence[int], draft_probs: Sequence[Tensor], target_probs: Tensor, generator: torch.Generator
) -> Verdict:
    """Block verification (arXiv 2403.10444): accepts prefixes, and never fewer tokens on average than token by token.

    `weight` is the share of a drafted prefix that the target can make use of: the product of target / draft along it,
    never above 1. Token by token each factor would be cut to 1, and what a token had to spare lost to those after it.
    """
    num_draft = len(draft_ids)
    num_accepted, weight, weight_accepted = 0, 1.0, 1.0
    for index, token in enumerate(draft_ids):
        weight = min(1.0, weight * float(target_probs[index][token]) / float(draft_probs[index][token]))
        acceptance = weight
        if weight < 1 and index + 1 < num_draft:
            # what the longer prefixes leave to this one
            left = float((weight * target_probs[index + 1] - draft_probs[index + 1]).clamp_min(0).sum())
            acceptance = left / (left + 1 - weight)
        if float(torch.rand((), generator=generator)) < acceptance:
            num_accepted, weight_accepted = index + 1, weight
    target_V = target_probs[num_accepted]
    if num_accepted == num_draft:
        return Verdict(num_accepted, draw(target_V, generator))
    residual_V = (weight_accepted * target_V - draft_probs[num_accepted]).clamp_min(0)
    return Verdict(num_accepted, _draw_residual(residual_V, target_V, generator))


def _draw_residual(residual_V: Tensor, target_V: Tensor, generator: torch.Generator) -> int:
    # a residual without mass: draft and target are equal but for rounding, which has led to the rejection
    return draw(residual_V if float(residual_V.sum()) > 0 else target_V, generator)
