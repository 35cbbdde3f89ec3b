"""Drafting with the model's own early layers (LayerSkip, arXiv 2404.16710): layers 0..E-1, final norm, LM head."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from hopskip.cache import Cache, Rows, Segment
from hopskip.draft.base import Draft, Drafter
from hopskip.model import Model
from hopskip.sampling import adjust_logits, draw, probabilities
from hopskip.sequence import Sequence


class EarlyExitDrafter(Drafter):
    """Drafts token by token through the shared norm and head after `exit_layer` layers.

    A draft ends early after its first token whose probability at the exit is below `min_confidence`: what follows an
    unsure token is likely to be rejected with it.
    """

    def __init__(self, model: Model, exit_layer: int, min_confidence: float = 0.0) -> None:
        assert 0 < exit_layer < model.config.num_hidden_layers
        self._model = model
        self._exit_layer = exit_layer
        self._min_confidence = min_confidence

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = [Draft("early-exit", probs=None if s.params.is_greedy else []) for s in sequences]
        active = [i for i, limit in enumerate(limits) if limit > 0]
        while active:
            self._step([sequences[i] for i in active], [drafts[i] for i in active], cache)
            active = [i for i in active if not drafts[i].is_closed and len(drafts[i].token_ids) < limits[i]]
        return drafts

    def _step(self, sequences: Seq[Sequence], drafts: Seq[Draft], cache: Cache) -> None:
        """One more token for every draft, in one pass of the early layers."""
        last_ids = [(d.token_ids or s.token_ids)[-1] for s, d in zip(sequences, drafts, strict=True)]
        rows = Rows(Segment(s.slot, s.num_cached + len(d.token_ids), 1) for s, d in zip(sequences, drafts, strict=True))
        h_ND = self._model.embed(torch.tensor(last_ids, dtype=torch.int32))
        h_ND = self._model.run_layers(h_ND, 0, self._exit_layer, rows, cache)
        needs_logits = self._min_confidence > 0 or any(
            not s.params.is_greedy or s.params.changes_logits for s in sequences
        )
        logits_NV = self._model.unembed(h_ND) if needs_logits else None
        best = self._model.greedy(h_ND).tolist() if logits_NV is None else []
        for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            draft.exit_states.append(h_ND[i])
            params = sequence.params
            if logits_NV is None:
                token = best[i]
            else:
                logits_1V = logits_NV[i : i + 1]
                if params.changes_logits:
                    logits_1V = adjust_logits(logits_1V, params, sequence.counts, draft.token_ids)
                if params.is_greedy:
                    probs_V = logits_1V[0].softmax(dim=-1)
                    token = int(logits_1V.argmax())
                else:
                    probs_V = probabilities(logits_1V, params)[0]
                    token = draw(probs_V, sequence.generator)
                    assert draft.probs is not None
                    draft.probs.append(probs_V)
                draft.is_closed = float(probs_V[token]) < self._min_confidence
            draft.token_ids.append(token)
