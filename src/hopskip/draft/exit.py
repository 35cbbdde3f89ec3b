"""Drafting from an exit: the model's own layers (LayerSkip, arXiv 2404.16710), whichever they are and in whatever
precision (`OwnLayers`), or a trained exit.

A trained exit with layers has keys and values of its own for every position, in the cache's last layers, made from
features that the model's passes left behind. They are brought up to date when a draft begins: one pass over the tokens
that were committed since, the last of which yields the first draft token. While drafting on, the exit's own outputs
take the place of the model's, so those positions are made anew next time.

Shape letters: N rows, A taps, D hidden size, V vocabulary, n draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from array_api_compat import device
from torch import Tensor

from hopskip.backends.base import Backend, Chains, DraftTask
from hopskip.backends.rows import Array, Cache, Rows, Segment
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.draft.base import Draft, Drafter
from hopskip.draft.features import Features
from hopskip.draft.sources import TRAINED_EXIT, OwnLayers, Source
from hopskip.sampling import adjust_logits, draw, probabilities
from hopskip.sequence import Sequence

Exit = OwnLayers | TrainedExit
"""Layers of the model, or the trained exit that is attached to it."""

_MAX_RUNNER_UPS_OF_A_STEP = 4


def source_of(exit: Exit) -> Source:
    return exit.source if isinstance(exit, OwnLayers) else TRAINED_EXIT


class _Work(NamedTuple):
    """One sequence's draft to be made."""

    sequence: Sequence
    limit: int
    draft: Draft
    num_runner_ups: int


class ExitDrafter(Drafter):
    """Drafts token by token.

    A draft ends early after its first token whose probability at the exit is below `min_confidence`: what follows an
    unsure token is likely to be rejected with it.

    Beside its own best tokens it may name others for the same places, so that the draft is a tree of one long path and
    leaves beside it: they cost rows of the verify pass, but no draft step. Sequences whose distribution depends on the
    text (penalties, a grammar) get none.

    Args:
        num_runner_ups: how many such others a draft has.
    """

    def __init__(self, backend: Backend, exit: Exit, min_confidence: float = 0.0, num_runner_ups: int = 0) -> None:
        self._backend = backend
        self._source = source_of(exit)
        self._min_confidence = min_confidence
        self._num_runner_ups = num_runner_ups
        self._own_layers = exit if isinstance(exit, OwnLayers) else None
        self._trained = exit if isinstance(exit, TrainedExit) else None
        # without layers of its own an exit has no keys and values to keep up to date
        self._reads: ExitConfig | None = self._trained.config if self._trained and self._trained.layers else None
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
        work = [
            _Work(
                sequence,
                limit,
                Draft(self._source, probs=None if sequence.params.is_greedy else []),
                number if sequence.allows_runner_ups else 0,
            )
            for sequence, limit, number in zip(sequences, limits, most, strict=True)
        ]
        active = [part for part in work if part.limit > 0]
        if plain := [part for part in active if _chooses_plainly(part.sequence)]:
            self._draft_plainly(plain, cache)
        if others := [part for part in active if not _chooses_plainly(part.sequence)]:
            self._draft_by_choice(others, cache)
        for part in work:
            part.draft.buckets = list(range(part.draft.num_chained))
        return [part.draft for part in work]

    def _draft_plainly(self, work: Seq[_Work], cache: Cache) -> None:
        """Take the exit's own best tokens, or draw from all of them: the backend chooses by itself."""
        task = self._task(work)
        # runner-ups of drawn tokens are drawn, too
        most = max((part.num_runner_ups for part in work if part.sequence.params.is_greedy), default=0)
        task.num_runner_ups = min(most, _MAX_RUNNER_UPS_OF_A_STEP, self._num_tokens - 1)
        temperatures = [part.sequence.params.temperature for part in work]
        if any(temperatures):
            task.temperatures = temperatures
            task.uniforms = [_uniforms(part) if part.sequence.params.temperature else [] for part in work]
        found = self._backend.draft(task, cache)
        for index, part in enumerate(work):
            _take(part.draft, found, index)
            if part.draft.probs is not None:
                assert found.distributions is not None
                distribution_kn = torch.as_tensor(found.distributions[index])[: len(part.draft.token_ids)]
                part.draft.probs += self._over_all_tokens(distribution_kn, 0.0).unbind()
                if part.num_runner_ups:
                    draw_runner_ups(part.draft, part.sequence.generator, part.num_runner_ups)
            elif part.num_runner_ups and found.runner_ups is not None and found.probabilities is not None:
                add_runner_ups(part.draft, found.runner_ups[index], found.probabilities[index], part.num_runner_ups)

    def _draft_by_choice(self, work: Seq[_Work], cache: Cache) -> None:
        """Penalties and truncation: tokens are chosen here, step by step."""
        task = self._task(work)
        task.choose = lambda index, logits_n: self._choose(work[index].sequence, work[index].draft, logits_n)
        found = self._backend.draft(task, cache)
        for index, part in enumerate(work):
            _take(part.draft, found, index)
            if part.num_runner_ups:
                draw_runner_ups(part.draft, part.sequence.generator, part.num_runner_ups)

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

    @property
    def _num_tokens(self) -> int:
        return len(self._trained.vocabulary_list) if self._trained else self._backend.config.vocab_size

    def _over_all_tokens(self, values_Nn: Tensor, other: float) -> Tensor:
        """Of the draft vocabulary's tokens and, with this value, of all others: [N, V]."""
        if self._trained is None:
            return values_Nn
        values_NV = values_Nn.new_full((len(values_Nn), self._backend.config.vocab_size), other)
        values_NV[:, self._trained.vocabulary] = values_Nn
        return values_NV

    def _choose(self, sequence: Sequence, draft: Draft, logits_n: Array) -> tuple[int, float]:
        """Add one token to a draft: the token, and its probability at the exit."""
        params = sequence.params
        logits_1V = self._over_all_tokens(torch.as_tensor(logits_n)[None], float("-inf"))
        if params.changes_logits:
            logits_1V = adjust_logits(logits_1V, params, sequence.counts, draft.token_ids)
        if params.is_greedy:
            probs_V = logits_1V[0].softmax(dim=-1)
            token = int(logits_1V.argmax())
        else:
            probs_V = probabilities(logits_1V, params)[0]
            token = draw(probs_V, sequence.generator)
            assert draft.probs is not None
            draft.probs.append(probs_V)
        draft.token_ids.append(token)
        return token, float(probs_V[token])


