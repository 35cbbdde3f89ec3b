"""What drafting costs, and what it may be expected to gain.

Shape letters: k draft tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

from hopskip.speculative import Source

CONTEXT = 128
"""Positions before the rows that a table of costs is of."""


@dataclass(frozen=True, kw_only=True)
class DraftCost:
    """Seconds of a greedy draft of one sequence: `begin + k * step` for k tokens."""

    begin: float
    step: float
    attention_share: float = 0.0
    """Layers that a step runs, over those of the model: its share of what a longer context costs."""


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Seconds that a pass takes for each position of a sequence's context beyond `CONTEXT`."""

    read: float = 0.0
    """To read its keys and values, once for all rows of the sequence."""
    row: float = 0.0
    """For each row to attend to it."""
    window: int | None = None
    """Positions that a row sees at most."""

    def num_beyond(self, context: int) -> int:
        """Positions of a context that count."""
        return max(0, min(context, self.window or context) - CONTEXT)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured costs, in seconds."""

    layers: Mapping[int, float]
    """All layers on one sequence, by the rows of the pass; rows rising from 1."""
    head: Mapping[int, float]
    """The best token of each row, by rows."""
    drafts: Mapping[Source, DraftCost]
    context: ContextCost = ContextCost()

    def pass_seconds(self, num_rows: int, context: int = CONTEXT) -> float:
        """A pass of any number of rows of one sequence, with the head."""
        attention = self.context.num_beyond(context) * (self.context.read + num_rows * self.context.row)
        return interpolated(self.layers, num_rows) + interpolated(self.head, num_rows) + attention

    def draft_seconds(self, source: Source, num_tokens: int, context: int = CONTEXT) -> float:
        """A draft of so many tokens."""
        cost = self.drafts[source]
        attention = self.context.num_beyond(context) * (self.context.read + self.context.row)
        return cost.begin + num_tokens * (cost.step + cost.attention_share * attention)

    def speedup(
        self, source: Source | None, survival: Seq[float], num_runner_ups: int = 0, context: int = CONTEXT
    ) -> float:
        """Expected decoding speed over plain decoding.

        Args:
            source: an exit of the table; None drafts at no cost, as lookup does.
            survival: the probabilities that the first 1, 2, .. draft tokens are all accepted; as many are drafted.
            num_runner_ups: rows beside the draft, which are taken to bring nothing.
        """
        seconds = self.pass_seconds(len(survival) + 1 + num_runner_ups, context)
        if source is not None and survival:
            seconds += self.draft_seconds(source, len(survival), context)
        return (1 + sum(survival)) * self.pass_seconds(1, context) / seconds

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        drafts = {str(source): asdict(cost) for source, cost in self.drafts.items()}
        return {
            "layers": dict(self.layers),
            "head": dict(self.head),
            "drafts": drafts,
            "context": asdict(self.context),
        }

    @classmethod
    def from_json(cls, table: Any) -> Costs:
        """A table as JSON has it, where all keys are texts.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is not one.
        """
        return cls(
            layers={int(rows): float(seconds) for rows, seconds in table["layers"].items()},
            head={int(rows): float(seconds) for rows, seconds in table["head"].items()},
            drafts={
                Source.parse(name): DraftCost(**{key: float(seconds) for key, seconds in cost.items()})
                for name, cost in table["drafts"].items()
            },
            context=ContextCost(**table.get("context", {})),  # older tables know none
        )


def interpolated(table: Mapping[int, float], num_rows: int) -> float:
    """Between two rows of a table by a straight line, beyond the last on the line of the last two.

    >>> interpolated({1: 10.0, 5: 14.0}, 3), interpolated({1: 10.0, 5: 14.0}, 9)
    (12.0, 18.0)
    """
    if num_rows in table:
        return table[num_rows]
    rows = sorted(table)
    above = next((i for i, known in enumerate(rows) if known > num_rows), len(rows) - 1)
    low, high = rows[above - 1], rows[above]
    slope = (table[high] - table[low]) / (high - low)
    # noise may make the last two fall; more rows never cost less than the last
    return (
        table[low] + slope * (num_rows - low) if num_rows < high else table[high] + max(0.0, slope) * (num_rows - high)
    )


def expected_tokens(acceptance: float, num_draft_tokens: int) -> float:
    """Tokens that a round yields, tau, if each draft token is accepted with this probability; the last one counted.

    >>> expected_tokens(0.5, 2)
    1.75
    """
    return sum(acceptance**i for i in range(num_draft_tokens + 1))


def expected_speedup(acceptance: float, num_draft_tokens: int, step_cost: float) -> float:
    """Decoding speed over plain decoding, S = tau / (1 + k c); 1 for no draft.

    Args:
        step_cost: of a draft step over a full pass, c.
    """
    return expected_tokens(acceptance, num_draft_tokens) / (1 + num_draft_tokens * step_cost)
