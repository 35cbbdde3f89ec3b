"""From final hidden states to tokens: each sequence's draft is held against what the target says.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array
from hopskip.draft.base import Draft
from hopskip.engine.verify import Verdict, verify_greedy, verify_sampled
from hopskip.sampling import adjust_logits, probabilities
from hopskip.sequence import Origin, Sequence, Token


class Choice(NamedTuple):
    """What becomes of one sequence's draft."""

    verdict: Verdict
    tokens: list[Token]
    """To be committed, accepted ones first; none if the request has failed."""


def choose(backend: Backend, sequences: Seq[Sequence], drafts: Seq[Draft], hidden_ND: Array) -> list[Choice]:
    """Verify drafts, N = sum of (draft length + 1): states of each sequence's last token, and of its draft tokens.

    Whatever a request brings with it fails that request alone (`Sequence.error`).
    """
    if not any(s.needs_logits for s in sequences):
        best = backend.greedy(hidden_ND)
        verdicts = []
        for draft in drafts:
            num_rows = len(draft.token_ids) + 1
            verdicts.append(verify_greedy(draft.token_ids, best[:num_rows], draft.parents))
            best = best[num_rows:]
        return [Choice(verdict, _tokens(draft, verdict)) for draft, verdict in zip(drafts, verdicts, strict=True)]
    logits_NV = torch.as_tensor(backend.logits(hidden_ND))
    choices: list[Choice] = []
    first = 0
    for sequence, draft in zip(sequences, drafts, strict=True):
        own_NV = logits_NV[first : first + len(draft.token_ids) + 1]
        first += len(own_NV)
        try:
            verdict = _verify_logits(sequence, draft, own_NV)
            choices.append(Choice(verdict, _tokens(draft, verdict, own_NV, sequence.params.logprobs)))
        except Exception as error:  # of its constraint, or of its own numbers
            sequence.fail(error)
            choices.append(Choice(Verdict((), -1), []))
    return choices


def _verify_logits(sequence: Sequence, draft: Draft, logits_NV: Tensor) -> Verdict:
    """Verify one draft against the target's logits after 0, 1, .. draft tokens."""
    params = sequence.params
    assert draft.parents is None or not (params.changes_logits or sequence.constraint)  # both go along a chain
    if params.changes_logits:
        logits_NV = adjust_logits(logits_NV, params, sequence.counts, draft.token_ids)
    if sequence.constraint is not None:
        allowed_NV = sequence.constraint.masks(draft.token_ids).to(logits_NV.device)
        logits_NV = logits_NV.masked_fill(~allowed_NV, -torch.inf)
    if params.is_greedy:
        return verify_greedy(draft.token_ids, logits_NV.argmax(dim=-1).tolist(), draft.parents)
    probs_NV = probabilities(logits_NV, params)
    return verify_sampled(draft.token_ids, draft.probs, probs_NV, sequence.generator, draft.parents)


def _tokens(
    draft: Draft, verdict: Verdict, logits_NV: Tensor | None = None, num_logprobs: int | None = None
) -> list[Token]:
    path = verdict.path
    ids = [*(draft.token_ids[index] for index in path), verdict.next_token]
    is_bonus = bool(path) and not draft.goes_on_after(path[-1])
    origins: list[Origin] = [draft.source.kind] * len(path)
    origins.append("bonus" if is_bonus else "target")
    if logits_NV is None or num_logprobs is None:
        return [Token(i, origin) for i, origin in zip(ids, origins, strict=True)]
    tokens = []
    for i, origin, logprobs_V in zip(ids, origins, logits_NV[verdict.rows].log_softmax(dim=-1), strict=True):
        top = logprobs_V.topk(num_logprobs)
        top_logprobs = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        tokens.append(Token(i, origin, float(logprobs_V[i]), top_logprobs))
    return tokens
