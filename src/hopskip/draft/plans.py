"""The best plan of a round: what to draft for each sequence, by expected acceptance and cost."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from hopskip.draft.live_costs import LiveCosts
from hopskip.speculative import LOOKUP, Source


class Choice(NamedTuple):
    source: Source | None
    num_tokens: int
    num_runner_ups: int = 0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one sequence could draft. By source, the probabilities that the first 1, 2, .. tokens are all accepted."""

    survival: Mapping[Source, Seq[float]]
    runner_ups: Mapping[Source, Seq[float]] = field(default_factory=dict)
    """By exit, the probabilities that the first, second, .. token beside the draft is accepted, falling."""
    num_unseen: Mapping[Source, int] = field(default_factory=dict)
    """By exit, the tokens that a draft begins with, where that is more than one: see `ExitDrafter.num_unseen`."""
    num_rounds: int = 1
    """Rounds to come, roughly. Once read, tokens are read for all of them."""


class Plan(NamedTuple):
    choices: list[Choice]
    tokens: float
    """Expected to be committed, those of the target included."""
    seconds: float
    """Expected to pass."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def best_by_lookup(forecasts: Seq[Forecast], costs: LiveCosts) -> Plan:
    """The best plan without exits.

    Rows are handed out by what they are expected to bring. As survival never rises along a draft, taking rows in
    falling order of it takes each draft from its beginning; the best plan is the best point on the way.
    """
    return _hand_out(forecasts, [LOOKUP] * len(forecasts), costs, None)


def best_by_exits(forecasts: Seq[Forecast], costs: LiveCosts, rate: float) -> Plan | None:
    """The best plan with an exit, where time is worth `rate`: of many sequences, some may do better by lookup. None if
    there is no exit to draft from."""
    best: Plan | None = None
    exits = dict.fromkeys(source for forecast in forecasts for source in forecast.survival if source != LOOKUP)
    for exit in exits:
        sources = [exit]
        if len(forecasts) > 1:
            sources = [_better(forecast, exit, costs, rate, len(forecasts)) for forecast in forecasts]
        deepest = max((len(p.survival[exit]) for p, s in zip(forecasts, sources, strict=True) if s == exit), default=0)
        # of one sequence all depths lie on the way; of many a shallow draft for all may beat a deep one for some
        for depth in range(1, deepest + 1) if len(forecasts) > 1 else [deepest][:deepest]:
            found = _with_runner_ups(_hand_out(forecasts, sources, costs, depth), forecasts, costs)
            is_better = best is None or found.rate > best.rate
            best = found if is_better else best
            if depth > 2 and not (is_better and found.rate > rate):
                break
    return best


def priced(forecasts: Seq[Forecast], choices: Seq[Choice], costs: LiveCosts) -> Plan:
    """What these choices may be expected to bring and to cost."""
    cost = _RoundCost(forecasts, costs)
    tokens = float(len(forecasts))
    for index, choice in enumerate(choices):
        for place in range(choice.num_tokens):
            assert choice.source is not None
            cost.add(index, choice.source, place)
            tokens += forecasts[index].survival[choice.source][place]
        for rank in range(choice.num_runner_ups):
            assert choice.source is not None
            cost.add_runner_up()
            tokens += forecasts[index].runner_ups[choice.source][rank]
    return Plan(list(choices), tokens, cost.seconds)


def _with_runner_ups(plan: Plan, forecasts: Seq[Forecast], costs: LiveCosts) -> Plan:
    """The plan with as many rows for runner-ups beside its drafts as pay. They take no draft step."""
    candidates = sorted(
        (
            (accepted, index)
            for index, (forecast, choice) in enumerate(zip(forecasts, plan.choices, strict=True))
            for accepted in (forecast.runner_ups.get(choice.source, ()) if choice.source else ())
        ),
        reverse=True,
    )
    num_rows = len(forecasts) + sum(choice.num_tokens for choice in plan.choices)
    before = costs.pass_seconds(max(num_rows, len(forecasts) * costs.rows_per_sequence))
    best, tokens, numbers = plan, plan.tokens, [0] * len(forecasts)
    for accepted, index in candidates:
        num_rows += 1
        tokens += accepted
        numbers[index] += 1
        after = costs.pass_seconds(max(num_rows, len(forecasts) * costs.rows_per_sequence))
        seconds = plan.seconds - before + after
        if tokens / seconds > best.rate:
            choices = [c._replace(num_runner_ups=n) for c, n in zip(plan.choices, numbers, strict=True)]
            best = Plan(choices, tokens, seconds)
    return best


def _hand_out(forecasts: Seq[Forecast], sources: Seq[Source], costs: LiveCosts, depth: int | None) -> Plan:
    """The best plan among those that draft from these sources, exits no deeper than `depth`."""
    rows = [
        (survival, index, place)
        for index, (forecast, source) in enumerate(zip(forecasts, sources, strict=True))
        for place, survival in enumerate(forecast.survival.get(source, ())[: None if source == LOOKUP else depth])
    ]
    rows.sort(key=lambda row: -row[0])
    cost = _RoundCost(forecasts, costs)
    tokens = float(len(forecasts))
    best_count, best_tokens, best_seconds = 0, tokens, cost.seconds
    for count, (survival, index, place) in enumerate(rows, start=1):
        cost.add(index, sources[index], place)
        tokens += survival
        seconds = cost.seconds
        if tokens * best_seconds > best_tokens * seconds:
            best_count, best_tokens, best_seconds = count, tokens, seconds
    lengths = [0] * len(forecasts)
    for _, index, _ in rows[:best_count]:
        lengths[index] += 1
    choices = [Choice(s if n else None, n) for s, n in zip(sources, lengths, strict=True)]
    return Plan(choices, best_tokens, best_seconds)


def _better(forecast: Forecast, exit: Source, costs: LiveCosts, rate: float, num_rows: int) -> Source:
    """Lookup or this exit: which brings the sequence more, at the price of time."""
    lookup = forecast.survival.get(LOOKUP, ())
    if not lookup:
        return exit
    row = rate * costs.marginal_row(num_rows)
    step = row + rate * costs.draft_seconds(exit, 2, 1) - rate * costs.draft_seconds(exit, 1, 1)
    by_lookup = sum(max(0.0, survival - row) for survival in lookup)
    by_exit = sum(max(0.0, survival - step) for survival in forecast.survival.get(exit, ()))
    return exit if by_exit > by_lookup else LOOKUP


class _RoundCost:
    """The seconds of a round, as draft tokens are added to it."""

    def __init__(self, forecasts: Seq[Forecast], costs: LiveCosts) -> None:
        self._forecasts, self._costs = forecasts, costs
        self._least_rows = len(forecasts) * costs.rows_per_sequence
        self._num_rows = len(forecasts)
        self._exit, self._depth, self._num_drafting, self._num_entered = LOOKUP, 0, 0, 0

    def add(self, index: int, source: Source, place: int) -> None:
        """One more token of a sequence, the `place`-th of its draft, counted from 0."""
        self.add_runner_up()
        if source != LOOKUP:
            self._exit, self._depth = source, max(self._depth, place + 1)
            if place == 0:
                self._num_drafting += 1
                forecast = self._forecasts[index]
                self._num_entered += 1 + (forecast.num_unseen.get(source, 1) - 1) // forecast.num_rounds

    def add_runner_up(self) -> None:
        """One more row."""
        self._num_rows += 1

    @property
    def seconds(self) -> float:
        total = self._costs.pass_seconds(max(self._num_rows, self._least_rows))
        if self._depth:
            total += self._costs.draft_seconds(self._exit, self._depth, self._num_drafting, self._num_entered)
        return total
