"""Drafting by whatever pays: lookup, the model's exits, or nothing, as the controller plans each round."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

from torch import Tensor

from hopskip.branch import ExitBranch
from hopskip.cache import Cache, Rows
from hopskip.draft.base import Draft, Drafter, FirstOf
from hopskip.draft.controller import LOOKUP, Controller, Drafting
from hopskip.draft.costs import Exit, Timings, source_name
from hopskip.draft.exit import ExitDrafter
from hopskip.draft.ngram import NgramDrafter
from hopskip.model import Model
from hopskip.sequence import Sequence
from hopskip.trace import Round


class AutoDrafter(Drafter):
    """Several sources and a controller that chooses among them.

    Its choices go by the clock, and a drawn text hangs on what is drafted for it. So a sequence with a seed, whose text
    must come the same another time, drafts by a fixed rule: lookup where its text has a match, else the first exit.

    Args:
        exits: to draft from.
        timings: of the model with these exits.
        fixed_length: of the drafts by the fixed rule, at most.
        max_draft_tokens, max_runner_ups: of a round and sequence.
        rows_per_sequence: least rows of a verify pass per sequence.
        min_confidence: see `ExitDrafter`.
    """

    def __init__(
        self,
        model: Model,
        exits: Seq[Exit],
        timings: Timings,
        *,
        max_draft_tokens: int,
        fixed_length: int,
        max_runner_ups: int = 0,
        rows_per_sequence: int = 1,
        min_confidence: float = 0.0,
    ) -> None:
        # a match of one token says little, but may be worth a row; the controller finds out
        self.sources: dict[str, Drafter] = {LOOKUP: NgramDrafter(min_size=1)}
        self._exits = {source_name(exit): ExitDrafter(model, exit, min_confidence) for exit in exits}
        self.sources |= self._exits
        self._fixed: Drafter = FirstOf(NgramDrafter(), *self._exits.values())
        self._fixed_length = min(fixed_length, max_draft_tokens)
        self._timings = timings
        self.costs = costs = timings.get()
        """As they were measured."""
        self.priors = {
            source_name(exit): exit.notes["held_out_acceptance"]
            for exit in exits
            if isinstance(exit, ExitBranch) and "held_out_acceptance" in exit.notes
        }
        """By exit, what its training has shown of its acceptance."""
        self.controller = Controller(costs, max_draft_tokens, rows_per_sequence, self.priors, max_runner_ups)
        # of the sources only a branch with layers of its own wants to see what the model computes
        self._watching = next((drafter for drafter in self.sources.values() if drafter.taps is not None), None)
        self.taps = self._watching.taps if self._watching else None
        self._signs: list[list[int]] = []
        self._drafting: list[Drafting] = []

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        assert self._watching is not None
        self._watching.observe(rows, states_NAD)

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        self._drafting = []
        drafts = [Draft() for _ in sequences]
        seeded = [i for i, sequence in enumerate(sequences) if sequence.is_seeded]
        planned = [i for i, sequence in enumerate(sequences) if not sequence.is_seeded]
        if seeded:
            lengths = [min(limits[i], self._fixed_length) for i in seeded]
            for i, draft in zip(
                seeded, self._fixed.propose([sequences[i] for i in seeded], lengths, cache), strict=True
            ):
                drafts[i] = draft
        if planned and not self.controller.pauses:
            own, most = [sequences[i] for i in planned], [limits[i] for i in planned]
            for i, draft in zip(planned, self._by_plan(own, most, cache), strict=True):
                drafts[i] = draft
        self._signs = [draft.signs for draft in drafts]
        return drafts

    def _by_plan(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        started = time.perf_counter()
        lookups = self.sources[LOOKUP].propose(sequences, limits, cache)
        choices = self.controller.plan(sequences, limits, [draft.signs for draft in lookups], self._num_unseen)
        self.controller.costs.learn_planning(time.perf_counter() - started)
        drafts = [
            draft.cut(choice.num_tokens) if choice.source == LOOKUP else Draft()
            for draft, choice in zip(lookups, choices, strict=True)
        ]
        for exit in dict.fromkeys(choice.source for choice in choices if choice.source not in (None, LOOKUP)):
            assert exit is not None
            members = [i for i, choice in enumerate(choices) if choice.source == exit]
            own, lengths = [sequences[i] for i in members], [choices[i].num_tokens for i in members]
            num_entered = sum(self._num_unseen(exit, sequence) for sequence in own)
            started = time.perf_counter()
            found = self._exits[exit].propose(own, lengths, cache, [choices[i].num_runner_ups for i in members])
            seconds = time.perf_counter() - started
            for i, draft in zip(members, found, strict=True):
                drafts[i] = draft
            depth = max(draft.num_chained for draft in found)
            by_logits = any(sequence.needs_logits for sequence in own)
            self._drafting.append(Drafting(exit, depth, len(own), num_entered, by_logits, seconds))
        return drafts

    def _num_unseen(self, exit: str, sequence: Sequence) -> int:
        return self._exits[exit].num_unseen(sequence)

    def learn(self, sequences: Seq[Sequence], outcome: Round) -> None:
        corrected = self.controller.learn(sequences, self._signs, outcome, self._drafting)
        if corrected is not None:
            self._timings.put(corrected)
