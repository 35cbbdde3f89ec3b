"""What to draft in each round: for every sequence a source and a length, or nothing.

A round yields one token per sequence and those of its drafts that are accepted; it costs the draft and a verify pass,
which grows with its rows. The controller estimates both and takes the plan of most tokens per second:

- *Costs* start from the measured table (`costs.py`) and follow the live rounds.
- *Acceptance* is counted by source and sign of the token (its place in an exit's draft, the length of a lookup's
  match), with old counts fading, for each request on its own. A request starts from what the earlier ones have shown.
- *Probes*: a source that does not pay is tried again now and then, for at most `PROBE_SHARE` of the time.

The choice depends on committed tokens and on clocks only, never on the tokens that a draft goes on to draw. So it can
change how fast a text comes, but neither the text nor, in sampling, its distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

from hopskip.draft.costs import Costs, DraftCost, interpolated
from hopskip.draft.exit import allows_runner_ups
from hopskip.sequence import Sequence
from hopskip.trace import Round

LOOKUP = "ngram"
"""The source that costs nothing but rows. All others are exits, whose drafts of all sequences share their steps."""
PROBE_SHARE = 0.005
"""Most of the time that probes may lose."""
MAX_SIGN = 16
"""Longer matches are counted with those of this length."""
_MIN_SURVIVAL = 0.02
"""A draft token less likely than this to be accepted is not considered: no row is that cheap."""
_PACE = 0.05
"""Weight of one round in costs that follow the rounds."""
_NEAR = 0.4
"""Numbers of rows with logarithms this far apart still share a third of a correction."""
_WRONG = 1.5
"""A table is wrong if its entries are off by this factor against each other."""
_MEMORY, _REQUEST_MEMORY = 500, 24
"""Draft tokens of a kind that are remembered, over all requests and in one."""
_FADING = 0.99
"""What a round leaves of a request's older counts, so that what did not pay once is not ruled out for ever."""
_PRIOR_WEIGHT, _GUESS_WEIGHT = 16.0, 4.0
"""Draft tokens that what was known before is worth, and that a guess is. Replays go about as well from 8 to 32."""
_UNKNOWN = 0.5
"""Acceptance of a source of which nothing is known: it will be tried."""
_UNKNOWN_LAYER_SKIP = 0.85
"""The same of a draft by nearly the whole model."""
_MARGIN, _MARGIN_OF_COMPANION = 1.03, 0.015
"""By which drafts must promise to pay: estimates are no better, and drafting itself takes some time. Many sequences
gain less, and the numbers of rows that are compared lie further apart."""
_FORESIGHT = 32
"""Most rounds that the reading of older tokens is spread over; the text may end sooner than it could."""
_EXITS_EVERY = 8
"""Rounds before exits are thought of again that were not worth it."""
_ALONE_EVERY = 4
"""Rounds for which the plan by exits of a sequence alone holds; what lookup has for it is thought of in each."""
_LARGE_BATCH = 8
"""Sequences, of which some always have something to look up."""
_CHECK_EVERY = 256
"""Rounds after which the table is held against what they have shown."""
_NOTHING = (0.0, 0.0)
_BESIDE = "+"
"""After an exit's name: its runner-ups, whose sign is their rank."""
_Key = tuple[str, int, float]
"""Source, sign, and temperature, rounded to tenths."""


