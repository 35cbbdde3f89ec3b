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


def verify_greedy(draft_ids: Sequence[int], target_ids: Sequence[int], parents: Sequence[int] | None = None) -> Verdict:
    """Accept what plain greedy decoding would have produced, as far as the draft has it.

    Args:
        draft_ids: M proposed tokens.
        target_ids: M + 1 tokens, the target's best before any draft token, and after each.
        parents: for each draft token the index of the one that it follows, -1 for none; None: the one before it.

    >>> verify_greedy([5, 9, 7], [5, 9, 2, 4])
    Verdict(path=(0, 1), next_token=2)
    >>> verify_greedy([5, 9, 7, 2], [5, 2, 0, 0, 4], parents=[-1, 0, 1, 0])
    Verdict(path=(0, 3), next_token=4)
    """
    assert len(target_ids) == len(draft_ids) + 1
    path: list[int] = []
    last = -1
    while True:
        right = [i for i in _candidates(len(draft_ids), parents, last) if draft_ids[i] == target_ids[last + 1]]
        if not right:
            return Verdict(tuple(path), target_ids[last + 1])
        last = right[0]
        path.append(last)


def verify_sampled(
    draft_ids: Sequence[int],
    draft_probs: Sequence[Tensor] | None,
    target_probs: Tensor,
    generator: torch.Generator,
    parents: Sequence[int] | None = None,
) -> Verdict:
    """Rejection sampling: a drawn chain as a block (see `_verify_block`), anything else token by token.

    Token by token (arXiv 2211.17192, 2302.01318) draft token x is accepted with probability min(1, target(x) /
    draft(x)); after a rejection the target's distribution is max(0, target - draft), renormalised. Where several tokens
    are proposed for one place, drawn without replacement, the next is tested against that; in the end the token is
    drawn from what is left (arXiv 2305.09781, 2402.12374).

    A draft may have been ended by what its tokens are, but not by what the next would have been.

    Args:
        draft_ids: M proposed tokens.
        draft_probs: for each the distribution that it was drawn from, [V]: for all but the first of one place without
            those before it, renormalised. None if they were proposed with certainty (n-gram lookup), which is a
            distribution with all its mass on the token.
        target_probs: the target's distributions before any draft token and after each, [M + 1, V], after the same
            temperature, truncation and penalties.
        generator: advanced by one uniform per draft token looked at, and one for the last token.
        parents: for each draft token the index of the one that it follows, -1 for none; None: the one before it.
    """
    if draft_probs is not None and (parents is None or list(parents) == list(range(-1, len(draft_ids) - 1))):
        return _verify_block(draft_ids, draft_probs, target_probs, generator)
    path: list[int] = []
    last = -1
    while True:
        target_V = target_probs[last + 1]
        accepted = None
        for index in _candidates(len(draft_ids), parents, last):
            token = draft_ids[index]
            draft_probability = 1.0 if draft_probs is None else float(draft_probs[index][token])
            if float(torch.rand((), generator=generator)) * draft_probability < float(target_V[token]):
                accepted = index
                break
            if draft_probs is None:
                residual_V = target_V.clone()
                residual_V[token] = 0
            else:
                residual_V = (target_V - draft_probs[index]).clamp_min(0)
            mass = float(residual_V.sum())
            # no mass: the two distributions are equal but for rounding, and a rejection then has nothing to draw from
            target_V = residual_V / mass if mass > 0 else target_V
        if accepted is None:
            return Verdict(tuple(path), draw(target_V, generator))
        path.append(accepted)
        last = accepted


def _candidates(num_tokens: int, parents: Sequence[int] | None, last: int) -> list[int]:
    """Draft tokens that follow `last`, in their order."""
    if parents is None:
        return [last + 1] if last + 1 < num_tokens else []
    return [index for index, parent in enumerate(parents) if parent == last]


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
        return Verdict(tuple(range(num_draft)), draw(target_V, generator))
    residual_V = (weight_accepted * target_V - draft_probs[num_accepted]).clamp_min(0)
    # no mass: the two distributions are equal but for rounding, and a rejection then has nothing to draw from
    has_mass = float(residual_V.sum()) > 0
    return Verdict(tuple(range(num_accepted)), draw(residual_V if has_mass else target_V, generator))
