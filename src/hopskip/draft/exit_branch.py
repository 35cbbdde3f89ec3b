"""Drafting with a trained exit branch (`hopskip.branch`).

The branch has keys and values of its own for every position, in the cache's last layers, made from what the model's
passes left behind. They are brought up to date when a draft begins: one pass over the tokens that were committed since,
the last of which yields the first draft token. While drafting on, the branch's own outputs take the place of the
model's, so those positions are made anew next time.

Shape letters: N rows, A taps, D hidden size, V vocabulary, n draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from hopskip.branch import ExitBranch, Mixing
from hopskip.cache import Cache, Rows, Segment
from hopskip.draft.base import Draft, Drafter
from hopskip.model import BranchedModel
from hopskip.sampling import adjust_logits, draw, probabilities
from hopskip.sequence import Sequence


@dataclass
class _Slot:
    """What is known of one slot of the cache."""

    first: int
    """Position of the first of `states`."""
    states_NAD: Tensor
    """Outputs of the tapped layers, of all positions that the model has seen from `first` on."""
    num_cached: int = 0
    """Positions that hold the branch's keys and values as the model's own states make them."""

    def observe(self, start: int, states_NAD: Tensor) -> None:
        """A pass over positions from `start` on. What was known of them before is void, but for the token at `start`:
        it was committed when the pass began, so the branch's keys and values there hold."""
        self.num_cached = min(self.num_cached, start + 1) if start else 0
        keep = start - self.first
        if 0 <= keep <= len(self.states_NAD):
            self.states_NAD = torch.cat((self.states_NAD[:keep], states_NAD))
        else:
            self.first, self.states_NAD = start, states_NAD

    def take(self, start: int, stop: int) -> Tensor:
        """States of positions start..stop-1; zeros for the position before the first."""
        states = self.states_NAD[max(0, start - self.first) : stop - self.first]
        return torch.cat((torch.zeros_like(self.states_NAD[:1]), states)) if start < 0 else states

    def forget(self, stop: int) -> None:
        """Drop the states of positions before `stop`."""
        self.states_NAD = self.states_NAD[max(0, stop - self.first) :]
        self.first = max(self.first, stop)


class BranchDrafter(Drafter):
    """Drafts token by token through a branch that is attached to the model.

    A draft ends early after its first token whose probability, among the draft vocabulary, is below `min_confidence`.
    """

    def __init__(self, model: BranchedModel, branch: ExitBranch, min_confidence: float = 0.0) -> None:
        self._model = model
        self._branch = branch.config
        self._vocabulary = branch.vocabulary
        self._min_confidence = min_confidence
        self._slots: dict[int, _Slot] = {}
        self.taps = branch.config.taps
        self._feature_columns = [self.taps.index(feature) for feature in branch.config.features]
        self._mixing = Mixing(branch, model.config.rms_norm_eps, model.dtype, model.device)

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        parts = torch.split(states_NAD, [segment.count for segment in rows.segments])
        for segment, own in zip(rows.segments, parts, strict=True):
            slot = self._slots.get(segment.slot)
            if slot is None:
                self._slots[segment.slot] = _Slot(segment.start, own)
            else:
                slot.observe(segment.start, own)

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = [Draft("exit-branch", probs=None if s.params.is_greedy else []) for s in sequences]
        active = [i for i, limit in enumerate(limits) if limit > 0]
        if not active:
            return drafts
        h_ND = self._catch_up([sequences[i] for i in active], cache)
        while True:
            for i, logits_1n in zip(active, torch.split(self._model.unembed_draft(h_ND), 1), strict=True):
                self._choose(sequences[i], drafts[i], logits_1n)
            goes_on = [not drafts[i].is_closed and len(drafts[i].token_ids) < limits[i] for i in active]
            active = [i for i, goes in zip(active, goes_on, strict=True) if goes]
            if not active:
                return drafts
            h_ND = self._step([sequences[i] for i in active], [drafts[i] for i in active], h_ND[goes_on], cache)

    def _catch_up(self, sequences: Seq[Sequence], cache: Cache) -> Tensor:
        """Run the branch over all committed tokens that it has not seen: its output at each sequence's last, [B, D]."""
        segments = []
        token_ids: list[int] = []
        states: list[Tensor] = []  # of the token before each row
        own_states: list[Tensor] = []  # of each row that the model has seen
        for sequence in sequences:
            slot, last = self._slots[sequence.slot], sequence.num_cached
            start = min(slot.num_cached, last)
            segments.append(Segment(sequence.slot, start, last + 1 - start))
            token_ids += sequence.token_ids[start:]
            states.append(slot.take(start - 1, last))
            own_states.append(slot.take(start, last))
            slot.num_cached = last + 1
            slot.forget(last)
        rows = Rows(segments)
        x_ND = self._token_states(token_ids, rows, own_states, cache)
        if self._feature_columns:
            x_ND = self._mixing.mix(x_ND, self._mixing.fuse(torch.cat(states)[:, self._feature_columns]))
        ends = torch.tensor([segment.count for segment in segments]).cumsum(0) - 1
        return self._run(x_ND, rows, cache)[ends]

    def _step(self, sequences: Seq[Sequence], drafts: Seq[Draft], h_ND: Tensor, cache: Cache) -> Tensor:
        """The branch's output at the latest token of every draft, [B, D]; `h_ND` is its output at the token before."""
        rows = Rows(Segment(s.slot, s.num_cached + len(d.token_ids), 1) for s, d in zip(sequences, drafts, strict=True))
        x_ND = self._token_states([draft.token_ids[-1] for draft in drafts], rows, [], cache)
        return self._run(self._mixing.mix(x_ND, h_ND) if self._feature_columns else x_ND, rows, cache)

    def _token_states(self, token_ids: list[int], rows: Rows, known: list[Tensor], cache: Cache) -> Tensor:
        """What enters the branch for each row: embeddings, or outputs of the first layers. Those are `known` for all
        but the last row of each segment."""
        start = self._branch.start
        if not start:
            return self._model.embed(torch.tensor(token_ids, dtype=torch.int32))
        ends = torch.tensor([segment.count for segment in rows.segments]).cumsum(0) - 1
        last = Rows(Segment(s.slot, s.start + s.count - 1, 1) for s in rows.segments)
        h_BD = self._model.embed(torch.tensor(token_ids, dtype=torch.int32)[ends])
        h_BD = self._model.run_layers(h_BD, 0, start, last, cache)
        if not known:
            return h_BD
        column = self.taps.index(start)
        return torch.cat(
            [x for own, new in zip(known, torch.split(h_BD, 1), strict=True) for x in (own[:, column], new)]
        )

    def _run(self, x_ND: Tensor, rows: Rows, cache: Cache) -> Tensor:
        first = self._model.config.num_hidden_layers
        return self._model.run_layers(x_ND, first, first + self._branch.num_layers, rows, cache)

    def _choose(self, sequence: Sequence, draft: Draft, logits_1n: Tensor) -> None:
        """Add one token to a draft."""
        params = sequence.params
        if params.is_greedy and not params.changes_logits:
            index = int(logits_1n.argmax())
            token = int(self._vocabulary[index])
            if self._min_confidence > 0:
                draft.is_closed = float(logits_1n[0].softmax(dim=-1)[index]) < self._min_confidence
        else:
            logits_1V = logits_1n.new_full((1, self._model.config.vocab_size), float("-inf"))
            logits_1V[:, self._vocabulary] = logits_1n
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
