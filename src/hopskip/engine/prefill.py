"""Reading prompts, a part of a pass at a time, so that nobody waits long for somebody else's prompt.

A pass over prompts may rest between two layers: rounds of those that decode, or the whole pass of a short prompt that
has come meanwhile, go first. That costs nothing, since all of its rows go through each layer together as before, and
changes no bit.

Shape letters: N rows, A features, D hidden size.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from hopskip.backends.base import Backend, Pass
from hopskip.backends.rows import Array, Rows, Segment
from hopskip.draft.base import Draft
from hopskip.engine.choose import choose
from hopskip.engine.round import Rounds
from hopskip.engine.scores import ROWS_WITH_SCORES, score_prompts
from hopskip.engine.slots import Slots
from hopskip.sequence import Sequence

_ROWS_BESIDE_DECODING = 128
"""Most prompt tokens in a pass while other sequences decode."""
_SECONDS_ALONE = 0.06
"""Of a step in which nobody decodes: so long a newcomer waits."""
_ROUNDS_PER_STEP = 3
"""Time for prompts between two rounds of those that decode, in rounds."""
_LEAST_SECONDS = 0.015
_LEAST_ROWS = 16
"""Fewer in a pass cost too much a row."""
_OLDEST_EVERY = 4
"""Every so many steps go to whose prompt has waited longest, the others to whose ends soonest."""


@dataclass
class _PromptPass:
    """A pass over parts of prompts, on its way through the layers."""

    parts: list[tuple[Sequence, Segment]]
    token_ids: list[int]
    hidden_ND: Array | None = None
    """What has come out of the last layer so far."""
    next_layer: int = 0
    features: list[Array] = field(default_factory=list)
    """Of each part of the way, [N, A, D]."""

    @property
    def rows(self) -> Rows:
        return Rows(segment for _, segment in self.parts)

    @property
    def end(self) -> int:
        """The farthest position."""
        return max(segment.start + segment.count for _, segment in self.parts)

    def keep(self, sequences: Seq[Sequence]) -> bool:
        """Drop the rows of sequences that have left; others may have their slots. Returns whether any are left."""
        if all(sequence in sequences for sequence, _ in self.parts):
            return True
        kept: list[int] = []
        first = 0
        for sequence, segment in self.parts:
            if sequence in sequences:
                kept += range(first, first + segment.count)
            first += segment.count
        self.parts = [part for part in self.parts if part[0] in sequences]
        self.token_ids = [self.token_ids[row] for row in kept]
        if self.hidden_ND is not None and kept:
            self.hidden_ND = self.hidden_ND[kept]
            self.features = [features_NAD[kept] for features_NAD in self.features]
        return bool(kept)


class Pace:
    """How long prompt tokens take, by how far into their prompt they are, and rounds: the least of what was measured
    lately, since what else a machine does only ever adds to it."""

    def __init__(self) -> None:
        self._per_row: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=3))
        """By the number of bits of the position."""
        self._rounds: deque[float] = deque(maxlen=8)

    def learn_round(self, seconds: float) -> None:
        self._rounds.append(seconds)

    def learn_rows(self, num_rows: int, end: int, seconds: float) -> None:
        """A whole pass over so many rows would take so long."""
        if num_rows >= _LEAST_ROWS:  # a few rows take as long as one
            self._per_row[end.bit_length()].append(seconds / num_rows)

    def row_seconds(self, end: int) -> float | None:
        """Of a prompt token at this position; None as long as nothing is known."""
        known = [size for size, measured in self._per_row.items() if measured]
        if not known:
            return None
        size = end.bit_length()
        return min(self._per_row[min(known, key=lambda other: (abs(other - size), other))])

    def budget(self, *, beside_decoding: bool) -> float:
        """Seconds for prompts in one step."""
        if not beside_decoding or not self._rounds:
            return _SECONDS_ALONE
        return min(max(_ROUNDS_PER_STEP * min(self._rounds), _LEAST_SECONDS), _SECONDS_ALONE)


class Prefill:
    """Reads the prompts of all sequences that have not begun to decode."""

    def __init__(self, backend: Backend, rounds: Rounds, slots: Slots) -> None:
        self._backend, self._rounds, self._slots = backend, rounds, slots
        self._resting: list[_PromptPass] = []
        self._num_steps = 0
        self.pace = Pace()

    def forget(self) -> None:
        """Give up the passes that rest; their prompts go on from where they were before."""
        self._resting = []

    def step(self, sequences: Seq[Sequence], *, beside_decoding: bool) -> None:
        """Go on with one pass for as long as a step may take, and give those their first token whose prompts end.

        If it raises, no sequence has gained or lost a token by it.
        """
        self._resting = [resting for resting in self._resting if resting.keep(sequences)]
        ready = [s for s in sequences if not self._slots.waits(s)]
        if not ready:
            return
        self._num_steps += 1
        if self._num_steps % _OLDEST_EVERY:
            chosen = min(ready, key=lambda s: (self._num_left(s), s.number))
        else:
            chosen = min(ready, key=lambda s: s.number)
        budget = self.pace.budget(beside_decoding=beside_decoding)
        going = next((p for p in self._resting if any(s is chosen for s, _ in p.parts)), None)
        if going is None:
            going = self._begin(chosen, ready, budget, beside_decoding=beside_decoding)
        else:
            self._resting.remove(going)  # if it fails it is not taken up again
        found = self._go_on(going, budget)
        if found is None:
            self._resting.append(going)
        else:
            self._finish(going, found)

    def _num_left(self, sequence: Sequence) -> int:
        """Prompt tokens up to where this prompt, or the part of it that another waits for, ends."""
        return self._slots.next_stop(sequence) - sequence.num_cached

    def _begin(
        self, chosen: Sequence, ready: Iterable[Sequence], budget: float, *, beside_decoding: bool
    ) -> _PromptPass:
        """A pass over the next part of a prompt, and what else is short enough not to hold it up."""
        most = self._backend.num_prefill_rows
        if beside_decoding:
            most = min(most, _ROWS_BESIDE_DECODING)
        if any(s.params.prompt_logprobs is not None for s in ready):
            most = min(most, ROWS_WITH_SCORES)
        row_seconds = self.pace.row_seconds(self._slots.next_stop(chosen))
        at_once = most
        if row_seconds:
            # so few rows that all layers keep within the budget; or that one does, whoever begins to decode meanwhile
            of_layer = self.pace.budget(beside_decoding=True)
            depth = self._backend.config.num_hidden_layers
            at_once = min(most, int(budget / row_seconds))
            most = max(_LEAST_ROWS, min(most, int(of_layer * depth / row_seconds)))
        num_left = min(most, max(at_once, self._num_left(chosen)))
        busy = {id(sequence) for resting in self._resting for sequence, _ in resting.parts}
        others = [s for s in ready if s is not chosen and id(s) not in busy]
        parts: list[tuple[Sequence, Segment]] = []
        token_ids: list[int] = []
        now = time.perf_counter()
        for sequence in [chosen, *sorted(others, key=self._num_left)]:
            count = min(num_left, self._num_left(sequence))
            if count <= 0:
                break
            sequence.prefill_started = sequence.prefill_started or now
            start = sequence.num_cached
            parts.append((sequence, Segment(sequence.slot, start, count)))
            token_ids += sequence.token_ids[start : start + count]
            num_left -= count
        return _PromptPass(parts, token_ids)

    def _go_on(self, going: _PromptPass, budget: float) -> Pass | None:
        """Run layers for as long as the budget lasts, at least one. Returns what comes out of the last of them."""
        backend, rows = self._backend, going.rows
        depth, taps = backend.config.num_hidden_layers, self._rounds.taps
        row_seconds = self.pace.row_seconds(going.end)
        first, last = going.next_layer, depth
        if row_seconds:
            per_layer = row_seconds * len(rows) / depth
            last = min(depth, first + max(1, int(budget / per_layer)))
        started = time.perf_counter()
        hidden_ND = backend.embed(going.token_ids) if going.hidden_ND is None else going.hidden_ND
        own_taps = tuple(tap for tap in taps if first < tap <= last)
        found = backend.run_layers(hidden_ND, first, last, rows, self._slots.cache, own_taps)
        backend.synchronize()
        seconds = time.perf_counter() - started
        self.pace.learn_rows(len(rows), going.end, seconds * depth / (last - first))
        going.hidden_ND, going.next_layer = found.hidden_ND, last
        if found.features_NAD is not None:
            going.features.append(found.features_NAD)
        if last < depth:
            return None
        features = going.features
        joined = backend.xp.concat(features, axis=1) if len(features) > 1 else next(iter(features), None)
        return Pass(found.hidden_ND, joined)

    def _finish(self, done: _PromptPass, found: Pass) -> None:
        """Those whose prompt ends get their first token."""
        rows = done.rows
        self._rounds.observe(rows, found)
        completed: list[Sequence] = []
        last_rows: list[int] = []
        for (sequence, segment), last in zip(done.parts, rows.last_rows, strict=True):
            if segment.start + segment.count == sequence.num_prompt_tokens:
                completed.append(sequence)
                last_rows.append(last)
        scores = score_prompts(self._backend, done.parts, found.hidden_ND)
        choices = choose(self._backend, completed, [Draft()] * len(completed), found.hidden_ND[last_rows])
        for sequence, segment in done.parts:
            sequence.num_cached += segment.count
            sequence.prompt_scores += scores.get(sequence, [])
        for sequence, (_, tokens) in zip(completed, choices, strict=True):
            if not tokens:
                continue  # it has failed
            if sequence.params.max_new_tokens:
                sequence.append(tokens[0])
            else:
                sequence.finish_reason = "length"  # its prompt was all that was to be read
            sequence.first_token_at = time.perf_counter()
            sequence.stats.prefill_seconds = sequence.first_token_at - sequence.prefill_started
            sequence.stats.num_tokens = len(sequence.tokens)