class Choice(NamedTuple):
    source: str | None
    num_tokens: int
    num_runner_ups: int = 0


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What one sequence could draft. By source, the probabilities that the first 1, 2, .. tokens are all accepted."""

    survival: Mapping[str, Seq[float]]
    runner_ups: Mapping[str, Seq[float]] = field(default_factory=dict)
    """By exit, the probabilities that the first, second, .. token beside the draft is accepted, falling."""
    num_unseen: Mapping[str, int] = field(default_factory=dict)
    """By exit, the tokens that a draft begins with, where that is more than one: see `ExitDrafter.num_unseen`."""
    num_rounds: int = 1
    """Rounds to come, roughly. Once read, tokens are read for all of them."""
    by_logits: bool = False
    """Its tokens are chosen by all logits (sampling, penalties, a grammar), not just by the best."""


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
        priors: Mapping[str, Seq[float]] | None = None,
        max_runner_ups: int = 0,
    ) -> None:
        self.costs = LiveCosts(costs, rows_per_sequence)
        self._exits = tuple(costs.drafts)
        self._max_draft_tokens = max_draft_tokens
        self._max_runner_ups = max_runner_ups
        self._acceptance = Acceptance(priors or {})
        self._requests: WeakKeyDictionary[Sequence, RequestAcceptance] = WeakKeyDictionary()
        self._credit = 0.0
        """Seconds that probes may lose now."""
        self._last_use = dict.fromkeys((*self._exits, LOOKUP, *(exit + _BESIDE for exit in self._exits)), 0)
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
        num_unseen: Callable[[str, Sequence], int] = lambda exit, sequence: 1,
    ) -> list[Choice]:
        """The source and length of each sequence's next draft.

        Args:
            limits: most tokens of each.
            lookups: the signs of the tokens that lookup proposes for each; none if it has no match.
            num_unseen: of an exit and a sequence, the tokens that a draft begins with.
        """
        num_rows = len(sequences)
        alone = self._of(sequences[0]) if num_rows == 1 else None
        by_exits = alone.exit_plan(limits[0]) if alone else None
        # what exits are worth changes slowly, and thinking it through takes a while in which nobody computes
        exits = self._exits if by_exits is None and self._num_rounds >= self._exits_due else ()
        # a row far less likely to count than what rows cost now is not worth the thought
        price = self.costs.marginal_row(num_rows) * num_rows / self.costs.pass_seconds(num_rows)
        floor = max(_MIN_SURVIVAL, 0.8 * price if self.costs.rows_per_sequence == 1 else 0.0)
        prospects = [
            self._prospect(
                sequence,
                min(limit, self._max_draft_tokens),
                signs,
                {exit: num_unseen(exit, sequence) for exit in exits},
                floor,
            )
            for sequence, limit, signs in zip(sequences, limits, lookups, strict=True)
        ]
        plan = best_by_lookup(prospects, self.costs)
        if exits:
            by_exits = best_by_exits(prospects, self.costs, plan.rate)
            if alone:
                alone.keep(by_exits)
        if by_exits and by_exits.rate > plan.rate:
            plan = by_exits
        nothing = priced(prospects, [Choice(None, 0)] * num_rows, self.costs)
        planning = self.costs.planning if num_rows > 1 else 0.0  # of a single one, every round is planned
        promised = plan.tokens / (plan.seconds + planning)
        if promised < (_MARGIN + _MARGIN_OF_COMPANION * (num_rows - 1)) * nothing.rate:
            plan = nothing
        if any(limit > 0 for limit in limits):  # the end of a text says nothing of the next
            self._schedule({choice.source for choice in plan.choices} - {None}, num_rows)
        return (self._probe(prospects, plan) or plan).choices

    def _schedule(self, used: set[str | None], num_sequences: int) -> None:
        """When to think of drafts, and of exits, again, after a plan that drafts from these sources."""
        self._pause = 0 if used else min(2 * self._pause + 1, 2 * num_sequences - 2)
        self._due = self._num_rounds + 1 + self._pause
        has_thought_of_exits = self._num_rounds >= self._exits_due
        if has_thought_of_exits and (not used or (used == {LOOKUP} and num_sequences >= _LARGE_BATCH)):
            self._exits_due = self._num_rounds + _EXITS_EVERY

    def learn(
        self, sequences: Seq[Sequence], signs: Seq[Seq[int]], outcome: Round, drafting: Seq[Drafting]
    ) -> Costs | None:
        """Count what a round has shown. Returns a corrected table if the one at hand has turned out wrong.

        Args:
            signs: of the tokens drafted for each sequence.
        """
        self._num_rounds += 1
        for sequence, own_signs, part in zip(sequences, signs, outcome.sequences, strict=True):
            if part.source is None:
                continue
            self._last_use[part.source] = self._num_rounds
            num_chained = part.num_draft_tokens - part.num_runner_ups
            accepted = [True] * (part.num_accepted_tokens - (part.runner_up is not None))
            if len(accepted) < min(num_chained, part.num_committed):
                accepted.append(False)  # unless the text has ended within the draft
            own, temperature = self._of(sequence), _temperature(sequence)
            own.record(part.source, own_signs, accepted, temperature)
            ranks = range(part.num_runner_ups)
            beside = [rank == part.runner_up for rank in ranks]
            if part.num_runner_ups:
                self._last_use[part.source + _BESIDE] = self._num_rounds
            own.record(part.source + _BESIDE, ranks, beside, temperature)
        self.costs.learn(outcome, drafting)
        self._credit = min(self._credit + PROBE_SHARE * outcome.seconds, 2 * outcome.seconds)
        return self.costs.corrected() if self._num_rounds % _CHECK_EVERY == 0 else None

    def _of(self, sequence: Sequence) -> RequestAcceptance:
        if sequence not in self._requests:
            self._requests[sequence] = RequestAcceptance(self._acceptance)
        return self._requests[sequence]

    def _prospect(
        self, sequence: Sequence, limit: int, lookup: Seq[int], num_unseen: Mapping[str, int], floor: float
    ) -> Prospect:
        own, temperature = self._of(sequence), _temperature(sequence)
        own.begin_round()
        survival = {exit: own.survival(exit, range(limit), temperature, floor) for exit in num_unseen}
        survival[LOOKUP] = own.survival(LOOKUP, lookup[: max(limit, 0)], temperature, floor)
        runner_ups: dict[str, list[float]] = {}
        if self._max_runner_ups and allows_runner_ups(sequence):
            runner_ups = {exit: own.runner_ups(exit, self._max_runner_ups, temperature, floor) for exit in num_unseen}
        return Prospect(
            survival=survival,
            runner_ups=runner_ups,
            num_unseen=num_unseen,
            num_rounds=min(max(1, sequence.num_tokens_left // 2), _FORESIGHT),
            by_logits=sequence.needs_logits,
        )

    def _probe(self, prospects: Seq[Prospect], plan: Plan) -> Plan | None:
        """One token of what was used longest ago, if the credit covers its whole price, as if it were rejected: of an
        exit for all who draft nothing, as they share its step; of lookup for one of them; or one beside the drafts of
        the exit that has the round."""
        used = {choice.source for choice in plan.choices}
        exit = next((source for source in self._exits if source in used), None)
        idle = {LOOKUP, *self._exits} - used if exit is None else {LOOKUP, exit + _BESIDE} - used
        if any(choice.num_runner_ups for choice in plan.choices) or not self._max_runner_ups:
            idle.discard(f"{exit}{_BESIDE}")
        for source in sorted(idle, key=self._last_use.__getitem__):
            choices = _probing(prospects, plan.choices, source)
            if choices != plan.choices:
                break
        else:
            return None
        # the next rounds may well not use what this one makes ready
        probe = priced([replace(prospect, num_rounds=1) for prospect in prospects], choices, self.costs)
        price = probe.seconds - plan.seconds
        if price > self._credit:
            return None
        self._credit -= max(0.0, price)
        return probe


# -- the best plan -----------------------------------------------------------------------------------------------------


def _probing(prospects: Seq[Prospect], choices: Seq[Choice], source: str) -> list[Choice]:
    """The choices with a token of the source added, where it can be."""
    if source == LOOKUP:
        can = [i for i, c in enumerate(choices) if c.source is None and prospects[i].survival[source]]
        likely = max(can, key=lambda i: prospects[i].survival[source][0], default=None)
        return [Choice(source, 1) if i == likely else choice for i, choice in enumerate(choices)]
    if source.endswith(_BESIDE):
        return [
            choice._replace(num_runner_ups=1)
            if choice.source is not None and choice.source + _BESIDE == source and choice.source in prospect.runner_ups
            else choice
            for prospect, choice in zip(prospects, choices, strict=True)
        ]
    return [
        Choice(source, 1) if choice.source is None and prospect.survival.get(source) else choice
        for prospect, choice in zip(prospects, choices, strict=True)
    ]


class Plan(NamedTuple):
    choices: list[Choice]
    tokens: float
    """Expected to be committed, those of the target included."""
    seconds: float
    """Expected to pass."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def best_by_lookup(prospects: Seq[Prospect], costs: LiveCosts) -> Plan:
    """The best plan without exits.

    Rows are handed out by what they are expected to bring. As survival never rises along a draft, taking rows in
    falling order of it takes each draft from its beginning; the best plan is the best point on the way.
    """
    return _hand_out(prospects, [LOOKUP] * len(prospects), costs, None)