def _chooses_plainly(sequence: Sequence) -> bool:
    params = sequence.params
    return (params.is_greedy or not params.truncates) and not params.changes_logits


def _uniforms(part: _Work) -> list[float]:
    """One for each token that may be drawn."""
    drawn: list[float] = torch.rand(part.limit, dtype=torch.float64, generator=part.sequence.generator).tolist()
    return drawn


def _take(draft: Draft, found: Chains, index: int) -> None:
    draft.token_ids = found.token_ids[index]
    draft.exit_states = found.states[index]


def add_runner_ups(draft: Draft, tokens: Seq[Seq[int]], probs: Seq[Seq[float]], number: int) -> None:
    """Make a chain a tree: add the tokens that the exit finds likeliest to be right where the chain is wrong.

    Args:
        tokens: the next best tokens of each step, best first.
        probs: probabilities of the step's own token and of those.
        number: how many to add, if there are so many.
    """
    candidates: list[tuple[float, int, int]] = []
    reached = 1.0  # probability that the chain is right so far
    for step, (others, (own, *rest)) in enumerate(zip(tokens, probs, strict=True)):
        candidates += [(reached * probability, step, token) for token, probability in zip(others, rest, strict=True)]
        reached *= own
    draft.parents = list(range(-1, len(draft.token_ids) - 1))
    # of one step's tokens the likelier comes first: among equals too
    for _, step, token in sorted(candidates, key=lambda candidate: -candidate[0])[:number]:
        draft.token_ids.append(token)
        draft.parents.append(step - 1)


def draw_runner_ups(draft: Draft, generator: torch.Generator, number: int) -> None:
    """The same for a chain that was drawn: add tokens, drawn without those before them, where the exit finds it most
    likely that the chain is wrong. That depends on what has been drawn, not on what will be, as losslessness demands.
    """
    assert draft.probs is not None
    length = len(draft.token_ids)
    rest = [probs_V.clone() for probs_V in draft.probs]
    reached = [1.0]
    for token, probs_V in zip(draft.token_ids, draft.probs, strict=True):
        reached.append(reached[-1] * float(probs_V[token]))
    last = list(draft.token_ids)
    draft.parents = list(range(-1, length - 1))
    for _ in range(number):
        for step, token in enumerate(last):
            rest[step][token] = 0
        masses = [reached[step] * float(rest[step].sum()) for step in range(length)]
        step = max(range(length), key=masses.__getitem__)
        if not masses[step] > 0:
            return
        probs_V = rest[step] / rest[step].sum()
        last[step] = draw(probs_V, generator)
        draft.token_ids.append(last[step])
        draft.probs.append(probs_V)
        draft.parents.append(step - 1)
