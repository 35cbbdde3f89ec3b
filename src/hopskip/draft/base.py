"""What a draft is, what the engine asks of whoever makes one, and what it tells them of each round."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from hopskip.backends.rows import Array, Cache, Rows
from hopskip.draft.costs import Costs
from hopskip.sequence import Sequence
from hopskip.speculative import LOOKUP, Source


@dataclass
class Draft:
    """Tokens proposed to follow one sequence; `Draft()` proposes none."""

    source: Source = LOOKUP
    token_ids: list[int] = field(default_factory=list)
    exit_states: Array | None = None
    """Hidden states [k, D] that the draft pass left at the exit layer: those of the sequence's last token and of all
    draft tokens but the last (which was never fed back). None if no layers were run."""
    buckets: list[int] = field(default_factory=list)
    """Tokens of one source and bucket are counted together when it is learnt how often they are accepted. Of an exit it
    is the token's place in the draft, of a lookup the number of tokens before it that match."""
    parents: list[int] | None = None
    """Of a tree of tokens: for each the index of the one that it follows, which comes before it; -1 where that is the
    sequence's last token. None: a chain."""

    @property
    def num_chained(self) -> int:
        """Tokens of the path that it begins with; those after it are runner-ups."""
        if self.parents is None:
            return len(self.token_ids)
        return next((i for i, parent in enumerate(self.parents) if parent != i - 1), len(self.parents))

    @property
    def num_runner_ups(self) -> int:
        return len(self.token_ids) - self.num_chained

    def cut(self, num_tokens: int) -> Draft:
        """The first tokens of its chain, and what is beside them or follows the last."""
        kept = [i for i in range(len(self.token_ids)) if i < num_tokens or self._is_beside(i, num_tokens)]
        return replace(
            self,
            token_ids=[self.token_ids[i] for i in kept],
            exit_states=None if self.exit_states is None else self.exit_states[:num_tokens],
            buckets=self.buckets[:num_tokens],
            parents=None if self.parents is None else [self.parents[i] for i in kept],
        )

    def _is_beside(self, index: int, num_tokens: int) -> bool:
        return self.parents is not None and index >= self.num_chained and self.parents[index] < num_tokens

    @property
    def depth(self) -> int:
        """Tokens of its longest path."""
        if self.parents is None:
            return len(self.token_ids)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    def goes_on_after(self, index: int) -> bool:
        """Whether a token of the draft follows this one."""
        return index + 1 < len(self.token_ids) if self.parents is None else index in self.parents


@dataclass(frozen=True, kw_only=True)
class RoundOfSequence:
    """One sequence's part in a round."""

    request: int
    """Number of the request, counted from 0 in the order in which they came."""
    position: int
    """Tokens that it had generated before the round."""
    source: str | None
    """Who drafted: `exit-branch`, `early-exit:8`, `ngram`; None without a draft."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_committed: int
    """Accepted tokens and the one of the target; fewer where the text ended before."""
    num_runner_ups: int = 0
    """How many of the draft tokens were second choices beside the draft."""
    runner_up: int | None = None
    """Which of them was accepted, counted from 0; None if none was."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of the engine: a draft, the pass that verified it, and what was committed. Times in seconds."""

    draft_seconds: float
    pass_seconds: float
    """All layers on all rows."""
    choose_seconds: float
    """The head, and the choice of tokens."""
    commit_seconds: float
    num_rows: int
    """Rows of the verify pass: each sequence's last token and its draft tokens, and any rows of padding."""
    num_chosen_by_logits: int
    """Rows that needed all logits to choose a token (sampling, penalties, a grammar), not just the best."""
    sequences: tuple[RoundOfSequence, ...]
    """Empty where nobody was drafted for, and the drafter alone is told of the round."""

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.pass_seconds + self.choose_seconds + self.commit_seconds

    @property
    def num_committed(self) -> int:
        return sum(part.num_committed for part in self.sequences)


class Drafter(Protocol):
    taps: tuple[int, ...] | None = None
    """Layers after which the drafter wants to see the hidden states of every pass, rising; empty if it wants to be told
    of passes only, None if not even that."""
    costs: Costs | None = None
    """Of the model, where they were measured: by them is estimated what the drafts gain."""

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        """Told of every pass of the model, unless `taps` is None: of the rows whose tokens were committed.

        What it says of a position replaces what was said before. A slot's first pass for a new sequence starts at 0, or
        at the last token that it shares with the old.

        Args:
            features_NAD: outputs of the layers in `taps`, in that order.
        """
        return

    def copy(self, source: int, target: int, length: int) -> None:
        """Told that the first `length` positions of a slot have been copied to another, those of a drafter's own keys
        and values too, unless `taps` is None. The pass that follows in `target` starts at the last of them, or after.
        """
        return

    def pauses(self) -> bool:
        """Asked before each round: whether it proposes nothing in it, for whomever. `propose` is not called then."""
        return False

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        """A draft of at most `limits[i]` tokens in a row to follow `sequences[i]`.

        May write keys and values of layers before the exit to `cache`, at the positions of each sequence's last token
        and after.
        """
        ...

    def learn(self, sequences: Seq[Sequence], outcome: Round) -> None:
        """Told of every round that it drafted for, once its tokens are committed."""
        return


class FirstOf(Drafter):
    """Several drafters in order of preference: a sequence takes the draft of the first that has one for it."""

    def __init__(self, *drafters: Drafter) -> None:
        self._drafters = drafters
        watching = [drafter.taps for drafter in drafters if drafter.taps is not None]
        self.taps = tuple(sorted({tap for taps in watching for tap in taps})) if watching else None

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        assert self.taps is not None
        for drafter in self._drafters:
            if drafter.taps == self.taps:
                drafter.observe(rows, features_NAD)
            elif drafter.taps is not None:
                drafter.observe(rows, features_NAD[:, [self.taps.index(tap) for tap in drafter.taps]])

    def copy(self, source: int, target: int, length: int) -> None:
        for drafter in self._drafters:
            drafter.copy(source, target, length)

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = self._drafters[0].propose(sequences, limits, cache)
        for drafter in self._drafters[1:]:
            missing = [i for i, draft in enumerate(drafts) if not draft.token_ids]
            if not missing:
                break
            proposed = drafter.propose([sequences[i] for i in missing], [limits[i] for i in missing], cache)
            for i, draft in zip(missing, proposed, strict=True):
                drafts[i] = draft
        return drafts
