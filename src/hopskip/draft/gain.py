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


@dataclass
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


class GainEstimate:
    """Keeps `stats.speedup_over_plain` of every sequence."""

    def __init__(self, costs: Costs) -> None:
        self._tallies: WeakKeyDictionary[Sequence, _Tally] = WeakKeyDictionary()
        self._all = _Tally()
        self.num_tokens = 0
        """Committed by all rounds so far."""
        self.costs = costs

    @property
    def speedup(self) -> float:
        """Of all rounds so far; 1 before the first."""
        return self._all.plain / self._all.measured if self._all.measured else 1.0

    def count(self, sequences: Seq[Sequence], outcome: Round) -> None:
        """Add a round, once its tokens are committed."""
        costs, context = self.costs, self.costs.context
        companions = len(sequences)
        parts = outcome.sequences  # none where nothing was drafted: then each has brought one token
        counts = [part.num_committed for part in parts] or [1] * companions
        drafted = [part.num_draft_tokens for part in parts] or [0] * companions
        beyond = [context.num_beyond(s.num_cached - count) for s, count in zip(sequences, counts, strict=True)]
        rows = outcome.num_rows
        attention = sum(
            each * (context.read + context.row * (num_drafted + 1))
            for each, num_drafted in zip(beyond, drafted, strict=True)
        )
        layers = interpolated(costs.layers, rows) + attention
        plain_layers = interpolated(costs.layers, companions) + sum(beyond) * (context.read + context.row)
        head, plain_head = interpolated(costs.head, rows), interpolated(costs.head, companions)
        self.num_tokens += sum(counts)
        tallies = [self._of(sequence) for sequence in sequences]
        for tally, num_committed in zip([*tallies, self._all], [*counts, sum(counts) / companions], strict=True):
            tally.measured += outcome.seconds
            tally.layers += outcome.pass_seconds
            tally.layers_by_table += layers
            tally.head += outcome.choose_seconds
            tally.head_by_table += head
            tally.plain_layers_by_table += num_committed * plain_layers
            tally.plain_head_by_table += num_committed * plain_head
            tally.plain_rest += num_committed * outcome.commit_seconds
        for sequence, tally in zip(sequences, tallies, strict=True):
            sequence.stats.speedup_over_plain = tally.plain / tally.measured

    def _of(self, sequence: Sequence) -> _Tally:
        return self._tallies.setdefault(sequence, _Tally())
