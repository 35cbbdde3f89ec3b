"""What rounds cost: the measured table, corrected by every round."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from hopskip.draft.base import Round
from hopskip.draft.costs import Costs, interpolated
from hopskip.speculative import Source

_WRONG = 1.5
"""A table is wrong if its entries are off by this factor against each other."""


class DraftTiming(NamedTuple):
    """How long the drafts of an exit took: `depth` steps of `num_sequences` sequences."""

    exit: Source
    depth: int
    num_sequences: int
    num_entered: int
    """Tokens that they began with, in all."""
    seconds: float


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
        self._by_exit: dict[Source, float] = {}
        self._num_beyond, self._num_sequences = 0, 1
        """Of the contexts at hand: positions beyond those that the table is of."""
        self._other = 0.0
        """Seconds of a round outside of draft and pass."""
        self.planning = 0.0
        """Seconds that a plan takes, with all that is looked up for it; a pause saves them."""

    def look_at(self, contexts: Seq[int]) -> None:
        """What is asked from now on is about sequences with so many positions each."""
        self._num_beyond = sum(map(self._costs.context.num_beyond, contexts))
        self._num_sequences = len(contexts)

    def pass_seconds(self, num_rows: int) -> float:
        """A verify pass with the choice of tokens, and the rest of the round."""
        table = self._table(num_rows) + self._attention(num_rows)
        return self._speed * self._by_rows[num_rows - 1] * table + self._other

    def layers_seconds(self, num_rows: int) -> float:
        """The part of a pass that all layers take."""
        self._table(num_rows)
        return self._speed * self._by_rows[num_rows - 1] * (self._layers[num_rows - 1] + self._attention(num_rows))

    def draft_seconds(self, exit: Source, depth: int, num_sequences: int, num_entered: int | None = None) -> float:
        """Drafts of `depth` tokens for so many sequences, which share each step, beginning with so many tokens in all
        (None: one each)."""
        cost = self._costs.drafts[exit]
        one = self._table(1)
        begin = cost.begin * self._table(num_entered or num_sequences) / one
        steps = depth * cost.step * self._table(num_sequences) / one
        steps += (
            depth * cost.attention_share * self._attention(self._num_sequences) * num_sequences / self._num_sequences
        )
        return self._speed * self._by_exit.get(exit, 1.0) * (begin + steps)

    def marginal_row(self, num_rows: int) -> float:
        """Seconds of a row beyond so many, roughly."""
        more = self._table(num_rows + 8) + self._attention(num_rows + 8)
        return max(0.0, self._speed * (more - self._table(num_rows) - self._attention(num_rows)) / 8)

    def learn(self, outcome: Round, drafts: Seq[DraftTiming]) -> None:
        """Follow what a round has taken."""
        rows = outcome.num_rows
        expected = self.layers_seconds(rows)
        step = _step(outcome.pass_seconds / expected)
        self._speed *= step
        for near, share in _spread(rows):
            if near <= len(self._by_rows):
                self._by_rows[near - 1] *= step**share
        self._other += _share(self._other) * (outcome.commit_seconds - self._other)
        for draft in drafts:
            expected = self.draft_seconds(draft.exit, draft.depth, draft.num_sequences, draft.num_entered)
            self._by_exit[draft.exit] = self._by_exit.get(draft.exit, 1.0) * _step(draft.seconds / max(expected, 1e-9))

    def learn_planning(self, seconds: float) -> None:
        """Follow what a plan has taken."""
        self.planning += _share(self.planning) * (seconds - self.planning)

    def corrected(self) -> Costs | None:
        """A better table, if the one at hand has turned out wrong by `_WRONG`; it is taken over then."""
        table = self._costs
        off = [math.log(factor) for factor in self._by_exit.values()]
        factors = {rows: self._by_rows[rows - 1] if rows <= len(self._by_rows) else 1.0 for rows in table.layers}
        off += [math.log(factor) for factor in factors.values()]
        if max(off) - min(min(off), 0.0) < math.log(_WRONG):
            return None
        corrected = {}
        for exit, cost in table.drafts.items():
            factor = self._by_exit.pop(exit, 1.0)
            corrected[exit] = replace(cost, begin=cost.begin * factor, step=cost.step * factor)
        layers = {rows: seconds * factors[rows] for rows, seconds in table.layers.items()}
        self._costs = replace(table, layers=layers, drafts=corrected)
        self._layers, self._head, self._by_rows = [], [], []
        return self._costs

    def _attention(self, num_rows: int) -> float:
        """Seconds for what the contexts at hand are longer than the table's, the rows shared out evenly."""
        context = self._costs.context
        return self._num_beyond * (context.read + context.row * num_rows / self._num_sequences)

    def _table(self, num_rows: int) -> float:
        for rows in range(len(self._layers) + 1, num_rows + 1):
            self._layers.append(interpolated(self._costs.layers, rows))
            self._head.append(interpolated(self._costs.head, rows))
            self._by_rows.append(self._by_rows[-1] if self._by_rows else 1.0)
        return self._layers[num_rows - 1] + self._head[num_rows - 1]


_PACE = 0.05
"""Weight of one round in what follows the rounds."""
_NEAR = 0.4
"""Numbers of rows with logarithms this far apart still share a third of a correction."""


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
