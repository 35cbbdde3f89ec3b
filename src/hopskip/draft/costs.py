"""What a draft step and a verify pass cost here: timed once per machine, model, precision and threads, then remembered.

The timings are of whole rounds, drafts and passes in turn as they are in use: each finds the processor's caches as the
other left them, which timings of one alone do not show.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hopskip import native
from hopskip.branch import ExitBranch
from hopskip.cache import Rows, Segment
from hopskip.draft.exit import ExitDrafter
from hopskip.draft.self_draft import SelfDraft, early_exit
from hopskip.model import Model, run_tapped, torch_beside
from hopskip.packed import cache_folder
from hopskip.sampling import SamplingParams
from hopskip.sequence import Sequence

VERSION = 2
"""Raised whenever timings of before would mislead: files of other versions are not looked at."""
MAX_ROWS = 17
"""Of one sequence: a draft of 16 tokens, and the token before it."""
_MOST_ROWS = 40
"""That are timed. Beyond, costs follow the line of the last two, which lie apart enough for that."""
_ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, MAX_ROWS, 24, _MOST_ROWS)
_FEW_ROWS = (1, 4, 8, MAX_ROWS, _MOST_ROWS)
"""For models so large that all would take too long."""
_SHORT, _LONG = 1, 4
"""Drafts of so many tokens are timed: two points of a line."""
_SECONDS = 1.5
"""Time to spend; what it does not suffice for is timed once."""
_CONTEXT = 128
"""Positions before the timed rows."""


@dataclass(frozen=True, kw_only=True)
class DraftCost:
    """Seconds of a greedy draft of one sequence: `begin + k * step` for k tokens."""

    begin: float
    step: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured costs, in seconds."""

    layers: Mapping[int, float]
    """All layers on one sequence, by the rows of the pass; rows rising from 1."""
    head: Mapping[int, float]
    """The best token of each row, by rows."""
    drafts: Mapping[str, DraftCost]
    """By source."""

    def pass_seconds(self, num_rows: int) -> float:
        """A pass of any number of rows, with the head."""
        return interpolated(self.layers, num_rows) + interpolated(self.head, num_rows)


def interpolated(table: Mapping[int, float], num_rows: int) -> float:
    """Between two rows of a table by a straight line, beyond the last on the line of the last two.

    >>> interpolated({1: 10.0, 5: 14.0}, 3), interpolated({1: 10.0, 5: 14.0}, 9)
    (12.0, 18.0)
    """
    if num_rows in table:
        return table[num_rows]
    rows = sorted(table)
    above = next((i for i, known in enumerate(rows) if known > num_rows), len(rows) - 1)
    low, high = rows[above - 1], rows[above]
    slope = (table[high] - table[low]) / (high - low)
    # noise may make the last two fall; more rows never cost less than the last
    return (
        table[low] + slope * (num_rows - low) if num_rows < high else table[high] + max(0.0, slope) * (num_rows - high)
    )


Exit = int | SelfDraft | ExitBranch
"""What `ExitDrafter` drafts from."""


def source_name(exit: Exit) -> str:
    """What an exit is called in cost tables, traces and statistics of acceptance."""
    if isinstance(exit, ExitBranch):
        return "exit-branch"
    return (early_exit(exit) if isinstance(exit, int) else exit).name


def measure(model: Model, exits: Seq[Exit], seconds: float = _SECONDS) -> Costs:
    """Time rounds on a cache of their own: every number of rows in turn, and drafts by every exit.

    Each figure is the least of its repeats: whatever else the machine does only adds to it.
    """
    lanes = {source_name(exit): _Lane(model, exit) for exit in exits}
    any_lane = next(iter(lanes.values()), None) or _Lane(model, None)
    with torch_beside(model):
        return _measure(lanes, any_lane, seconds)


def _measure(lanes: Mapping[str, _Lane], any_lane: _Lane, seconds: float) -> Costs:
    layers: dict[int, float] = {}
    head: dict[int, float] = {}
    drafts: dict[tuple[str, int], float] = {}
    for lane in (any_lane, *lanes.values()):
        lane.run(_SHORT, _MOST_ROWS)  # the first time, memory is mapped and a branch reads the tokens before
    started = time.perf_counter()
    all_rows = _ROWS if len(_ROWS) * sum(any_lane.run(0, _MOST_ROWS)) < seconds else _FEW_ROWS
    is_first = True
    while is_first or time.perf_counter() - started < seconds:
        is_first = False
        for num_rows in all_rows:
            _, layer_seconds, head_seconds = any_lane.run(0, num_rows)
            layers[num_rows] = min(layer_seconds, layers.get(num_rows, layer_seconds))
            head[num_rows] = min(head_seconds, head.get(num_rows, head_seconds))
        for (name, lane), num_tokens in itertools.product(lanes.items(), (_SHORT, _LONG)):
            draft_seconds, _, _ = lane.run(num_tokens, num_tokens + 1)
            drafts[name, num_tokens] = min(draft_seconds, drafts.get((name, num_tokens), draft_seconds))
    costs = {}
    for name in lanes:
        short, long = drafts[name, _SHORT], drafts[name, _LONG]
        step = max(0.0, (long - short) / (_LONG - _SHORT))
        costs[name] = DraftCost(begin=max(0.0, short - _SHORT * step), step=step)
    return Costs(layers=_rising(layers), head=_rising(head), drafts=costs)


