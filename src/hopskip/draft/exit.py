"""Drafting from an exit: the model's own layers (LayerSkip, arXiv 2404.16710), whichever they are and in whatever
precision (`OwnLayers`), or a trained exit.

A trained exit with layers has keys and values of its own for every position, in the cache's last layers, made from
features that the model's passes left behind. They are brought up to date when a draft begins: one pass over the tokens
that were committed since, the last of which yields the first draft token. While drafting on, the exit's own outputs
take the place of the model's, so those positions are made anew next time.

Shape letters: N rows, A taps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from array_api_compat import device

from hopskip.backends.base import Backend, DraftTask
from hopskip.backends.rows import Array, Cache, Rows, Segment
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.draft.base import Draft, Drafter
from hopskip.draft.features import Features
from hopskip.draft.sources import TRAINED_EXIT, OwnLayers, Source
from hopskip.sequence import Sequence

Exit = OwnLayers | TrainedExit
"""Layers of the model, or the trained exit that is attached to it."""

SHARPNESS = 1.25
"""What an exit's scaled logits are multiplied by before noise is added. It is less sure than the model, and the texts
that are drawn truncate as a rule, which an exit does not."""
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
    unsure token is likely to be rejected with it.

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
        self._reads: ExitConfig | None = trained.config if trained and trained.layers else None
        self.taps = self._reads.taps if self._reads else None
        self._features = Features(backend.xp)

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        self._features.observe(rows, features_NAD)

    def num_unseen(self, sequence: Sequence) -> int:
        """Tokens that a draft begins with: the sequence's last, and those before it that the exit has yet to see."""
        if self._reads is None:
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
            task.sharpness = SHARPNESS
        found = self._backend.draft(task, cache)
        for index, (_, _, draft, number) in enumerate(work):
            draft.token_ids = found.token_ids[index]
            draft.exit_states = found.states[index]
            draft.buckets = list(range(len(draft.token_ids)))
            if number and found.runner_ups is not None and found.sums is not None:
                add_runner_ups(draft, found.runner_ups[index], found.sums[index], number)

    def _task(self, work: Seq[_Work]) -> DraftTask:
        """What the drafts begin with. The tokens that the exit has yet to see count as seen then."""
        own, trained = self._own_layers, self._reads
        token_ids: list[int] = []
        segments: list[Segment] = []
        features: list[Array] = []
        states: list[Array] = []
        for sequence in (part.sequence for part in work):
            last = sequence.num_cached
            start = last + 1 - self.num_unseen(sequence)
            token_ids += sequence.token_ids[start : last + 1]
            segments.append(Segment(sequence.slot, start, last + 1 - start))
            if trained is not None:
                before, at = self._features.enter(sequence.slot, start, last)
                features.append(before)
                states += [at, before[:1]] if trained.start else []  # the last row's are not used
        task = DraftTask(
            layers=own.layers if own else None,
            precision=own.precision if own else None,
            token_ids=token_ids,
            rows=Rows(segments),
            limits=[part.limit for part in work],
            min_confidence=self._min_confidence,
        )
        if trained is not None and trained.features:
            columns = [trained.taps.index(feature) for feature in trained.features]
            task.features_NAD = self._columns(self._joined(features), columns)
        if trained is not None and trained.start:
            column = trained.taps.index(trained.start)
            task.token_states_ND = self._columns(self._joined(states), [column])[:, 0]
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
