"""Run the engine, and keep what it computed: tokens, counts, and the final hidden states behind them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hopskip.backends.base import Cache, Model, run_tapped
from hopskip.backends.rows import Rows
from hopskip.engine.engine import Engine
from hopskip.sampling import SamplingParams
from hopskip.sequence import SpeculativeStats
from hopskip.speculative import SpeculativeConfig


@dataclass(frozen=True)
class Run:
    """What one prompt gave."""

    token_ids: list[int]
    """Generated tokens."""
    states: Tensor
    """Final hidden states at every committed position, those of the prompt first: [T, D]. The last generated token has
    none, it was not fed back."""
    stats: SpeculativeStats


class Recorder:
    """A model that notes the final hidden state of every place of the cache. A later pass over a place replaces it, and
    a tree's branch that is kept moves with its keys and values; so what is left at a committed position is what the
    committed tokens were computed from."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._states: dict[tuple[int, int], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        h_ND = self._model.run_layers(h_ND, start, stop, rows, cache)
        if stop == self._model.config.num_hidden_layers:
            self._record(h_ND, rows)
        return h_ND

    def run_tapped(self, h_ND: Tensor, taps: Seq[int], rows: Rows, cache: Cache) -> tuple[Tensor, Tensor]:
        h_ND, tapped_NAD = run_tapped(self._model, h_ND, taps, rows, cache)
        self._record(h_ND, rows)
        return h_ND, tapped_NAD

    def _record(self, h_ND: Tensor, rows: Rows) -> None:
        places = [(segment.slot, segment.start + row) for segment in rows.segments for row in range(segment.count)]
        self._states.update(zip(places, h_ND, strict=True))

    def new_cache(self, num_slots: int, length: int) -> Cache:
        cache = self._model.new_cache(num_slots, length)
        keep_path = cache.keep_path

        def keep_and_move(slot: int, start: int, rows: Seq[int]) -> None:
            keep_path(slot, start, rows)
            kept = [self._states[slot, start + row] for row in rows]
            self._states.update(((slot, start + index), h_D) for index, h_D in enumerate(kept))

        cache.keep_path = keep_and_move  # type: ignore[method-assign]
        return cache

    def states(self, slot: int, num_positions: int) -> Tensor:
        """Final hidden states of the first positions of a slot, [T, D]."""
        return torch.stack([self._states[slot, position] for position in range(num_positions)])


def run(
    model: Model,
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
        recorder = Recorder(model)
        engine = Engine(
            cast(Model, recorder),
            speculative,
            max_num_seqs=max_num_seqs,
            prefix_caching=False,
            rows_per_sequence=rows_per_sequence,
        )
        sequences = [engine.add(prompt, params) for prompt in prompts[first : first + max_num_seqs]]
        while engine.has_work:
            engine.step()
        runs.extend(
            Run([token.id for token in s.tokens], recorder.states(s.slot, s.num_cached), s.stats) for s in sequences
        )
    return runs


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: NaN equals itself, and 0 is not -0."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def first_difference(a: Seq[object], b: Seq[object]) -> int | None:
    """Index of the first difference of two sequences; the end of the shorter one counts, None if they are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