def best_by_exits(prospects: Seq[Prospect], costs: LiveCosts, rate: float) -> Plan | None:
    """The best plan with an exit, where time is worth `rate`: of many sequences, some may do better by lookup. None if
    there is no exit to draft from."""
    best: Plan | None = None
    exits = dict.fromkeys(source for prospect in prospects for source in prospect.survival if source != LOOKUP)
    for exit in exits:
        sources = [exit]
        if len(prospects) > 1:
            sources = [_better(prospect, exit, costs, rate, len(prospects)) for prospect in prospects]
        deepest = max((len(p.survival[exit]) for p, s in zip(prospects, sources, strict=True) if s == exit), default=0)
        # of one sequence all depths lie on the way; of many a shallow draft for all may beat a deep one for some
        for depth in range(1, deepest + 1) if len(prospects) > 1 else [deepest][:deepest]:
            found = _with_runner_ups(_hand_out(prospects, sources, costs, depth), prospects, costs)
            is_better = best is None or found.rate > best.rate
            best = found if is_better else best
            if depth > 2 and not (is_better and found.rate > rate):
                break
    return best


def priced(prospects: Seq[Prospect], choices: Seq[Choice], costs: LiveCosts) -> Plan:
    """What these choices may be expected to bring and to cost."""
    bill = _Bill(prospects, costs)
    tokens = float(len(prospects))
    for index, choice in enumerate(choices):
        for place in range(choice.num_tokens):
            assert choice.source is not None
            bill.add(index, choice.source, place)
            tokens += prospects[index].survival[choice.source][place]
        for rank in range(choice.num_runner_ups):
            assert choice.source is not None
            bill.add_runner_up(index)
            tokens += prospects[index].runner_ups[choice.source][rank]
    return Plan(list(choices), tokens, bill.seconds)


