"""Drafting by whatever pays: lookup, the model's exits, or nothing, as the controller plans each round."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.base import Draft, Drafter, Round
from hopskip.draft.controller import Controller
from hopskip.draft.costs import Costs
from hopskip.draft.exit import Exit, ExitDrafter, source_of
from hopskip.draft.live_costs import DraftTiming
from hopskip.draft.ngram import NgramDrafter
from hopskip.sequence import Sequence
from hopskip.speculative import LOOKUP, Source


class AutoDrafter(Drafter):
    """Several sources and a controller that chooses among them. It goes by the clock, and no text hangs on it.

    Args:
        exits: to draft from.
        costs: of the model with these exits, as they were measured.
        keep_costs: told of a better table, where that has turned out wrong.
        max_draft_tokens, max_runner_ups: of a round and sequence.
        rows_per_sequence: least rows of a verify pass per sequence.
        min_confidence: see `ExitDrafter`.
    """

    def __init__(
        self,
        backend: Backend,
        exits: Seq[Exit],
        costs: Costs,
        *,
        keep_costs: Callable[[Costs], None] = lambda costs: None,
        max_draft_tokens: int,
        max_runner_ups: int = 0,
        rows_per_sequence: int = 1,
        min_confidence: float = 0.0,
    ) -> None:
        # a match of one token says little, but may be worth a row; the controller finds out
        self.sources: dict[Source, Drafter] = {LOOKUP: NgramDrafter(min_size=1)}
        self._exits = {source_of(exit): ExitDrafter(backend, exit, min_confidence) for exit in exits}
        self.sources |= self._exits
        self.costs: Costs = costs
        self._keep_costs = keep_costs
        self.priors = {
            source_of(exit): exit.notes["held_out_acceptance"]
            for exit in exits
            if isinstance(exit, TrainedExit) and "held_out_acceptance" in exit.notes
        }
        """By exit, what its training has shown of its acceptance."""
        self.controller = Controller(costs, max_draft_tokens, rows_per_sequence, self.priors, max_runner_ups)
        # of the sources only a trained exit with layers of its own wants to see what the model computes
        self._watching = next((drafter for drafter in self.sources.values() if drafter.taps is not None), None)
        self.taps = self._watching.taps if self._watching else None
        self._buckets: list[list[int]] = []
        self._draft_timings: list[DraftTiming] = []

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        assert self._watching is not None
        self._watching.observe(rows, features_NAD)

    def copy(self, source: int, target: int, length: int) -> None:
        if self._watching is not None:
            self._watching.copy(source, target, length)

    def pauses(self) -> bool:
        self._buckets, self._draft_timings = [], []
        return self.controller.pauses

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = self._by_plan(sequences, limits, cache)
        self._buckets = [draft.buckets for draft in drafts]
        return drafts

    def _by_plan(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        started = time.perf_counter()
        lookups = self.sources[LOOKUP].propose(sequences, limits, cache)
        choices = self.controller.plan(sequences, limits, [draft.buckets for draft in lookups], self._num_unseen)
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
            self._draft_timings.append(DraftTiming(exit, depth, len(own), num_entered, seconds))
        return drafts

    def _num_unseen(self, exit: Source, sequence: Sequence) -> int:
        return self._exits[exit].num_unseen(sequence)

    def learn(self, sequences: Seq[Sequence], outcome: Round) -> None:
        corrected = self.controller.learn(sequences, self._buckets, outcome, self._draft_timings)
        if corrected is not None:
            self._keep_costs(corrected)
