"""A round: draft for every sequence, verify all drafts in one pass, commit what stands.

Shape letters: N rows, A features, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from hopskip.backends.base import Backend, Pass
from hopskip.backends.rows import Array, Rows, Segment
from hopskip.draft.base import Draft, Drafter, Round, RoundOfSequence
from hopskip.draft.gain import GainEstimate
from hopskip.engine.choose import Choice, choose
from hopskip.engine.slots import Slots
from hopskip.sequence import Sequence
from hopskip.speculative import SpeculativeConfig


@dataclass
class _Progress:
    """What a round has come to; each step adds to it."""

    sequences: list[Sequence]
    drafts: list[Draft] = field(default_factory=list)
    rows: Rows = field(default_factory=lambda: Rows(()))
    """Of the verify pass, padding included."""
    choices: list[Choice] = field(default_factory=list)
    num_committed: list[int] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [time.perf_counter()])
    """The start, and the end of each step: draft, pass, choice, commit."""

    def tick(self) -> None:
        self.clock.append(time.perf_counter())


class Rounds:
    """Runs rounds.

    Args:
        speculative: as it was resolved.
        drafter_at: gives the drafter of requests that ask for an exit layer of their own.
        rows_per_sequence: least rows of a verify pass per sequence; see `Engine`.
    """

    def __init__(
        self,
        backend: Backend,
        speculative: SpeculativeConfig,
        drafter: Drafter | None,
        slots: Slots,
        *,
        drafter_at: Callable[[int], Drafter],
        rows_per_sequence: int,
    ) -> None:
        self._backend = backend
        self._speculative = speculative
        self._drafter = drafter
        self._drafter_at = drafter_at
        self._slots = slots
        self._rows_per_sequence = rows_per_sequence
        self.taps = () if drafter is None or drafter.taps is None else drafter.taps
        """Layers whose outputs the drafter wants to see of every pass."""
        self.gain = None if drafter is None or drafter.costs is None else GainEstimate(drafter.costs)

    def run(self, sequences: list[Sequence], wants_record: bool) -> Round | None:
        """One round. Returns what happened in it, if the caller or the drafter wants to know.

        If it raises, no sequence has gained or lost a token.
        """
        progress = _Progress(sequences)
        progress.drafts = self._draft(sequences)
        progress.tick()
        found = self._verify_pass(progress)
        self._backend.synchronize()  # the pass is not to be counted as the choice
        progress.tick()
        progress.choices = choose(self._backend, sequences, progress.drafts, found.hidden_ND)
        self._keep(progress, self._watched(found))
        progress.tick()
        self._commit(progress)
        progress.tick()
        if self._drafter is None and not wants_record:
            return None
        record = _record(progress, wants_record or any(draft.token_ids for draft in progress.drafts))
        if self._drafter is not None:
            self._drafter.learn(sequences, record)
        if self.gain is not None:
            self.gain.count(sequences, record)
        return record

    def observe(self, rows: Rows, found: Pass) -> None:
        """Show the drafter a pass over tokens that are to stay, such as a prompt's."""
        self._observe(rows, self._watched(found))

    def _draft(self, sequences: list[Sequence]) -> list[Draft]:
        if self._drafter is None or self._drafter.pauses():
            return [Draft()] * len(sequences)
        num_draft_tokens = self._speculative.num_draft_tokens or 0
        by_exit: dict[int | None, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_exit.setdefault(sequence.request.exit_layer, []).append(index)
        drafts = [Draft()] * len(sequences)
        for exit_layer, members in by_exit.items():
            drafter = self._drafter if exit_layer is None else self._drafter_at(exit_layer)
            own = [sequences[i] for i in members]
            # the verify pass itself yields one token, so a sequence never needs a draft of all it has left
            asked = [s.request.max_draft_tokens for s in own]
            most = [num_draft_tokens if asked_for is None else asked_for for asked_for in asked]
            limits = [min(limit, s.num_tokens_left - 1) for s, limit in zip(own, most, strict=True)]
            for index, draft in zip(members, drafter.propose(own, limits, self._slots.cache), strict=True):
                drafts[index] = _cut(sequences[index], draft)
        return drafts

    def _verify_pass(self, progress: _Progress) -> Pass:
        """States of each sequence's last token and its draft tokens, N = sum of (draft length + 1), without padding."""
        if self._speculative.verify == "reuse":
            return self._reuse_pass(progress)
        segments: list[Segment] = []
        ids: list[int] = []
        kept: list[int] = []
        for sequence, draft in zip(progress.sequences, progress.drafts, strict=True):
            own = [sequence.token_ids[-1], *draft.token_ids]
            kept.extend(range(len(ids), len(ids) + len(own)))
            num_padding = max(0, self._rows_per_sequence - len(own))
            ids.extend(own + own[-1:] * num_padding)
            parents = None
            if draft.parents is not None:
                parents = (-1, *(parent + 1 for parent in draft.parents), *([0] * num_padding))
            segments.append(Segment(sequence.slot, sequence.num_cached, len(own) + num_padding, parents))
        progress.rows = Rows(segments)
        found = self._backend.forward(ids, progress.rows, self._slots.cache, self.taps)
        if len(kept) == len(ids):
            return found
        features_NAD = None if found.features_NAD is None else found.features_NAD[kept]
        return Pass(found.hidden_ND[kept], features_NAD)

    def _reuse_pass(self, progress: _Progress) -> Pass:
        """Verify from the exit layer on: rows that the draft has already taken there go on from its hidden states."""
        backend, cache, exit_layer = self._backend, self._slots.cache, self._speculative.exit_layer or 0
        missing_ids: list[int] = []
        missing: list[Segment] = []
        for sequence, draft in zip(progress.sequences, progress.drafts, strict=True):
            ids = [sequence.token_ids[-1], *draft.token_ids]
            num_done = 0 if draft.exit_states is None else len(draft.exit_states)
            missing_ids.extend(ids[num_done:])
            missing.append(Segment(sequence.slot, sequence.num_cached + num_done, len(ids) - num_done))
        computed_ND = backend.run_layers(backend.embed(missing_ids), 0, exit_layer, Rows(missing), cache).hidden_ND
        parts: list[Array] = []
        first = 0
        for draft, segment in zip(progress.drafts, missing, strict=True):
            rest_ND = computed_ND[first : first + segment.count]
            parts += [rest_ND] if draft.exit_states is None else [draft.exit_states, rest_ND]
            first += segment.count
        progress.rows = Rows(
            Segment(s.slot, s.num_cached, len(d.token_ids) + 1)
            for s, d in zip(progress.sequences, progress.drafts, strict=True)
        )
        depth = backend.config.num_hidden_layers
        return backend.run_layers(backend.xp.concat(parts), exit_layer, depth, progress.rows, cache, self.taps)

    def _keep(self, progress: _Progress, features_NAD: Array | None) -> None:
        """Put what a verify pass has left of accepted tokens in order, for the next pass and for the drafter."""
        if len(progress.rows) == len(progress.sequences):  # no drafts
            self._observe(progress.rows, features_NAD)
            return
        seen: list[int] = []
        segments: list[Segment] = []
        first = 0
        for sequence, draft, (verdict, _) in zip(progress.sequences, progress.drafts, progress.choices, strict=True):
            rows = verdict.rows
            if draft.parents is not None:
                self._slots.cache.keep_path(sequence.slot, sequence.num_cached, rows)
            seen += [first + row for row in rows]
            segments.append(Segment(sequence.slot, sequence.num_cached, len(rows)))
            first += len(draft.token_ids) + 1
        if features_NAD is not None:
            is_prefix = seen[-1] == len(seen) - 1  # of a sequence alone: no copy
            self._observe(Rows(segments), features_NAD[: len(seen)] if is_prefix else features_NAD[seen])

    def _watched(self, found: Pass) -> Array | None:
        """What the drafter is shown of a pass; no layer of each row, if it only wants to know that there was one."""
        if self._drafter is None or self._drafter.taps is None:
            return None
        return found.hidden_ND[:, None, :][:, :0] if found.features_NAD is None else found.features_NAD

    def _observe(self, rows: Rows, features_NAD: Array | None) -> None:
        if self._drafter is not None and features_NAD is not None:
            self._drafter.observe(rows, features_NAD)

    def _commit(self, progress: _Progress) -> None:
        """Append what was chosen, up to where the text ends."""
        now = progress.clock[-1]
        for sequence, draft, (verdict, tokens) in zip(
            progress.sequences, progress.drafts, progress.choices, strict=True
        ):
            num_before = len(sequence.tokens)
            for token in tokens:
                sequence.append(token)
                if sequence.is_finished:
                    break
            num_committed = len(sequence.tokens) - num_before
            progress.num_committed.append(num_committed)
            sequence.num_cached += num_committed
            if not tokens:
                continue  # it has failed
            stats = sequence.stats
            stats.num_target_passes += 1
            if draft.token_ids:
                num_accepted = min(verdict.num_accepted, num_committed)
                stats.record_draft(len(draft.token_ids), num_accepted, draft.depth)
            stats.num_tokens = len(sequence.tokens)
            stats.decode_seconds = now - sequence.first_token_at


def _cut(sequence: Sequence, draft: Draft) -> Draft:
    """End a draft before its first token that the sequence's constraint forbids, so that no row is verified in vain."""
    if sequence.constraint is None or not draft.token_ids:
        return draft
    try:
        return draft.cut(sequence.constraint.num_allowed(draft.token_ids[: draft.num_chained]))
    except Exception:  # the verify pass meets it again, where it is this sequence's failure alone
        return Draft()


def _record(progress: _Progress, with_sequences: bool) -> Round:
    parts = map(_part, progress.sequences, progress.drafts, progress.choices, progress.num_committed)
    started, drafted, passed, chosen, committed = progress.clock
    counts = [len(draft.token_ids) + 1 for draft in progress.drafts]
    return Round(
        draft_seconds=drafted - started,
        pass_seconds=passed - drafted,
        choose_seconds=chosen - passed,
        commit_seconds=committed - chosen,
        num_rows=len(progress.rows),
        num_chosen_by_logits=sum(n for n, s in zip(counts, progress.sequences, strict=True) if s.needs_logits),
        sequences=tuple(parts) if with_sequences else (),
    )


def _part(sequence: Sequence, draft: Draft, choice: Choice, num_committed: int) -> RoundOfSequence:
    verdict = choice.verdict
    is_whole = 0 < verdict.num_accepted <= num_committed  # the text has not ended within the path
    last = verdict.path[-1] if is_whole else -1
    return RoundOfSequence(
        request=sequence.number,
        position=len(sequence.tokens) - num_committed,
        source=_name_of(draft.source) if draft.token_ids else None,
        num_draft_tokens=len(draft.token_ids),
        num_accepted_tokens=min(verdict.num_accepted, num_committed),
        num_committed=num_committed,
        num_runner_ups=draft.num_runner_ups,
        runner_up=last - draft.num_chained if last >= draft.num_chained else None,
    )


_name_of = cache(str)
"""Of a source. There are few, and a name for each round."""