def _rising(table: Mapping[int, float]) -> dict[int, float]:
    """Fewer rows never cost more: where it looks so, something has disturbed them."""
    return {rows: min(seconds for more, seconds in table.items() if more >= rows) for rows in table}


class Timings:
    """The costs of one model here: from the cache folder, or timed and put there.

    Args:
        exits: the model's exits to draft from.
        identity: what distinguishes the model's weights and precision, JSON-ready; None keeps nothing.
    """

    def __init__(self, model: Model, exits: Seq[Exit], identity: Mapping[str, object] | None = None) -> None:
        self._model = model
        self._exits = exits
        self._key = {
            "version": VERSION,
            "cpu": cpu_name(),
            "cpus": native.default_threads(),
            "threads": getattr(model, "threads", torch.get_num_threads()),
            "isa": getattr(model, "isa", f"torch {torch.__version__}"),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
            "exits": [_describe(exit) if isinstance(exit, ExitBranch) else source_name(exit) for exit in exits],
            **(identity or {}),
        }
        self._path = None if identity is None else kept_path(self._key, "costs")

    def get(self) -> Costs:
        """The costs of before, else new ones."""
        return self._read() or self.renew()

    def renew(self) -> Costs:
        """Time anew, and remember that."""
        costs = measure(self._model, self._exits)
        self.put(costs)
        return costs

    def put(self, costs: Costs) -> None:
        """Remember these for the next start."""
        if self._path is not None:
            text = json.dumps({"key": self._key, "costs": asdict(costs)}, indent=1)
            # losing the file costs a second at the next start, so no word of it
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                partial = self._path.with_suffix(f".{os.getpid()}")
                partial.write_text(text + "\n", encoding="utf-8")
                partial.replace(self._path)

    def _read(self) -> Costs | None:
        if self._path is None:
            return None
        try:
            costs: Any = json.loads(self._path.read_text(encoding="utf-8"))["costs"]
            found = Costs(
                layers={int(rows): float(seconds) for rows, seconds in costs["layers"].items()},
                head={int(rows): float(seconds) for rows, seconds in costs["head"].items()},
                drafts={
                    source: DraftCost(begin=float(cost["begin"]), step=float(cost["step"]))
                    for source, cost in costs["drafts"].items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # absent or damaged: timed anew
        is_whole = found.layers.keys() == found.head.keys() >= set(_FEW_ROWS)
        is_whole = is_whole and found.drafts.keys() == {source_name(exit) for exit in self._exits}
        return found if is_whole and all(seconds > 0 for seconds in found.layers.values()) else None


def kept_path(key: Mapping[str, object], kind: str) -> Path | None:
    """The file of the cache folder that keeps what was found for such a key; None if nothing is kept."""
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / f"{digest[:32]}.{kind}.json"


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _describe(branch: ExitBranch) -> list[object]:
    config = branch.config
    return [config.start, config.num_layers, list(config.features), len(branch.vocabulary)]


class _Lane:
    """Rounds of one sequence that never gets anywhere: each drafts and verifies at the same positions."""

    def __init__(self, model: Model, exit: Exit | None) -> None:
        self._model = model
        self._drafter = None if exit is None else ExitDrafter(model, exit)
        self._taps = (self._drafter.taps if self._drafter else None) or ()
        self._cache = model.new_cache(1, _CONTEXT + _MOST_ROWS)
        for tensor in self._cache.tensors:
            tensor.zero_()  # what lies in fresh memory may be slow to compute with
        self._sequence = Sequence([0] * (_CONTEXT + 1), SamplingParams(), frozenset(), model.config.vocab_size)
        self._sequence.slot, self._sequence.num_cached = 0, _CONTEXT
        self._show(0, _CONTEXT)

    def run(self, num_tokens: int, num_rows: int) -> tuple[float, float, float]:
        """Seconds of a draft of so many tokens, of all layers on so many rows, and of the head."""
        if num_tokens:
            self._show(_CONTEXT - 1, 1)
        started = time.perf_counter()
        if self._drafter is not None and num_tokens:
            self._drafter.propose([self._sequence], [num_tokens], self._cache)
        drafted = time.perf_counter()
        rows = Rows([Segment(0, _CONTEXT, num_rows)])
        h_ND = self._model.embed(torch.zeros(num_rows, dtype=torch.int32))
        h_ND, _ = run_tapped(self._model, h_ND, self._taps, rows, self._cache)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        passed = time.perf_counter()
        self._model.greedy(h_ND).tolist()
        return drafted - started, passed - drafted, time.perf_counter() - passed

    def _show(self, start: int, count: int) -> None:
        """A branch with layers wants to have seen the tokens before the last."""
        if self._drafter is not None and self._drafter.taps is not None:
            states_NAD = torch.zeros((count, len(self._drafter.taps), self._model.config.hidden_size))
            states_NAD = states_NAD.to(self._model.device, getattr(self._model, "dtype", torch.float32))
            self._drafter.observe(Rows([Segment(0, start, count)]), states_NAD)
