"""Drafts step by step, from the calls that every backend has: the readable version of what an engine does in one call.

Derive a backend from `StepwiseBackend` to have `Backend.draft` without writing it.

One loop covers every exit: the state of the latest token where the exit begins, the exit's own layers if it has any,
final norm, head, a token.

Shape letters: N rows, B sequences that go on, D hidden size, n tokens of the head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from typing import Any

from hopskip.backends.base import Backend, Chains, DraftTask, Head, run_by_number
from hopskip.backends.rows import Array, Cache, Rows, Segment
from hopskip.checkpoint.trained_exit import Mixing
from hopskip.sampling import best_sums
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Place, Rule


class StepwiseBackend(Backend):
    """A backend that drafts by its other calls."""

    def draft(self, task: DraftTask, cache: Cache) -> Chains:
        steps = _Steps(self, task, cache)
        chosen = [_Chosen() for _ in task.limits]
        active = list(range(len(chosen)))
        hidden_BD = steps.enter()
        while True:
            logits_Bn = self.logits(hidden_BD, steps.head)
            goes_on = []
            for row, index in enumerate(active):
                goes_on.append(steps.choose(index, hidden_BD[row], logits_Bn[row], chosen[index]))
            kept = [row for row, goes in enumerate(goes_on) if goes]
            active = [active[row] for row in kept]
            if not active:
                return _chains(task, chosen, hidden_BD, self.xp)
            hidden_BD = steps.advance(active, chosen, hidden_BD[kept])

    @property
    @abstractmethod
    def mixing(self) -> Mixing | None:
        """What the attached exit does with features, in this backend's arrays; None if it has none."""


class _Chosen:
    """What has been drafted for one sequence."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.states: list[Array] = []
        self.runner_ups: list[list[int]] = []
        self.sums: list[list[float]] = []


class _Steps:
    def __init__(self, backend: StepwiseBackend, task: DraftTask, cache: Cache) -> None:
        self._backend, self._task, self._cache = backend, task, cache
        self._own_layers: tuple[int, ...] = ()
        self._mixing = None
        self._vocabulary: Seq[int] | None = None
        self.head: Head = task.precision or "full"
        if task.layers is not None:
            self._first_layers = backend.layer_numbers(task.layers, task.precision)
            return
        trained = backend.trained_exit
        assert trained is not None, "no exit is attached"
        depth = backend.config.num_hidden_layers
        self._first_layers = tuple(range(trained.config.start))
        self._own_layers = tuple(range(depth, depth + trained.config.num_layers))
        self._vocabulary = trained.vocabulary_list
        self.head = "exit"
        self._mixing = backend.mixing

    def enter(self) -> Array:
        """Take the exit through the tokens that it has yet to see: the states of each sequence's last one, [B, D]."""
        task, last = self._task, self._task.rows.last_rows
        if not self._own_layers:
            return self._token_states([task.token_ids[row] for row in last], self._last_segments())
        if self._first_layers:
            assert task.token_states_ND is not None
            states_ND = self._backend.xp.asarray(task.token_states_ND, copy=True)
            states_ND[last] = self._token_states([task.token_ids[row] for row in last], self._last_segments())
        else:
            states_ND = self._backend.embed(task.token_ids)
        if self._mixing is not None:
            states_ND = self._mixing.mix(states_ND, self._mixing.fuse(task.features_NAD))
        return self._through_own_layers(states_ND, task.rows)[last]

    def advance(self, active: list[int], chosen: list[_Chosen], hidden_BD: Array) -> Array:
        """The states of the tokens just chosen, of the sequences that go on."""
        segments = self._task.rows.segments
        rows = Rows(
            Segment(s.slot, s.start + s.count - 1 + len(chosen[index].token_ids), 1)
            for index, s in ((index, segments[index]) for index in active)
        )
        states_BD = self._token_states([chosen[index].token_ids[-1] for index in active], rows)
        if self._mixing is not None:
            states_BD = self._mixing.mix(states_BD, hidden_BD)
        return self._through_own_layers(states_BD, rows)

    def choose(self, index: int, hidden_D: Array, logits_n: Array, to: _Chosen) -> bool:
        """Add one token, if any can be chosen; whether the draft goes on after it."""
        task, xp = self._task, self._backend.xp
        rule = _BEST if task.rules is None else task.rules[index]
        last = self._task.rows.segments[index]
        place = Place(rule, last.start + last.count + len(to.token_ids), tuple(to.token_ids))
        found, probability = best_sums(logits_n, self._vocabulary, place, 1 + task.num_runner_ups, xp, task.sharpness)
        if not found:
            return False
        tokens = [row if self._vocabulary is None else self._vocabulary[row] for _, row in found]
        to.token_ids.append(tokens[0])
        to.states.append(hidden_D)
        if task.num_runner_ups:
            to.runner_ups.append(tokens[1:])
            to.sums.append([value for value, _ in found])
        ends_text = task.last_token_ids is not None and tokens[0] in task.last_token_ids[index]
        return probability >= task.min_confidence and len(to.token_ids) < task.limits[index] and not ends_text

    def _last_segments(self) -> Rows:
        return Rows(Segment(s.slot, s.start + s.count - 1, 1) for s in self._task.rows.segments)

    def _token_states(self, token_ids: list[int], rows: Rows) -> Array:
        """Of tokens, where the exit begins: embeddings, or outputs of the model's first layers."""
        states_ND = self._backend.embed(token_ids)
        return run_by_number(self._backend, states_ND, self._first_layers, rows, self._cache)

    def _through_own_layers(self, states_ND: Array, rows: Rows) -> Array:
        if not self._own_layers:
            return states_ND
        first, last = self._own_layers[0], self._own_layers[-1]
        return self._backend.run_layers(states_ND, first, last + 1, rows, self._cache).hidden_ND


_BEST = Rule(SamplingParams(), seed=0)


def _chains(task: DraftTask, chosen: list[_Chosen], like_ND: Array, xp: Any) -> Chains:
    return Chains(
        [part.token_ids for part in chosen],
        [xp.stack(part.states) if part.states else like_ND[:0] for part in chosen],
        [part.runner_ups for part in chosen] if task.num_runner_ups else None,
        [part.sums for part in chosen] if task.num_runner_ups else None,
    )
