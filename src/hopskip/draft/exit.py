"""Drafting from an exit: the model's own layers (LayerSkip, arXiv 2404.16710), whichever they are and in whatever
precision (`OwnLayers`), or a trained exit.

A trained exit with layers has keys and values of its own for every position, in the cache's last layers, made from
features that the model's passes left behind. They are brought up to date when a draft begins: one pass over the tokens
that were committed since, the last of which yields the first draft token. While drafting on, the exit's own outputs
take the place of the model's, so those positions are made anew next time.

Shape letters: N rows, A taps, D hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from array_api_compat import device

from hopskip.backends.base import Backend, DraftTask
from hopskip.backends.rows import Array, Cache, Rows, Segment
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.base import Draft, Drafter
from hopskip.sequence import Sequence
from hopskip.speculative import TRAINED_EXIT, OwnLayers, Source

Exit = OwnLayers | TrainedExit
"""Layers of the model, or the trained exit that is attached to it."""

_SHARPNESS = 1.25
"""What an exit's scaled logits are multiplied by before noise is added: it is less sure than the model. Nearly all of
the layers (layer-skip), or all of them in fewer bits, are as sure."""
_MAX_RUNNER_UPS_OF_A_STEP = 4
_GAP_OF_A_STEP = 0.35
"""How much the chance that a draft gets as far as its next step falls, in logarithms, roughly."""


def source_of(exit: Exit) -> Source:
    return exit.source if isinstance(exit, OwnLayers) else TRAINED_EXIT


class _Work(NamedTuple):
    """One sequence's draft to be made."""

    sequence: Sequence
    limit: int
    draft: Draft
    num_runner_ups: int


