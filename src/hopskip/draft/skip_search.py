"""Which layers a layer-skip draft can do without: a short search, once per model and precision.

Texts that the model itself writes, from its first token on at temperature 1, are read once with all layers and once
without some; what counts is how often the best next token is the same, and how much time the draft would save. Layers
are ranked by how little each alone is missed, then left out one after the other, each time the one of the next few that
is missed least. Best is the draft of most tokens per second, by arithmetic on timed passes.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopskip.backends.base import Backend, run_by_number
from hopskip.backends.rows import Rows, Segment
from hopskip.draft.costs import expected_speedup
from hopskip.machine import replacing_file
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Place, Rule
from hopskip.speculative import DraftPrecision, OwnLayers, layer_skip

_NUM_TEXTS, _LENGTH = 4, 96
"""Of the model's own, that layers are tried on."""
_NUM_CANDIDATES = 4
"""Layers that are tried for each one to be skipped: those that were missed least when each was skipped alone."""
_SECONDS = 30.0
"""The search takes what it has found by then."""
_VERSION = 1
"""Raised whenever the search changes: what others have found is not looked at."""


@dataclass(frozen=True, kw_only=True)
class SkippedLayers:
    """What a search has found."""

    skip_layers: tuple[int, ...]
    agreement: float
    """Share of tokens on which such a draft and the model agree."""


def search(
    backend: Backend,
    precision: DraftPrecision | None,
    path: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> SkippedLayers:
    """Find the layers that a draft can do without. Takes up to half a minute, unless it is known already.

    Args:
        path: of a file that keeps the result; None keeps nothing.
        progress: told the share of the time that has gone by.
    """
    if path is not None and (known := _read(path, backend.config.num_hidden_layers)) is not None:
        return known
    with backend.stepping():
        found = _Search(backend, precision, progress).run()
    if path is not None:
        # losing the file costs another search, so no word of it
        with contextlib.suppress(OSError), replacing_file(path) as partial:
            partial.write_text(json.dumps({"version": _VERSION, **vars(found)}) + "\n", encoding="utf-8")
    return found


def _read(path: Path, num_layers: int) -> SkippedLayers | None:
    try:
        kept: Any = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("version") != _VERSION:
            return None
        skip_layers = tuple(int(layer) for layer in kept["skip_layers"])
        is_sound = set(skip_layers) < set(range(num_layers))
        return SkippedLayers(skip_layers=skip_layers, agreement=float(kept["agreement"])) if is_sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged


class _Search:
    def __init__(
        self, backend: Backend, precision: DraftPrecision | None, progress: Callable[[float], None] | None
    ) -> None:
        self._backend = backend
        self._precision = precision
        self._progress = progress
        self._started = time.perf_counter()
        self._depth = backend.config.num_hidden_layers
        self._cache = backend.new_cache(_NUM_TEXTS, min(_LENGTH, backend.config.context_length))
        self._token_ids = self._write()
        everything = layer_skip((), self._depth)
        self._best = self._read(everything)
        self._pass_seconds = self._time(everything)
        self._step_seconds = self._time(layer_skip((), self._depth, precision))
        self._head_seconds = self._time(OwnLayers(kind="layer-skip", layers=(), precision=precision))

    def run(self) -> SkippedLayers:
        deadline = time.perf_counter() + _SECONDS
        best = self._judge(())
        alone = {layer: self._agreement((layer,)) for layer in range(self._depth) if time.perf_counter() < deadline}
        rest = sorted(alone, key=lambda layer: -alone[layer])
        skipped: tuple[int, ...] = ()
        while len(rest) > 1 and time.perf_counter() < deadline:
            layer = max(rest[:_NUM_CANDIDATES], key=lambda layer: self._agreement((*skipped, layer)))
            rest.remove(layer)
            skipped = tuple(sorted((*skipped, layer)))
            found = self._judge(skipped)
            best = max(best, found, key=lambda pair: pair[0])
            if found[0] < 0.8 * best[0]:
                break
        return best[1]

    def _judge(self, skipped: tuple[int, ...]) -> tuple[float, SkippedLayers]:
        """Expected speed-up of the draft without these layers, at its best length."""
        agreement = self._agreement(skipped)
        share = 1 - len(skipped) / self._depth
        step = self._head_seconds + share * (self._step_seconds - self._head_seconds)
        gain = max(expected_speedup(agreement, length, step / self._pass_seconds) for length in range(1, 9))
        return gain, SkippedLayers(skip_layers=skipped, agreement=agreement)

    def _agreement(self, skipped: Seq[int]) -> float:
        if self._progress is not None:
            self._progress(min(1.0, (time.perf_counter() - self._started) / _SECONDS))
        best = self._read(layer_skip(skipped, self._depth, self._precision))
        return sum(a == b for a, b in zip(best, self._best, strict=True)) / len(best)

    def _read(self, draft: OwnLayers) -> list[int]:
        """The best next token after each of the texts' tokens."""
        rows = Rows(Segment(slot, 0, self._cache.length) for slot in range(_NUM_TEXTS))
        return self._best_after(draft, self._token_ids, rows)

    def _best_after(self, draft: OwnLayers, token_ids: list[int], rows: Rows) -> list[int]:
        layers = self._backend.layer_numbers(draft.layers, draft.precision)
        hidden_ND = run_by_number(self._backend, self._backend.embed(token_ids), layers, rows, self._cache)
        return self._backend.greedy(hidden_ND, draft.precision or "full")

    def _time(self, draft: OwnLayers) -> float:
        """Seconds of a pass of one row, head included; the least of a few."""
        rows = Rows([Segment(0, self._cache.length - 1, 1)])
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            self._best_after(draft, self._token_ids[:1], rows)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _write(self) -> list[int]:
        """Texts of the model's own, one after the other."""
        config = self._backend.config
        first = 0 if config.bos_token_id is None else config.bos_token_id
        texts = [[first] for _ in range(_NUM_TEXTS)]
        rules = [Rule(SamplingParams(temperature=1.0), seed=index) for index in range(_NUM_TEXTS)]
        for position in range(self._cache.length - 1):
            rows = Rows(Segment(slot, position, 1) for slot in range(_NUM_TEXTS))
            hidden_ND = self._backend.forward([text[-1] for text in texts], rows, self._cache).hidden_ND
            chosen = self._backend.choose(hidden_ND, [Place(rule, position + 1) for rule in rules]).token_ids
            for text, token in zip(texts, chosen, strict=True):
                text.append(token)
        return [token for text in texts for token in text]
