"""From logits to a token: penalties, truncation, temperature. Pure functions; randomness is an explicit generator.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from hopskip.sampling_params import SamplingParams as SamplingParams

_MAX_CANDIDATES = 256


class TokenCounts:
    """Which tokens a sequence holds, and how often: what penalties depend on."""

    def __init__(self, prompt_ids: list[int], vocab_size: int) -> None:
        self.in_prompt_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.in_prompt_V[prompt_ids] = True
        self.in_output_V = torch.zeros(vocab_size)

    def add(self, token: int) -> None:
        self.in_output_V[token] += 1

    def along(self, draft_ids: Seq[int]) -> Tensor:
        """Counts in the output after 0, 1, .. M draft tokens, float32 [M + 1, V]."""
        counts_NV = self.in_output_V.repeat(len(draft_ids) + 1, 1)
        for i, token in enumerate(draft_ids):
            counts_NV[i + 1 :, token] += 1
        return counts_NV


class Constraint(Protocol):
    """Which tokens one sequence may take: the state of a grammar, after everything that the sequence has generated."""

    @property
    def is_complete(self) -> bool:
        """True if no token may follow, so that the text ends here."""
        ...

    def accept(self, token: int) -> None:
        """The sequence has taken this token."""
        ...

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        """How many tokens of a draft may follow, one after the other. The state stays as it is."""
        ...

    def masks(self, draft_ids: Seq[int]) -> Tensor:
        """Tokens that may follow after 0, 1, .. M draft tokens, bool [M + 1, V]; at least one in each row. Rows behind
        a token that may not follow are all True. The state stays as it is."""
        ...


def adjust_logits(
    logits_NV: Tensor, params: SamplingParams, counts: TokenCounts | None, draft_ids: Seq[int] = ()
) -> Tensor:
    """Apply penalties, then biases. Returns new logits [N, V].

    The rows follow the last N - 1 tokens of `draft_ids`: the last row comes after all of them, the row before after all
    but one, and so on. `counts` (without the draft) is needed only where `params.has_penalties`.
    """
    logits_NV = logits_NV.clone()
    if params.has_penalties:
        assert counts is not None
        output_NV = counts.along(draft_ids)[-len(logits_NV) :].to(logits_NV.device)
        if params.repetition_penalty != 1:
            seen_NV = (output_NV > 0) | counts.in_prompt_V.to(logits_NV.device)
            factor = torch.where(logits_NV > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            logits_NV = torch.where(seen_NV, logits_NV * factor, logits_NV)
        logits_NV -= params.presence_penalty * (output_NV > 0) + params.frequency_penalty * output_NV
    for token_id, bias in params.logit_bias.items():
        logits_NV[:, token_id] += bias
    return logits_NV


def probabilities(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """The distribution a token is drawn from: temperature, then top-k, top-p and min-p. Float32 [N, V], rows sum to 1.

    The truncations apply in the order of Hugging Face's warpers; each sees what the ones before left, renormalised.
    """
    assert not params.is_greedy
    probs_NV = (logits_NV.float() / params.temperature).softmax(dim=-1)
    if params.top_k:
        kept = probs_NV.topk(min(params.top_k, probs_NV.shape[-1])).values[:, -1:]
        probs_NV = _renormalised(probs_NV, probs_NV >= kept)
    if params.top_p < 1:
        probs_NV = _renormalised(probs_NV, probs_NV >= _nucleus_threshold(probs_NV, params.top_p))
    if params.min_p > 0:
        probs_NV = _renormalised(probs_NV, probs_NV >= params.min_p * probs_NV.amax(dim=-1, keepdim=True))
    return probs_NV


def _renormalised(probs_NV: Tensor, keep_NV: Tensor) -> Tensor:
    probs_NV = probs_NV * keep_NV
    return probs_NV / probs_NV.sum(dim=-1, keepdim=True)


def _nucleus_threshold(probs_NV: Tensor, top_p: float) -> Tensor:
    """Probability of the last token that the nucleus takes in, [N, 1].

    A full sort of the vocabulary costs more than a draft step; nearly always the nucleus lies in the best few hundred.
    """
    num_candidates = min(_MAX_CANDIDATES, probs_NV.shape[-1])
    best_NC = probs_NV.topk(num_candidates).values
    if not bool((best_NC.sum(dim=-1) >= top_p).all()):
        best_NC = probs_NV.sort(dim=-1, descending=True).values
    before_NC = best_NC.cumsum(dim=-1) - best_NC
    # the best token is always in, also where top_p is 0 in the precision of the probabilities
    last = (before_NC < top_p).sum(dim=-1, keepdim=True).clamp_min(1) - 1
    return best_NC.gather(-1, last)


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token from a distribution that need not be normalised, by inverting its cumulative sum: one uniform each."""
    cumulative = probs_V.double().cumsum(dim=-1)
    point = torch.rand((), dtype=torch.float64, generator=generator).to(cumulative.device) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, point, right=True))
    # u * total can round up to the total itself; the last token with any probability is then the right one
    return min(token, int(probs_V.nonzero()[-1])) if token == len(probs_V) else token