class ExitDrafter(Drafter):
    """Drafts token by token: those of the largest sums of the exit's logits and the noise that the model's own choice
    will be made with, if the text is drawn.

    A draft ends early after its first token whose probability at the exit is below `min_confidence`: what follows an
    unsure token is likely to be rejected with it. It also ends with a token that would end the text.

    Beside its own best tokens it may name others for the same places, so that the draft is a tree of one long path and
    leaves beside it: they cost rows of the verify pass, but no draft step.

    Args:
        num_runner_ups: how many such others a draft has.
    """

    def __init__(self, backend: Backend, exit: Exit, min_confidence: float = 0.0, num_runner_ups: int = 0) -> None:
        self._backend = backend
        self._source = source_of(exit)
        self._min_confidence = min_confidence
        self._num_runner_ups = num_runner_ups
        self._own_layers = exit if isinstance(exit, OwnLayers) else None
        trained = exit if isinstance(exit, TrainedExit) else None
        self._num_tokens = len(trained.vocabulary_list) if trained else backend.config.vocab_size
        # without layers of its own an exit has no keys and values to keep up to date
        config = trained.config if trained and trained.layers else None
        taps = self.taps = config.taps if config else None
        self._feature_columns = [taps.index(feature) for feature in config.features] if config and taps else []
        self._start_column = taps.index(config.start) if config and taps and config.start else None
        self._features = Features(backend.xp)

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        self._features.observe(rows, features_NAD)

    def copy(self, source: int, target: int, length: int) -> None:
        if self.taps is not None:
            self._features.copy(source, target, length)

    def num_unseen(self, sequence: Sequence) -> int:
        """Tokens that a draft begins with: the sequence's last, and those before it that the exit has yet to see."""
        if self.taps is None:
            return 1
        return sequence.num_cached + 1 - min(self._features.num_entered(sequence.slot), sequence.num_cached)

    def propose(
        self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache, num_runner_ups: Seq[int] | None = None
    ) -> list[Draft]:
        """As `Drafter.propose`. `num_runner_ups`: of each sequence's draft, in place of the drafter's own number."""
        most = num_runner_ups or [self._num_runner_ups] * len(sequences)
        work = [_Work(s, limit, Draft(self._source), n) for s, limit, n in zip(sequences, limits, most, strict=True)]
        active = [part for part in work if part.limit > 0]
        if active:
            self._draft(active, cache)
        return [part.draft for part in work]

    def _draft(self, work: Seq[_Work], cache: Cache) -> None:
        task = self._task(work)
        most = max(part.num_runner_ups for part in work)
        task.num_runner_ups = min(most, _MAX_RUNNER_UPS_OF_A_STEP, self._num_tokens - 1)
        if not all(part.sequence.takes_best for part in work):
            task.rules = [part.sequence.rule for part in work]
            task.sharpness = 1.0 if self._source.kind == "layer-skip" else _SHARPNESS
        found = self._backend.draft(task, cache)
        for index, (_, _, draft, number) in enumerate(work):
            draft.token_ids = found.token_ids[index]
            draft.exit_states = found.states[index]
            draft.buckets = list(range(len(draft.token_ids)))
            if number and found.runner_ups is not None and found.sums is not None:
                add_runner_ups(draft, found.runner_ups[index], found.sums[index], number)

    def _task(self, work: Seq[_Work]) -> DraftTask:
        """What the drafts begin with. The tokens that the exit has yet to see count as seen then."""
        own, reads, has_start = self._own_layers, self.taps is not None, self._start_column is not None
        token_ids: list[int] = []
        segments: list[Segment] = []
        features: list[Array] = []
        states: list[Array] = []
        for sequence in (part.sequence for part in work):
            last = sequence.num_cached
            start = last + 1 - self.num_unseen(sequence)
            token_ids += sequence.token_ids[start : last + 1]
            segments.append(Segment(sequence.slot, start, last + 1 - start))
            if reads:
                before, at = self._features.enter(sequence.slot, start, last)
                features.append(before)
                states += [at, before[:1]] if has_start else []  # the last row's are not used
        task = DraftTask(
            layers=own.layers if own else None,
            precision=own.precision if own else None,
            token_ids=token_ids,
            rows=Rows(segments),
            limits=[part.limit for part in work],
            min_confidence=self._min_confidence,
            last_token_ids=[part.sequence.stop_token_ids for part in work],
        )
        if self._feature_columns:
            task.features_NAD = self._columns(self._joined(features), self._feature_columns)
        if self._start_column is not None:
            task.token_states_ND = self._columns(self._joined(states), [self._start_column])[:, 0]
        return task

    def _joined(self, parts: list[Array]) -> Array:
        return self._backend.xp.concat(parts) if len(parts) > 1 else parts[0]

    def _columns(self, features_NAD: Array, columns: list[int]) -> Array:
        """Some of the taps, in one piece of memory."""
        if columns == list(range(features_NAD.shape[1])):
            return features_NAD
        xp = self._backend.xp
        return xp.take(features_NAD, xp.asarray(columns, device=device(features_NAD)), axis=1)


def add_runner_ups(draft: Draft, tokens: Seq[Seq[int]], sums: Seq[Seq[float]], number: int) -> None:
    """Make a chain a tree: add the tokens that are likeliest to be right where the chain is wrong, which is where the
    gap between the best sum of a step and the next is small.

    Args:
        tokens: the next best tokens of each step, best first.
        sums: by which the step's own token and those were chosen.
        number: how many to add, if there are so many.
    """
    candidates = [
        (own - other + _GAP_OF_A_STEP * step, step, token)
        for step, (others, (own, *rest)) in enumerate(zip(tokens, sums, strict=True))
        for token, other in zip(others, rest, strict=True)
    ]
    draft.parents = list(range(-1, len(draft.token_ids) - 1))
    # of one step's tokens the likelier comes first: among equals too
    for _, step, token in sorted(candidates, key=lambda candidate: candidate[0])[:number]:
        draft.token_ids.append(token)
        draft.parents.append(step - 1)


# -- features ----------------------------------------------------------------------------------------------------------

_MOST_PASSES = 32
"""That are kept as they are, before their features are sorted by slot."""


