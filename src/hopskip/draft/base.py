"""What a draft is, and what the engine asks of whoever makes one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from hopskip.cache import Cache, Rows
from hopskip.sequence import DraftOrigin, Sequence
from hopskip.trace import Round


@dataclass
class Draft:
    """Tokens proposed to follow one sequence; `Draft()` proposes none."""

    source: DraftOrigin = "ngram"
    token_ids: list[int] = field(default_factory=list)
    probs: list[Tensor] | None = None
    """The distribution each token was drawn from, [V]; None if it was proposed with certainty."""
    exit_states: list[Tensor] = field(default_factory=list)
    """Hidden states [D] that the draft pass left at the exit layer: those of the sequence's last token and of all draft
    tokens but the last (which was never fed back). Empty if no layers were run."""
    signs: list[int] = field(default_factory=list)
    """What tells how likely each token is to be accepted, as a small number: tokens of one source and sign are counted
    together. Of an exit the token's place in the draft, of a lookup the number of tokens before it that match."""
    label: str | None = None
    """Its source as traces and statistics of acceptance call it (`early-exit:8`), where that says more."""
    parents: list[int] | None = None
    """Of a tree of tokens: for each the index of the one that it follows, which comes before it; -1 where that is the
    sequence's last token. Of those that follow the same, each was drawn without those before it. None: a chain."""
    is_closed: bool = False
    """True once the drafter has decided to propose no more."""

    @property
    def num_chained(self) -> int:
        """Tokens of the branch that it begins with; those after it are runner-ups."""
        if self.parents is None:
            return len(self.token_ids)
        return next((i for i, parent in enumerate(self.parents) if parent != i - 1), len(self.parents))

    @property
    def name(self) -> str | None:
        """Its source as traces and statistics of acceptance call it; None without a token."""
        return (self.label or self.source) if self.token_ids else None

    def cut(self, num_tokens: int) -> Draft:
        """Its first tokens."""
        return replace(
            self,
            token_ids=self.token_ids[:num_tokens],
            probs=None if self.probs is None else self.probs[:num_tokens],
            exit_states=self.exit_states[:num_tokens],
            signs=self.signs[:num_tokens],
        )

    @property
    def depth(self) -> int:
        """Tokens of its longest branch."""
        if self.parents is None:
            return len(self.token_ids)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    def goes_on_after(self, index: int) -> bool:
        """Whether a token of the draft follows this one."""
        return index + 1 < len(self.token_ids) if self.parents is None else index in self.parents


class Drafter(Protocol):
    taps: tuple[int, ...] | None = None
    """Layers after which the drafter wants to see the hidden states of every pass, rising; empty if it wants to be told
    of passes only, None if not even that."""

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        """Told of every pass of the model, unless `taps` is None: of the rows whose tokens were committed.

        What it says of a position replaces what was said before. A slot's first pass for a new sequence starts at 0, or
        at the last token that it shares with the old.

        Args:
            states_NAD: outputs of the layers in `taps`, in that order.
        """
        return

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        """A draft of at most `limits[i]` tokens in a row to follow `sequences[i]`.

        May write keys and values of layers before the exit to `cache`, at the positions of each sequence's last token
        and after. Draws randomness from the sequences' own generators only.
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

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        assert self.taps is not None
        for drafter in self._drafters:
            if drafter.taps is not None:
                drafter.observe(rows, states_NAD[:, [self.taps.index(tap) for tap in drafter.taps]])

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
