"""Run the engine, and keep what it computed: tokens, counts, and the final hidden states behind them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.draft.base import Draft, Drafter, Round
from hopskip.draft.make import prepare
from hopskip.engine.engine import Engine
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence, SpeculativeStats
from hopskip.speculative import SpeculativeConfig


@dataclass(frozen=True)
class Run:
    """What one prompt gave."""

    token_ids: list[int]
    """Generated tokens."""
    states: NDArray[np.float32]
    """Final hidden states at every committed position, those of the prompt first: [T, D]. The last generated token has
    none, it was not fed back."""
    stats: SpeculativeStats


class Recorder(Drafter):
    """Drafts as another drafter does, and notes the final hidden states that committed tokens left at their places.

    Args:
        drafter: None drafts nothing.
    """

    def __init__(self, backend: Backend, drafter: Drafter | None) -> None:
        self._backend, depth = backend, backend.config.num_hidden_layers
        self._drafter = drafter
        self._inner_taps = None if drafter is None else drafter.taps
        taps = sorted({depth, *(self._inner_taps or ())})
        self.taps = tuple(taps)
        self._column = taps.index(depth)
        self._inner_columns = [taps.index(tap) for tap in self._inner_taps or ()]
        self._states: dict[tuple[int, int], NDArray[np.float32]] = {}

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        places = [(segment.slot, segment.start + row) for segment in rows.segments for row in range(segment.count)]
        states_ND = self._backend.on_host(features_NAD[:, self._column]).copy()
        self._states.update(zip(places, states_ND, strict=True))
        if self._drafter is not None and self._inner_taps is not None:
            self._drafter.observe(rows, features_NAD[:, self._inner_columns])

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        if self._drafter is None:
            return [Draft() for _ in sequences]
        return self._drafter.propose(sequences, limits, cache)

    def learn(self, sequences: Seq[Sequence], outcome: Round) -> None:
        if self._drafter is not None:
            self._drafter.learn(sequences, outcome)

    def states(self, slot: int, num_positions: int) -> NDArray[np.float32]:
        """Final hidden states of the first positions of a slot, [T, D]."""
        return np.stack([self._states[slot, position] for position in range(num_positions)])


def run(
    backend: Backend,
    prompts: Seq[Seq[int]],
    speculative: SpeculativeConfig,
    params: SamplingParams,
    *,
    max_num_seqs: int,
    rows_per_sequence: int | None = None,
) -> list[Run]:
    """Generate for each prompt, `max_num_seqs` at a time, without reusing anybody's cache."""
    runs: list[Run] = []
    for first in range(0, len(prompts), max_num_seqs):
        # a new engine for each group: every sequence then keeps a slot to itself
        resolved, drafter = prepare(backend, speculative)
        recorder = Recorder(backend, drafter)
        engine = Engine(
            backend,
            resolved,
            recorder,
            max_num_seqs=max_num_seqs,
            prefix_caching=False,
            rows_per_sequence=rows_per_sequence,
        )
        sequences = [engine.add(Request(prompt, params)) for prompt in prompts[first : first + max_num_seqs]]
        while engine.has_work:
            engine.step()
        runs.extend(
            Run([token.id for token in s.tokens], recorder.states(s.slot, s.num_cached), s.stats) for s in sequences
        )
    return runs


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Equality of every bit: NaN equals itself, and 0 is not -0."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def first_difference(a: Seq[object], b: Seq[object]) -> int | None:
    """Index of the first difference of two sequences; the end of the shorter one counts, None if they are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