def _with_runner_ups(plan: Plan, prospects: Seq[Prospect], costs: LiveCosts) -> Plan:
    """The plan with as many rows for runner-ups beside its drafts as pay. They take no draft step."""
    candidates = sorted(
        (
            (accepted, index)
            for index, (prospect, choice) in enumerate(zip(prospects, plan.choices, strict=True))
            for accepted in prospect.runner_ups.get(choice.source or "", ())
        ),
        reverse=True,
    )
    num_rows = len(prospects) + sum(choice.num_tokens for choice in plan.choices)
    before = costs.pass_seconds(max(num_rows, len(prospects) * costs.rows_per_sequence))
    best, tokens, numbers = plan, plan.tokens, [0] * len(prospects)
    num_by_logits = 0
    for accepted, index in candidates:
        num_rows += 1
        num_by_logits += prospects[index].by_logits
        tokens += accepted
        numbers[index] += 1
        after = costs.pass_seconds(max(num_rows, len(prospects) * costs.rows_per_sequence), num_by_logits)
        seconds = plan.seconds - before + after
        if tokens / seconds > best.rate:
            choices = [c._replace(num_runner_ups=n) for c, n in zip(plan.choices, numbers, strict=True)]
            best = Plan(choices, tokens, seconds)
    return best


def _hand_out(prospects: Seq[Prospect], sources: Seq[str], costs: LiveCosts, depth: int | None) -> Plan:
    """The best plan among those that draft from these sources, exits no deeper than `depth`."""
    rows = [
        (survival, index, place)
        for index, (prospect, source) in enumerate(zip(prospects, sources, strict=True))
        for place, survival in enumerate(prospect.survival.get(source, ())[: None if source == LOOKUP else depth])
    ]
    rows.sort(key=lambda row: -row[0])
    bill = _Bill(prospects, costs)
    tokens = float(len(prospects))
    best_count, best_tokens, best_seconds = 0, tokens, bill.seconds
    for count, (survival, index, place) in enumerate(rows, start=1):
        bill.add(index, sources[index], place)
        tokens += survival
        seconds = bill.seconds
        if tokens * best_seconds > best_tokens * seconds:
            best_count, best_tokens, best_seconds = count, tokens, seconds
    lengths = [0] * len(prospects)
    for _, index, _ in rows[:best_count]:
        lengths[index] += 1
    choices = [Choice(s if n else None, n) for s, n in zip(sources, lengths, strict=True)]
    return Plan(choices, best_tokens, best_seconds)


def _better(prospect: Prospect, exit: str, costs: LiveCosts, rate: float, num_rows: int) -> str:
    """Lookup or this exit: which brings the sequence more, at the price of time."""
    lookup = prospect.survival.get(LOOKUP, ())
    if not lookup:
        return exit
    row = rate * costs.marginal_row(num_rows)
    step = row + rate * costs.draft_seconds(exit, 2, 1) - rate * costs.draft_seconds(exit, 1, 1)
    by_lookup = sum(max(0.0, survival - row) for survival in lookup)
    by_exit = sum(max(0.0, survival - step) for survival in prospect.survival.get(exit, ()))
    return exit if by_exit > by_lookup else LOOKUP


