"""From logits to a token: penalties, truncation, temperature. Pure functions; randomness is an explicit generator.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor

from hopskip.errors import ConfigError

_MAX_CANDIDATES = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. `temperature` 0 is greedy: the best token, always.

    Raises:
        ConfigError: a value is out of range, or would have no effect (`top_p` with greedy decoding, say).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities reach this sum (nucleus, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the best one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for every time that the output holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Same seed, same text. None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; the text returned ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report each token's log-probability and those of the n best; 0 for the token's own only. None reports none.
    Log-probabilities are the model's own: before penalties, bias and temperature."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or above")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (keep all) or above")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, 0 or above")
        _require(all(self.stop), "stop", self.stop, "non-empty texts")
        for token_id, bias in self.logit_bias.items():
            _require(not math.isnan(bias), "logit_bias", {token_id: bias}, "a number for each token id")
        if self.is_greedy:
            for item in fields(self):
                if item.name in ("top_k", "top_p", "min_p", "seed") and getattr(self, item.name) != item.default:
                    value = getattr(self, item.name)
                    raise ConfigError(
                        f"{item.name}={value} has no effect at temperature 0 (greedy); set temperature above 0"
                    )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """True if penalties or biases apply, so that the best token is not simply the model's."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")


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
