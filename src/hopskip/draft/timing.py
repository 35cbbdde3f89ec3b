"""Timing draft steps and verify passes: once per machine, model, precision and threads, then remembered.

The timings are of whole rounds, drafts and passes in turn as they are in use: each finds the processor's caches as the
other left them, which timings of one alone do not show.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Generic, TypeVar

from hopskip.backends.base import Backend
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.costs import CONTEXT, ContextCost, Costs, DraftCost
from hopskip.draft.exit import Exit, ExitDrafter, source_of
from hopskip.machine import cpu_name, kept_path, num_usable_cores, replacing_file
from hopskip.sequence import Request, Sequence
from hopskip.speculative import Source

VERSION = 3
"""Raised whenever timings of before would mislead: files of other versions are not looked at."""
MAX_ROWS = 17
"""Of one sequence: a draft of 16 tokens, and the token before it."""
MOST_ROWS = 40
"""That are timed. Beyond, costs follow the line of the last two, which lie apart enough for that."""
_ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, MAX_ROWS, 24, MOST_ROWS)
_FEW_ROWS = (1, 4, 8, MAX_ROWS, MOST_ROWS)
"""For models so large that all would take too long."""
_SHORT, _LONG = 1, 4
"""Drafts of so many tokens are timed: two points of a line."""
_SECONDS, _FEW_SECONDS = 1.5, 0.5
"""Time to spend on all numbers of rows, and on those of one setting; what it does not suffice for is timed once."""
_ALIKE, _MOST_PATIENCE = 1.1, 2.0
"""Timings within this factor are alike; until all are, timing goes on for so many times the time, on a busy machine."""
_LONG_CONTEXT = 2048
"""Positions before rows that are timed to see what a long context costs, if the model has so many."""
_CONTEXT_ROWS = 1, 8
"""So many rows are: two points of a line."""


Progress = Callable[[float], None]
"""Told the share of the time that has gone by."""


def measure(
    backend: Backend,
    exits: Seq[Exit],
    seconds: float = _SECONDS,
    progress: Progress | None = None,
    rows: Seq[int] | None = None,
) -> Costs:
    """Time rounds on a cache of their own: every number of rows in turn, and drafts by every exit.

    Each figure is the least of its repeats: whatever else the machine does only adds to it.

    Args:
        rows: time passes of so many rows only, 1 among them, at most `MOST_ROWS`; None: all that matter to a choice.
    """
    lanes = {source_of(exit): _Lane(backend, exit) for exit in exits}
    any_lane = next(iter(lanes.values()), None) or _Lane(backend, None)
    with backend.stepping():
        costs = _measure(lanes, any_lane, seconds, progress, rows)
        context = _measure_context(backend, seconds / 4)
    num_layers = backend.config.num_hidden_layers
    drafts = {
        source_of(exit): replace(costs.drafts[source_of(exit)], attention_share=_num_layers(exit) / num_layers)
        for exit in exits
    }
    return replace(costs, drafts=drafts, context=context)


def _num_layers(exit: Exit) -> int:
    """That a step of its drafts runs."""
    return exit.config.start + exit.config.num_layers if isinstance(exit, TrainedExit) else len(exit.layers)


def _measure_context(backend: Backend, seconds: float) -> ContextCost:
    """What positions cost, from passes behind a few and behind many of them, which hold zeros."""
    config = backend.config
    most = min(_LONG_CONTEXT, config.context_length - max(_CONTEXT_ROWS), config.sliding_window or _LONG_CONTEXT)
    if most <= CONTEXT:
        return ContextCost()
    lane = _Lane(backend, None, most)
    found: dict[tuple[int, int], float] = {}
    started = time.perf_counter()
    while len(found) < 4 or time.perf_counter() - started < seconds:
        for point in itertools.product((CONTEXT, most), _CONTEXT_ROWS):
            _, layer_seconds, _ = lane.run(0, point[1], point[0])
            found[point] = min(layer_seconds, found.get(point, layer_seconds))
    few, many = ((found[most, rows] - found[CONTEXT, rows]) / (most - CONTEXT) for rows in _CONTEXT_ROWS)
    row = max(0.0, (many - few) / (_CONTEXT_ROWS[1] - _CONTEXT_ROWS[0]))
    return ContextCost(read=max(0.0, few - _CONTEXT_ROWS[0] * row), row=row, window=config.sliding_window)


def _measure(
    lanes: Mapping[Source, _Lane],
    any_lane: _Lane,
    seconds: float,
    progress: Progress | None,
    rows: Seq[int] | None,
) -> Costs:
    layers, head = _Least[int](), _Least[int]()
    drafts = _Least[tuple[Source, int]]()
    for lane in (any_lane, *lanes.values()):
        # the first time, memory is mapped and an exit reads the tokens before
        lane.run(_SHORT, MOST_ROWS if rows is None else max(rows))
    started = time.perf_counter()
    all_rows = rows or (_ROWS if len(_ROWS) * sum(any_lane.run(0, MOST_ROWS)) < seconds else _FEW_ROWS)
    elapsed = 0.0
    while True:
        if progress is not None:
            progress(min(1.0, elapsed / seconds))
        for num_rows in all_rows:
            _, layer_seconds, head_seconds = any_lane.run(0, num_rows)
            layers.add(num_rows, layer_seconds)
            head.add(num_rows, head_seconds)
        for (source, lane), num_tokens in itertools.product(lanes.items(), (_SHORT, _LONG)):
            drafts.add((source, num_tokens), lane.run(num_tokens, num_tokens + 1)[0])
        elapsed = time.perf_counter() - started
        is_sure = layers.are_sure and head.are_sure and drafts.are_sure
        if elapsed > seconds and (is_sure or elapsed > _MOST_PATIENCE * seconds):
            break
    costs = {}
    for source in lanes:
        short, long = drafts[source, _SHORT], drafts[source, _LONG]
        step = max(0.0, (long - short) / (_LONG - _SHORT))
        costs[source] = DraftCost(begin=max(0.0, short - _SHORT * step), step=step)
    return Costs(layers=_rising(layers.table), head=_rising(head.table), drafts=costs)


_K = TypeVar("_K")


class _Least(Generic[_K]):
    """The least seconds of each of several things that are timed repeatedly."""

    def __init__(self) -> None:
        self._two: dict[_K, list[float]] = {}
        """The least two, rising."""

    def __getitem__(self, key: _K) -> float:
        return self._two[key][0]

    def add(self, key: _K, seconds: float) -> None:
        self._two[key] = sorted([*self._two.get(key, ()), seconds])[:2]

    @property
    def are_sure(self) -> bool:
        """Whether each has come out alike twice, so that nothing has disturbed both. One that the time suffices for
        only once is as sure as it can be."""
        return all(two[-1] <= _ALIKE * two[0] for two in self._two.values())

    @property
    def table(self) -> dict[_K, float]:
        return {key: two[0] for key, two in self._two.items()}


def _rising(table: Mapping[int, float]) -> dict[int, float]:
    """Fewer rows never cost more: where it looks so, something has disturbed them."""
    return {rows: min(seconds for more, seconds in table.items() if more >= rows) for rows in table}


class Timings:
    """The costs of one model here: from the cache folder, or timed and put there.

    Args:
        exits: the model's exits to draft from.
        identity: what distinguishes the model's weights and precision, JSON-ready; None keeps nothing.
        rows: see `measure`.
    """

    def __init__(
        self,
        backend: Backend,
        exits: Seq[Exit],
        identity: Mapping[str, object] | None = None,
        rows: Seq[int] | None = None,
    ) -> None:
        self._backend = backend
        self._exits = exits
        self._rows = rows
        traits = backend.traits
        self._key = {
            "version": VERSION,
            "cpu": cpu_name(),
            "cpus": num_usable_cores(),
            "threads": traits.threads,
            "isa": traits.instruction_set,
            "device": traits.device,
            "exits": [_describe(exit) if isinstance(exit, TrainedExit) else str(source_of(exit)) for exit in exits],
            **({} if rows is None else {"rows": list(rows)}),
            **(identity or {}),
        }
        self._path = None if identity is None else kept_path(self._key, "costs")

    @property
    def are_kept(self) -> bool:
        """Whether what is timed once is there at the next start."""
        return self._path is not None

    def get(self, progress: Progress | None = None) -> Costs:
        """The costs of before, else new ones."""
        return self._read() or self.renew(progress)

    def renew(self, progress: Progress | None = None) -> Costs:
        """Time anew, which takes a second or two, and remember that."""
        seconds = _SECONDS if self._rows is None else _FEW_SECONDS
        costs = measure(self._backend, self._exits, seconds, progress, self._rows)
        self.put(costs)
        return costs

    def put(self, costs: Costs) -> None:
        """Remember these for the next start."""
        if self._path is not None:
            text = json.dumps({"key": self._key, "costs": costs.as_json()}, indent=1)
            # losing the file costs a second at the next start, so no word of it
            with contextlib.suppress(OSError), replacing_file(self._path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")

    def _read(self) -> Costs | None:
        if self._path is None:
            return None
        try:
            found = Costs.from_json(json.loads(self._path.read_text(encoding="utf-8"))["costs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # absent or damaged: timed anew
        is_whole = found.layers.keys() == found.head.keys() >= set(self._rows or _FEW_ROWS)
        is_whole = is_whole and found.drafts.keys() == {source_of(exit) for exit in self._exits}
        return found if is_whole and all(seconds > 0 for seconds in found.layers.values()) else None


def _describe(trained: TrainedExit) -> list[object]:
    config = trained.config
    return [config.start, config.num_layers, list(config.features), len(trained.vocabulary_list)]


class _Lane:
    """Rounds of one sequence that never gets anywhere: each drafts and verifies at the same positions."""

    def __init__(self, backend: Backend, exit: Exit | None, longest: int = CONTEXT) -> None:
        self._backend = backend
        self._drafter = None if exit is None else ExitDrafter(backend, exit)
        self._taps = (self._drafter.taps if self._drafter else None) or ()
        self._cache = backend.new_cache(1, longest + MOST_ROWS)
        self._cache.clear()
        self._sequence = Sequence(Request([0] * (CONTEXT + 1)), frozenset())
        self._sequence.slot, self._sequence.num_cached = 0, CONTEXT
        self._show(0, CONTEXT)

    def run(self, num_tokens: int, num_rows: int, context: int = CONTEXT) -> tuple[float, float, float]:
        """Seconds of a draft of so many tokens, of all layers on so many rows, and of the head."""
        if num_tokens:
            self._show(CONTEXT - 1, 1)
        started = time.perf_counter()
        if self._drafter is not None and num_tokens:
            self._drafter.propose([self._sequence], [num_tokens], self._cache)
        self._backend.synchronize()
        drafted = time.perf_counter()
        rows = Rows([Segment(0, context, num_rows)])
        hidden_ND = self._backend.forward([0] * num_rows, rows, self._cache, self._taps).hidden_ND
        self._backend.synchronize()
        passed = time.perf_counter()
        self._backend.greedy(hidden_ND)
        return drafted - started, passed - drafted, time.perf_counter() - passed

    def _show(self, start: int, count: int) -> None:
        """A trained exit with layers wants to have seen the tokens before the last."""
        if self._drafter is not None and self._drafter.taps is not None:
            some_ND = self._backend.embed([0] * count)
            self._drafter.observe(
                Rows([Segment(0, start, count)]), self._backend.xp.stack([some_ND] * len(self._taps), axis=1)
            )
