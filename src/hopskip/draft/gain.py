"""What drafting gains over plain decoding: an estimate, from the costs that were measured of the model.

Of each answer is known what it has taken, not what it would have taken without drafts. The table of costs says how a
pass of one row relates to the passes that were run; how fast the machine has been meanwhile, these passes show
themselves. So the estimate holds on a busy machine too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from hopskip.draft.base import Round
from hopskip.draft.costs import Costs, interpolated
from hopskip.sequence import Sequence

_MOST_UNDRAFTED = 16
"""Rounds that are put off, so that nobody's estimate is older."""


@dataclass(slots=True)
class _Tally:
    """Seconds of one text's rounds. By the table, and as they were measured."""

    measured: float = 0.0
    layers: float = 0.0
    layers_by_table: float = 0.0
    head: float = 0.0
    head_by_table: float = 0.0
    plain_layers_by_table: float = 0.0
    """Of plain decoding, for the tokens that these rounds have committed."""
    plain_head_by_table: float = 0.0
    plain_rest: float = 0.0

    @property
    def plain(self) -> float:
        """Seconds that plain decoding would have taken, roughly."""
        layers = self.plain_layers_by_table * self.layers / self.layers_by_table
        return layers + self.plain_head_by_table * self.head / self.head_by_table + self.plain_rest

    def add(self, other: _Tally, num_committed: float = 1.0) -> None:
        """Rounds that have committed so many tokens; `other` has the plain seconds of one."""
        self.measured += other.measured
        self.layers += other.layers
        self.layers_by_table += other.layers_by_table
        self.head += other.head
        self.head_by_table += other.head_by_table
        self.plain_layers_by_table += num_committed * other.plain_layers_by_table
        self.plain_head_by_table += num_committed * other.plain_head_by_table
        self.plain_rest += num_committed * other.plain_rest


class GainEstimate:
    """Keeps `stats.speedup_over_plain` of every sequence: of each drafted round at once, of others after a few."""

    def __init__(self, costs: Costs) -> None:
        self._tallies: WeakKeyDictionary[Sequence, _Tally] = WeakKeyDictionary()
        self._all = _Tally()
        self._together: list[Sequence] = []
        self._undrafted: list[Round] = []
        """Of these together, in which nothing was drafted: to count each of them would take longer than all else that
        such a round asks of Python."""
        self._num_tokens = 0
        self.costs = costs

    @property
    def num_tokens(self) -> int:
        """Committed by all rounds so far."""
        self._settle()
        return self._num_tokens

    @property
    def speedup(self) -> float:
        """Of all rounds so far; 1 before the first."""
        self._settle()
        return self._all.plain / self._all.measured if self._all.measured else 1.0

    def count(self, sequences: Seq[Sequence], outcome: Round) -> None:
        """Add a round, once its tokens are committed."""
        if outcome.sequences:
            self._settle()
            self._add(sequences, [outcome], [part.num_committed for part in outcome.sequences])
            return
        if sequences != self._together:
            self._settle()
            self._together = list(sequences)
        self._undrafted.append(outcome)
        if len(self._undrafted) == _MOST_UNDRAFTED or any(sequence.is_finished for sequence in sequences):
            self._settle()

    def _settle(self) -> None:
        """Count the rounds that were put off."""
        if self._undrafted:
            self._add(self._together, self._undrafted, [len(self._undrafted)] * len(self._together))
            self._together, self._undrafted = [], []

    def _add(self, sequences: Seq[Sequence], rounds: Seq[Round], counts: Seq[int]) -> None:
        """Add rounds of one number of rows, in which each sequence has got so many tokens."""
        tally = self._tally(sequences, rounds, counts)
        num_tokens = sum(counts)
        self._num_tokens += num_tokens
        self._all.add(tally, num_tokens / len(sequences))
        for sequence, num_committed in zip(sequences, counts, strict=True):
            own = self._tallies.setdefault(sequence, _Tally())
            own.add(tally, num_committed)
            sequence.stats.speedup_over_plain = own.plain / own.measured

    def _tally(self, sequences: Seq[Sequence], rounds: Seq[Round], counts: Seq[int]) -> _Tally:
        """Of all these rounds; the plain seconds are those of one token for each sequence."""
        costs, context = self.costs, self.costs.context
        companions, num_rounds = len(sequences), len(rounds)
        drafted = [part.num_draft_tokens for part in rounds[0].sequences] or [0] * companions
        # in the first of them
        beyond = [context.num_beyond(s.num_cached - count) for s, count in zip(sequences, counts, strict=True)]
        attention = sum(
            each * (context.read + context.row * (num_drafted + 1))
            for each, num_drafted in zip(beyond, drafted, strict=True)
        )
        num_rows = rounds[0].num_rows
        return _Tally(
            measured=sum(each.seconds for each in rounds),
            layers=sum(each.pass_seconds for each in rounds),
            layers_by_table=num_rounds * (interpolated(costs.layers, num_rows) + attention),
            head=sum(each.choose_seconds for each in rounds),
            head_by_table=num_rounds * interpolated(costs.head, num_rows),
            plain_layers_by_table=interpolated(costs.layers, companions) + sum(beyond) * (context.read + context.row),
            plain_head_by_table=interpolated(costs.head, companions),
            plain_rest=sum(each.commit_seconds for each in rounds) / num_rounds,
        )