class Features:
    """Outputs of the tapped layers, of the positions that the model has seen and the exit may not have.

    They come in parts, sorted and joined only when a draft wants them: many rounds may go by without one.

    Args:
        xp: namespace of the arrays.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._slots: dict[int, _Slot] = defaultdict(lambda: _Slot(xp))
        self._passes: list[tuple[Rows, Array]] = []
        """What the slots have yet to be told of: one pass, or several that follow each other. To tell of each by itself
        would take longer."""

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        """A pass over these rows, as `Drafter.observe`."""
        if self._passes and (len(self._passes) == _MOST_PASSES or not _follows(rows, self._passes[-1][0])):
            self._sort()
        self._passes.append((rows, features_NAD))

    def copy(self, source: int, target: int, length: int) -> None:
        """The first positions of a slot are also those of another now, as `Drafter.copy`."""
        self._sort()
        self._slots[target] = self._slots[source].beginning(length)

    def num_entered(self, slot: int) -> int:
        """Positions of a slot at which the exit's keys and values hold."""
        self._sort()
        return self._slots[slot].num_entered

    def enter(self, slot: int, start: int, last: int) -> tuple[Array, Array]:
        """The exit reads the tokens at start..last now: features of the token before each, and those of the tokens
        themselves but the last, which no pass has seen. What no later draft wants is dropped."""
        self._sort()
        found = self._slots[slot]
        before, own = found.take(start - 1, last), found.take(start, last)
        found.num_entered = last + 1
        found.forget(last)
        return before, own

    def _sort(self) -> None:
        """Tell the slots of the passes so far."""
        if not self._passes:
            return
        segments = self._passes[0][0].segments
        all_features = [features_NAD for _, features_NAD in self._passes]
        self._passes = []
        if len(all_features) > 1:  # each of one token a slot
            joined = self._xp.stack(all_features, axis=1)
            parts = [joined[index] for index in range(len(segments))]
        else:
            ends = accumulate((segment.count for segment in segments), initial=0)
            parts = [all_features[0][start:stop] for start, stop in pairwise(ends)]
        for segment, own in zip(segments, parts, strict=True):
            self._slots[segment.slot].observe(segment.start, len(own), own)


class _Slot:
    """Features of all positions of one slot that the model has seen from `_first` on."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.num_entered = 0
        """Positions that hold the exit's keys and values as the model's own states make them."""
        self._first = self._end = 0
        self._parts_NAD: list[Array] = []

    def observe(self, start: int, count: int, features_NAD: Array) -> None:
        """A pass over `count` positions from `start` on. What was known of them before is void, but for the token at
        `start`: it was committed when the pass began, so the exit's keys and values there hold."""
        self.num_entered = min(self.num_entered, start + 1) if start else 0
        if start < self._first or start > self._end:
            self._first, self._parts_NAD = start, []
        elif start < self._end:
            self._parts_NAD = [self._joined()[: start - self._first]]
        self._parts_NAD.append(features_NAD)
        self._end = start + count

    def beginning(self, length: int) -> _Slot:
        """The same of its first positions: a slot of its own, which shares arrays with this one."""
        found = _Slot(self._xp)
        found.num_entered = min(self.num_entered, length)
        found._first, found._end = min(self._first, length), min(self._end, length)
        if found._first < found._end:
            found._parts_NAD = [self._joined()[: length - self._first]]
        return found

    def take(self, start: int, stop: int) -> Array:
        """Features of positions start..stop-1; zeros for the position before the first."""
        features_NAD = self._joined()
        found = features_NAD[max(0, start - self._first) : stop - self._first]
        if start >= 0:
            return found
        return self._xp.concat((self._xp.zeros_like(features_NAD[:1]), found))

    def forget(self, stop: int) -> None:
        """Drop the features of positions before `stop`."""
        if stop > self._first:
            self._parts_NAD = [self._joined()[stop - self._first :]]
            self._first = stop

    def _joined(self) -> Array:
        if len(self._parts_NAD) > 1:
            self._parts_NAD = [self._xp.concat(self._parts_NAD)]
        return self._parts_NAD[0]


def _follows(after: Rows, before: Rows) -> bool:
    """Whether two passes have the same slots in the same order, and each one token, the next."""
    if len(after.segments) != len(before.segments):
        return False
    for a, b in zip(before.segments, after.segments, strict=True):
        if b.slot != a.slot or b.start != a.start + 1 or a.count != 1 or b.count != 1:
            return False
    return True