class _Bill:
    """The seconds of a round, as draft tokens are added to it."""

    def __init__(self, prospects: Seq[Prospect], costs: LiveCosts) -> None:
        self._prospects, self._costs = prospects, costs
        self._least_rows = len(prospects) * costs.rows_per_sequence
        self._num_rows = len(prospects)
        self._num_by_logits = sum(prospect.by_logits for prospect in prospects)
        self._exit, self._depth, self._num_drafting, self._num_entered, self._by_logits = "", 0, 0, 0, False

    def add(self, index: int, source: str, place: int) -> None:
        """One more token of a sequence, the `place`-th of its draft, counted from 0."""
        by_logits = self._prospects[index].by_logits
        self.add_runner_up(index)
        if source != LOOKUP:
            self._exit, self._depth = source, max(self._depth, place + 1)
            if place == 0:
                self._num_drafting += 1
                prospect = self._prospects[index]
                self._num_entered += 1 + (prospect.num_unseen.get(source, 1) - 1) // prospect.num_rounds
            self._by_logits = self._by_logits or by_logits

    def add_runner_up(self, index: int) -> None:
        """One more row of a sequence."""
        self._num_rows += 1
        self._num_by_logits += self._prospects[index].by_logits

    @property
    def seconds(self) -> float:
        total = self._costs.pass_seconds(max(self._num_rows, self._least_rows), self._num_by_logits)
        if self._depth:
            total += self._costs.draft_seconds(
                self._exit, self._depth, self._num_drafting, self._num_entered, self._by_logits
            )
        return total


# -- costs -------------------------------------------------------------------------------------------------------------


class LiveCosts:
    """The measured table, corrected by every round.

    A correction is a factor that moves a little towards what each round shows. One, the speed, is common to all: it
    holds what slows everything, such as other work on the machine. Those of the numbers of rows move together where
    the numbers are near each other: plans differ by a few rows, and what slows one slows the other.
    """

    def __init__(self, costs: Costs, rows_per_sequence: int = 1) -> None:
        self.rows_per_sequence = rows_per_sequence
        self._costs = costs
        self._layers: list[float] = []
        """Seconds of the layers by rows, from the table; grown as needed."""
        self._head: list[float] = []
        self._speed = 1.0
        self._by_rows: list[float] = []
        """Factor by rows."""
        self._by_exit: dict[tuple[str, bool], float] = {}
        self._logits_row = 0.0
        """Seconds to choose a token by all logits, beyond those of the head."""
        self._other = 0.0
        """Seconds of a round outside of draft and pass."""
        self.planning = 0.0
        """Seconds that a plan takes, with all that is looked up for it; a pause saves them."""

    def pass_seconds(self, num_rows: int, num_by_logits: int = 0) -> float:
        """A verify pass with the choice of tokens, and the rest of the round."""
        table = self._table(num_rows)
        return self._speed * self._by_rows[num_rows - 1] * table + num_by_logits * self._logits_row + self._other

    def layers_seconds(self, num_rows: int) -> float:
        """The part of a pass that all layers take."""
        self._table(num_rows)
        return self._speed * self._by_rows[num_rows - 1] * self._layers[num_rows - 1]

    def draft_seconds(
        self, exit: str, depth: int, num_sequences: int, num_entered: int | None = None, by_logits: bool = False
    ) -> float:
        """Drafts of `depth` tokens for so many sequences, which share each step, beginning with so many tokens in all
        (None: one each)."""
        cost = self._costs.drafts[exit]
        one = self._table(1)
        begin = cost.begin * self._table(num_entered or num_sequences) / one
        steps = depth * cost.step * self._table(num_sequences) / one
        return self._speed * self._by_exit.get((exit, by_logits), 1.0) * (begin + steps)

    def marginal_row(self, num_rows: int) -> float:
        """Seconds of a row beyond so many, roughly."""
        return max(0.0, self._speed * (self._table(num_rows + 8) - self._table(num_rows)) / 8) + self._logits_row

    def learn(self, outcome: Round, drafting: Seq[Drafting]) -> None:
        """Follow what a round has taken."""
        rows = outcome.num_rows
        expected = self.layers_seconds(rows)
        step = _step(outcome.pass_seconds / expected)
        self._speed *= step
        for near, share in _spread(rows):
            if near <= len(self._by_rows):
                self._by_rows[near - 1] *= step**share
        if outcome.num_chosen_by_logits:
            beyond = max(0.0, outcome.choose_seconds - self._speed * self._head[rows - 1])
            self._logits_row += _share(self._logits_row) * (beyond / outcome.num_chosen_by_logits - self._logits_row)
        self._other += _share(self._other) * (outcome.commit_seconds - self._other)
        for draft in drafting:
            key = draft.exit, draft.by_logits
            expected = self.draft_seconds(
                draft.exit, draft.depth, draft.num_sequences, draft.num_entered, draft.by_logits
            )
            # such drafts are not in the table: the first of them says what is known
            is_known = key in self._by_exit or not draft.by_logits
            ratio = draft.seconds / max(expected, 1e-9)
            self._by_exit[key] = self._by_exit.get(key, 1.0) * (_step(ratio) if is_known else ratio)

    def learn_planning(self, seconds: float) -> None:
        """Follow what a plan has taken."""
        self.planning += _share(self.planning) * (seconds - self.planning)

    def corrected(self) -> Costs | None:
        """A better table, if the one at hand has turned out wrong by `_WRONG`; it is taken over then."""
        table = self._costs
        off = [math.log(factor) for (_, by_logits), factor in self._by_exit.items() if not by_logits]
        factors = {rows: self._by_rows[rows - 1] if rows <= len(self._by_rows) else 1.0 for rows in table.layers}
        off += [math.log(factor) for factor in factors.values()]
        if max(off) - min(min(off), 0.0) < math.log(_WRONG):
            return None
        drafts = {}
        for exit, cost in table.drafts.items():
            factor = self._by_exit.pop((exit, False), 1.0)
            drafts[exit] = DraftCost(begin=cost.begin * factor, step=cost.step * factor)
        layers = {rows: seconds * factors[rows] for rows, seconds in table.layers.items()}
        self._costs = replace(table, layers=layers, drafts=drafts)
        self._layers, self._head, self._by_rows = [], [], []
        return self._costs

    def _table(self, num_rows: int) -> float:
        for rows in range(len(self._layers) + 1, num_rows + 1):
            self._layers.append(interpolated(self._costs.layers, rows))
            self._head.append(interpolated(self._costs.head, rows))
            self._by_rows.append(self._by_rows[-1] if self._by_rows else 1.0)
        return self._layers[num_rows - 1] + self._head[num_rows - 1]


