"""From logits to a token: penalties, truncation, temperature. Pure functions; randomness is an explicit generator.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from hopskip.sampling_params import SamplingParams

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

    Tokens are ordered by their logits, best first; of equal logits the lower token id comes first. top-k keeps the
    first k tokens of that order, exactly k; top-p the first ones whose probabilities reach the sum, and not one more.
    min-p is a threshold: it keeps every token that reaches it.

    transformers differs where logits are equal. Its top-k keeps all tokens that are as good as the k-th, so that more
    than k may stay. Its top-p keeps as many as here, but its sort is not stable: which of equals stay is left open.
    """
    assert not params.is_greedy
    logits_NV = logits_NV.float()
    if params.top_k or params.top_p < 1:
        probs_NV = _probabilities_of_best(logits_NV, params)
    else:
        probs_NV = (logits_NV / params.temperature).softmax(dim=-1)
    if params.min_p > 0:
        probs_NV = _renormalised(probs_NV, probs_NV >= params.min_p * probs_NV.amax(dim=-1, keepdim=True))
    return probs_NV


def _renormalised(probs_NV: Tensor, keep_NV: Tensor) -> Tensor:
    probs_NV = torch.where(keep_NV, probs_NV, 0.0)
    return probs_NV / probs_NV.sum(dim=-1, keepdim=True)


def _probabilities_of_best(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """The distribution after temperature, top-k and top-p, [N, V]. C stands for the candidates, best first.

    A full sort of the vocabulary costs more than a draft step; nearly always the nucleus lies in the best few hundred.
    """
    # one more than can be kept, to see whether the last one kept has an equal behind it
    num_candidates = params.top_k + 1 if params.top_k else _MAX_CANDIDATES
    best_NC, ids_NC = logits_NV.topk(min(num_candidates, logits_NV.shape[-1]))
    if params.top_k:
        probs_NC = (best_NC[:, : params.top_k] / params.temperature).softmax(dim=-1)
        probs_NV = torch.zeros_like(logits_NV)
    else:
        probs_NV = (logits_NV / params.temperature).softmax(dim=-1)
        probs_NC = probs_NV.gather(-1, ids_NC)
        if not bool((probs_NC.cumsum(dim=-1)[:, -2:-1] >= params.top_p).all()):
            best_NC, ids_NC = logits_NV.sort(dim=-1, descending=True)
            probs_NC = (best_NC / params.temperature).softmax(dim=-1)
        probs_NV.zero_()
    if params.top_p < 1:
        num_kept_N1 = 1 + (probs_NC.cumsum(dim=-1)[:, :-1] < params.top_p).sum(dim=-1, keepdim=True)
        rank_C = torch.arange(probs_NC.shape[-1], device=probs_NC.device)
        probs_NC = _renormalised(probs_NC, rank_C < num_kept_N1)
    else:
        num_kept_N1 = (probs_NC != 0).sum(dim=-1, keepdim=True)
    _prefer_lower_ids(logits_NV, best_NC, ids_NC, num_kept_N1)
    return probs_NV.scatter_(-1, ids_NC[:, : probs_NC.shape[-1]], probs_NC)


def _prefer_lower_ids(logits_NV: Tensor, best_NC: Tensor, ids_NC: Tensor, num_kept_N1: Tensor) -> None:
    """Of tokens as good as the last one kept, put those with the lowest ids into `ids_NC`: topk takes any of them."""
    last_N1 = best_NC.gather(-1, num_kept_N1 - 1)
    next_N1 = best_NC.gather(-1, num_kept_N1.clamp_max(best_NC.shape[-1] - 1))
    for row in (next_N1 == last_N1)[:, 0].nonzero()[:, 0].tolist():
        tied_ids = (logits_NV[row] == last_N1[row]).nonzero()[:, 0]
        first = int((best_NC[row] > last_N1[row]).sum())
        ids_NC[row, first : first + len(tied_ids)] = tied_ids[: ids_NC.shape[-1] - first]


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token from a distribution that need not be normalised, by inverting its cumulative sum: one uniform each."""
    cumulative = probs_V.double().cumsum(dim=-1)
    point = torch.rand((), dtype=torch.float64, generator=generator).to(cumulative.device) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, point, right=True))
    # u * total can round up to the total itself; the last token with any probability is then the right one
    return min(token, int(probs_V.nonzero()[-1])) if token == len(probs_V) else token
