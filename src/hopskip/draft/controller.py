"""What to draft in each round: for every sequence a source and a length, or nothing.

A round yields one token per sequence and those of its drafts that are accepted; it costs the draft and a verify pass,
which grows with its rows. The controller estimates both and takes the plan of most tokens per second:

- *Costs* start from the measured table (`costs.py`) and follow the live rounds (`live_costs.py`).
- *Acceptance* is counted by kind of token (source, and the place in an exit's draft or the length of a lookup's match),
  with old counts fading, for each request on its own. A request starts from what the earlier ones have shown
  (`acceptance.py`).
- *Probes*: a source that does not pay is tried again now and then, for at most `PROBE_SHARE` of the time.

It can change how fast a text comes, but not the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

from hopskip.draft.acceptance import MAX_BUCKET, Acceptance, Kind, RequestAcceptance
from hopskip.draft.base import Round
from hopskip.draft.costs import Costs
from hopskip.draft.live_costs import DraftTiming, LiveCosts
from hopskip.draft.plans import Choice, Forecast, Plan, best_by_exits, best_by_lookup, priced
from hopskip.sequence import Sequence
from hopskip.speculative import LOOKUP, Source

PROBE_SHARE = 0.005
"""Most of the time that probes may lose."""
_MARGIN, _MARGIN_OF_COMPANION = 1.03, 0.015
"""By which drafts must promise to pay: estimates are no better, and drafting itself takes some time. Many sequences
gain less, and the numbers of rows that are compared lie further apart."""
_PLAN_HOLDS = 4
"""Rounds for which the plan by exits of a sequence alone holds; what lookup has for it is thought of in each."""
_EXITS_EVERY = 8
"""Rounds before exits are thought of again that were not worth it."""
_LARGE_BATCH = 8
"""Sequences, of which some always have something to look up."""
_LEARNS_OF_PAUSES = 4
"""One round of so many is learnt from in a pause: all are alike, and to learn takes time too."""
_CHECK_EVERY = 256
"""Rounds after which the table is held against what they have shown."""


class _Use(NamedTuple):
    """What a probe tries."""

    source: Source
    is_runner_up: bool = False


class Controller:
    """Plans rounds, and learns from each.

    Args:
        costs: the measured table; its drafts are the exits to choose from.
        max_draft_tokens: of a round and sequence.
        rows_per_sequence: least rows of a verify pass per sequence; see `Engine`.
        priors: by exit, known shares of drafts whose first 1, 2, .. tokens were accepted.
        max_runner_ups: beside an exit's draft.
    """

    def __init__(
        self,
        costs: Costs,
        max_draft_tokens: int,
        rows_per_sequence: int = 1,
        priors: Mapping[Source, Seq[float]] | None = None,
        max_runner_ups: int = 0,
    ) -> None:
        self.costs = LiveCosts(costs, rows_per_sequence)
        self._exits = tuple(costs.drafts)
        self._max_draft_tokens = max_draft_tokens
        self._max_runner_ups = max_runner_ups
        self._acceptance = Acceptance(priors or {})
        self._requests: WeakKeyDictionary[Sequence, RequestAcceptance] = WeakKeyDictionary()
        self._exit_plans: WeakKeyDictionary[Sequence, tuple[int, Plan | None]] = WeakKeyDictionary()
        """Of sequences alone: the best plan by exits, and the number of the round it was made for."""
        self._credit = 0.0
        """Seconds that probes may lose now."""
        self._last_use = dict.fromkeys(
            (*map(_Use, (*self._exits, LOOKUP)), *(_Use(exit, True) for exit in self._exits)), 0
        )
        """Number of the round that last drafted so."""
        self._num_rounds = 0
        self._due = self._exits_due = 0
        """Numbers of the rounds that drafts, and exits, are thought of again."""
        self._pause = 0
        """Rounds of the last pause."""

    @property
    def pauses(self) -> bool:
        """True while thinking costs more than it is likely to bring: after a batch of sequences had nothing worth
        drafting, for longer each time, up to as many rounds as there are others. Nobody computes while a plan is
        made."""
        return self._num_rounds < self._due

    def plan(
        self,
        sequences: Seq[Sequence],
        limits: Seq[int],
        lookups: Seq[Seq[int]],
        num_unseen: Callable[[Source, Sequence], int] = lambda exit, sequence: 1,
    ) -> list[Choice]:
        """The source and length of each sequence's next draft.

        Args:
            limits: most tokens of each.
            lookups: the buckets of the tokens that lookup proposes for each; none if it has no match.
            num_unseen: of an exit and a sequence, the tokens that a draft begins with.
        """
        num_rows = len(sequences)
        self.costs.look_at([sequence.num_cached for sequence in sequences])
        by_exits = self._kept_exit_plan(sequences[0], limits[0]) if num_rows == 1 else None
        # what exits are worth changes slowly, and thinking it through takes a while in which nobody computes
        exits = self._exits if by_exits is None and self._num_rounds >= self._exits_due else ()
        # a row far less likely to count than what rows cost now is not worth the thought
        price = self.costs.marginal_row(num_rows) * num_rows / self.costs.pass_seconds(num_rows)
        floor = 0.8 * price if self.costs.rows_per_sequence == 1 else 0.0
        forecasts = [
            self._forecast(
                sequence,
                min(limit, self._max_draft_tokens),
                buckets,
                {exit: num_unseen(exit, sequence) for exit in exits},
                floor,
            )
            for sequence, limit, buckets in zip(sequences, limits, lookups, strict=True)
        ]
        plan = best_by_lookup(forecasts, self.costs)
        if exits:
            by_exits = best_by_exits(forecasts, self.costs, plan.rate)
            if num_rows == 1:
                self._exit_plans[sequences[0]] = self._num_rounds, by_exits
        if by_exits and by_exits.rate > plan.rate:
            plan = by_exits
        nothing = priced(forecasts, [Choice(None, 0)] * num_rows, self.costs)
        planning = self.costs.planning if num_rows > 1 else 0.0  # of a single one, every round is planned
        promised = plan.tokens / (plan.seconds + planning)
        if promised < (_MARGIN + _MARGIN_OF_COMPANION * (num_rows - 1)) * nothing.rate:
            plan = nothing
        if any(limit > 0 for limit in limits):  # the end of a text says nothing of the next
            self._schedule({choice.source for choice in plan.choices} - {None}, num_rows)
        return (self._probe(forecasts, plan) or plan).choices

    def _kept_exit_plan(self, sequence: Sequence, limit: int) -> Plan | None:
        """What is remembered, while it holds and drafts no more than `limit` tokens."""
        made, plan = self._exit_plans.get(sequence, (0, None))
        holds = plan is not None and self._num_rounds <= made + _PLAN_HOLDS
        return plan if holds and plan is not None and plan.choices[0].num_tokens <= limit else None

    def _schedule(self, used: set[Source | None], num_sequences: int) -> None:
        """When to think of drafts, and of exits, again, after a plan that drafts from these sources."""
        self._pause = 0 if used else min(2 * self._pause + 1, 2 * num_sequences - 2)
        self._due = self._num_rounds + 1 + self._pause
        has_thought_of_exits = self._num_rounds >= self._exits_due
        if has_thought_of_exits and (not used or (used == {LOOKUP} and num_sequences >= _LARGE_BATCH)):
            self._exits_due = self._num_rounds + _EXITS_EVERY

    def learn(
        self, sequences: Seq[Sequence], buckets: Seq[Seq[int]], outcome: Round, drafts: Seq[DraftTiming]
    ) -> Costs | None:
        """Count what a round has shown. Returns a corrected table if the one at hand has turned out wrong.

        Args:
            buckets: of the tokens drafted for each sequence; none in a pause.
        """
        self._num_rounds += 1
        self._credit = min(self._credit + PROBE_SHARE * outcome.seconds, 2 * outcome.seconds)
        if not buckets and self._num_rounds % _LEARNS_OF_PAUSES:
            return None
        # no parts where nobody was drafted for
        is_drafted = bool(buckets and outcome.sequences)
        for sequence, own_buckets, part in zip(sequences, buckets, outcome.sequences, strict=is_drafted):
            if part.source is None:
                continue
            source, own, temperature = _source_named(part.source), self._of(sequence), _temperature(sequence)
            self._last_use[_Use(source)] = self._num_rounds
            num_chained = part.num_draft_tokens - part.num_runner_ups
            accepted = [True] * (part.num_accepted_tokens - (part.runner_up is not None))
            if len(accepted) < min(num_chained, part.num_committed):
                accepted.append(False)  # unless the text has ended within the draft
            own.record((Kind(source, min(bucket, MAX_BUCKET), temperature) for bucket in own_buckets), accepted)
            if part.num_runner_ups:
                self._last_use[_Use(source, True)] = self._num_rounds
                ranks = range(part.num_runner_ups)
                own.record(
                    (Kind(source, rank, temperature, True) for rank in ranks),
                    [rank == part.runner_up for rank in ranks],
                )
        self.costs.learn(outcome, drafts)
        return self.costs.corrected() if self._num_rounds % _CHECK_EVERY == 0 else None

    def _of(self, sequence: Sequence) -> RequestAcceptance:
        if sequence not in self._requests:
            self._requests[sequence] = RequestAcceptance(self._acceptance)
        return self._requests[sequence]

    def _forecast(
        self, sequence: Sequence, limit: int, lookup: Seq[int], num_unseen: Mapping[Source, int], floor: float
    ) -> Forecast:
        own, temperature = self._of(sequence), _temperature(sequence)
        survival = {exit: own.survival(exit, range(limit), temperature, floor) for exit in num_unseen}
        survival[LOOKUP] = own.survival(LOOKUP, lookup[: max(limit, 0)], temperature, floor)
        runner_ups: dict[Source, list[float]] = {}
        if self._max_runner_ups:
            runner_ups = {exit: own.runner_ups(exit, self._max_runner_ups, temperature, floor) for exit in num_unseen}
        return Forecast(
            survival=survival,
            runner_ups=runner_ups,
            num_unseen=num_unseen,
            num_rounds=max(1, sequence.num_tokens_left // 2),
        )

    def _probe(self, forecasts: Seq[Forecast], plan: Plan) -> Plan | None:
        """One token of what was used longest ago, if the credit covers its whole price, as if it were rejected: of an
        exit for all who draft nothing, as they share its step; of lookup for one of them; or a runner-up to the drafts
        of the exit that has the round."""
        used = {choice.source for choice in plan.choices}
        exit = next((source for source in self._exits if source in used), None)
        idle = [_Use(source) for source in (LOOKUP, *self._exits) if source not in used]
        if exit is not None:
            idle = [use for use in idle if use.source == LOOKUP]
            if self._max_runner_ups and not any(choice.num_runner_ups for choice in plan.choices):
                idle.append(_Use(exit, True))
        for use in sorted(idle, key=self._last_use.__getitem__):
            choices = _probing(forecasts, plan.choices, use)
            if choices != plan.choices:
                break
        else:
            return None
        # the next rounds may well not use what this one makes ready
        probe = priced([replace(forecast, num_rounds=1) for forecast in forecasts], choices, self.costs)
        price = probe.seconds - plan.seconds
        if price > self._credit:
            return None
        self._credit -= max(0.0, price)
        return probe


def _temperature(sequence: Sequence) -> float:
    return round(sequence.params.temperature, 1)


def _probing(forecasts: Seq[Forecast], choices: Seq[Choice], use: _Use) -> list[Choice]:
    """The choices with a token more of this use, where it can be."""
    source = use.source
    if use.is_runner_up:
        return [
            choice._replace(num_runner_ups=1) if source == choice.source in forecast.runner_ups else choice
            for forecast, choice in zip(forecasts, choices, strict=True)
        ]
    can = [c.source is None and bool(f.survival.get(source)) for f, c in zip(forecasts, choices, strict=True)]
    if source == LOOKUP:  # one of them says as much
        likely = max(
            (i for i, may in enumerate(can) if may), key=lambda i: forecasts[i].survival[source][0], default=None
        )
        can = [i == likely for i in range(len(can))]
    return [Choice(source, 1) if may else choice for may, choice in zip(can, choices, strict=True)]


_source_named = cache(Source.parse)