class Drafting(NamedTuple):
    """How long the drafts of an exit took: `depth` steps of `num_sequences` sequences."""

    exit: str
    depth: int
    num_sequences: int
    num_entered: int
    """Tokens that they began with, in all."""
    by_logits: bool
    """True if some of their tokens are not just the best of their step: drawn, or chosen after penalties."""
    seconds: float


def _step(ratio: float) -> float:
    """How far a factor follows one round: a little, however far off the round was."""
    return math.exp(_PACE * min(max(math.log(max(ratio, 1e-9)), -0.5), 0.5))


@cache
def _spread(num_rows: int) -> list[tuple[int, float]]:
    """The numbers of rows that are near this one, with their shares of its correction."""
    return [
        (near, math.exp(-((math.log(near / num_rows) / _NEAR) ** 2)))
        for near in range(max(1, num_rows // 2), 2 * num_rows + 1)
    ]


def _share(known: float) -> float:
    """Weight of a new observation: all of it for the first."""
    return _PACE if known else 1.0


# -- acceptance --------------------------------------------------------------------------------------------------------


def _temperature(sequence: Sequence) -> float:
    return round(sequence.params.temperature, 1)


class Acceptance:
    """How often draft tokens were accepted, over all requests.

    Tokens are told apart by source, sign and temperature; accepted means: given that those before it were.
    """

    def __init__(self, priors: Mapping[str, Seq[float]]) -> None:
        self._counts: dict[_Key, list[float]] = {}
        """Accepted, and all."""
        self._priors = {
            # of few drafts none may have been accepted, which does not say never
            source: [
                max(now / before, _MIN_SURVIVAL) for now, before in zip(shares, (1.0, *shares), strict=False) if before
            ]
            for source, shares in priors.items()
        }

    def rate(self, key: _Key) -> float:
        """Of an exit, a place that has seldom been reached is taken to be like the one before."""
        accepted, tried = self._counts.get(key, _NOTHING)
        prior, weight = self._prior(key)
        return (accepted + weight * prior) / (tried + weight)

    def record(self, key: _Key, is_accepted: bool) -> None:
        counts = self._counts.setdefault(key, [0.0, 0.0])
        keep = 1 - 1 / _MEMORY
        counts[0] = counts[0] * keep + is_accepted
        counts[1] = counts[1] * keep + 1

    def _prior(self, key: _Key) -> tuple[float, float]:
        """What is expected before anything was counted, and the draft tokens that this is worth."""
        source, sign, temperature = key
        measured_weight = _PRIOR_WEIGHT if temperature == 0 else _GUESS_WEIGHT  # what was measured was greedy
        if source == LOOKUP:
            return 1 - 1 / (1 + 0.7 * sign), measured_weight  # the longer the match, the surer
        if source.endswith(_BESIDE):
            return 0.15 / (1 + 0.7 * sign), _GUESS_WEIGHT  # second choices first, then third ones
        known = self._priors.get(source, ())
        if sign < len(known):
            return known[sign], measured_weight
        if sign:
            return self.rate((source, sign - 1, temperature)), _PRIOR_WEIGHT
        return _UNKNOWN_LAYER_SKIP if source.startswith("layer-skip") else _UNKNOWN, _GUESS_WEIGHT


class RequestAcceptance:
    """The same of one request, which starts from what the others have shown, and forgets sooner."""

    def __init__(self, others: Acceptance) -> None:
        self._others = others
        self._counts: dict[_Key, list[float]] = {}
        """Accepted, all, and the round of the last."""
        self._round = 0
        self._exit_plan: Plan | None = None
        self._exit_plan_until = 0

    def begin_round(self) -> None:
        self._round += 1

    def keep(self, plan: Plan | None) -> None:
        """Remember the best plan by exits for this request alone."""
        self._exit_plan, self._exit_plan_until = plan, self._round + _ALONE_EVERY

    def exit_plan(self, limit: int) -> Plan | None:
        """What is remembered, while it holds and drafts no more than `limit` tokens."""
        plan = self._exit_plan if self._round < self._exit_plan_until else None
        return plan if plan and plan.choices[0].num_tokens <= limit else None

    def survival(self, source: str, signs: Iterable[int], temperature: float, floor: float) -> list[float]:
        """The probabilities that the first 1, 2, .. tokens of a draft are all accepted, down to `floor`. The first is
        always there: it may be probed.

        Where an exit does better for this request than for others, it is taken to do so at the next place, too.
        """
        found: list[float] = []
        product, lift = 1.0, 1.0
        for sign in signs:
            key = source, min(sign, MAX_SIGN), temperature
            usual = self._others.rate(key)
            rate = self._rate(key, min(usual * lift, 0.98))
            if source != LOOKUP:
                lift = rate / usual
            product *= rate
            if product < floor and found:
                break
            found.append(product)
        return found

    def runner_ups(self, exit: str, number: int, temperature: float, floor: float) -> list[float]:
        """The probabilities that the first, second, .. token beside a draft is accepted, falling, down to `floor`. The
        first is always there: it may be probed."""
        found: list[float] = []
        for rank in range(number):
            key = exit + _BESIDE, rank, temperature
            rate = min([self._rate(key, self._others.rate(key)), *found[-1:]])
            if rate < floor and found:
                break
            found.append(rate)
        return found

    def _rate(self, key: _Key, prior: float) -> float:
        accepted, tried, last = self._counts.get(key, (0.0, 0.0, 0))
        fading = _FADING ** (self._round - last)
        return (accepted * fading + _PRIOR_WEIGHT * prior) / (tried * fading + _PRIOR_WEIGHT)

    def record(self, source: str, signs: Seq[int], accepted: Seq[bool], temperature: float) -> None:
        """Count the draft tokens that were looked at: those accepted, and the first that was not."""
        for sign, is_accepted in zip(signs, accepted, strict=False):
            key = source, min(sign, MAX_SIGN), temperature
            self._others.record(key, is_accepted)
            counts = self._counts.setdefault(key, [0.0, 0.0, 0])
            keep = (1 - 1 / _REQUEST_MEMORY) * _FADING ** (self._round - counts[2])
            counts[:] = counts[0] * keep + is_accepted, counts[1] * keep + 1, self._round
