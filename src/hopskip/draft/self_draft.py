"""Drafts without training: the model's own layers, all or some, in its own precision or a lower one.

The first layers are an early exit (arXiv 2404.16710). All but some are layer skipping (Draft & Verify, 2309.08168;
SWIFT, 2410.06916); which ones, a short search finds: `search`. All of them in fewer bits are a quantized self-draft
(QuantSpec, 2502.10424). In any case they read keys and values that the model itself has left of the tokens before.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hopskip.cache import Rows, Segment
from hopskip.model import DraftPart, Model, run_by_number, torch_beside

DraftPrecision = Literal["q8", "q4"]

_NUM_TEXTS, _LENGTH = 4, 96
"""Of the model's own, that layers are tried on."""
_NUM_CANDIDATES = 4
"""Layers that are tried for each one to be skipped: those that were missed least when each was skipped alone."""
_SECONDS = 30.0
"""The search takes what it has found by then."""
_VERSION = 1
"""Raised whenever the search changes: what others have found is not looked at."""


@dataclass(frozen=True, kw_only=True)
class SelfDraft:
    """Which of a model's layers a draft runs, and how."""

    source: Literal["early-exit", "layer-skip"]
    layers: tuple[int, ...]
    """Rising."""
    precision: DraftPrecision | None = None
    """None: the model's own."""

    @property
    def name(self) -> str:
        """In traces, cost tables and statistics of acceptance: `early-exit:8`, `layer-skip:24-q4`."""
        return f"{self.source}:{len(self.layers)}" + (f"-{self.precision}" if self.precision else "")

    def part_of(self, model: Model) -> DraftPart:
        """What it runs of this model."""
        if self.precision is None:
            return DraftPart(self.layers, None, model.unembed)
        # only a model that can have copies is asked for one
        return cast(DraftPart, cast(Any, model).draft_part(self.layers, self.precision))


def early_exit(exit_layer: int, precision: DraftPrecision | None = None) -> SelfDraft:
    return SelfDraft(source="early-exit", layers=tuple(range(exit_layer)), precision=precision)


def without(skipped: Seq[int], num_layers: int, precision: DraftPrecision | None = None) -> SelfDraft:
    """All layers but these."""
    layers = tuple(layer for layer in range(num_layers) if layer not in skipped)
    return SelfDraft(source="layer-skip", layers=layers, precision=precision)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found."""

    skip_layers: tuple[int, ...]
    agreement: float
    """Share of tokens on which such a draft and the model agree."""


def search(model: Model, precision: DraftPrecision | None, path: Path | None = None) -> Found:
    """Find the layers that a draft can do without.

    Texts that the model itself writes, from its first token on at temperature 1, are read once with all layers and once
    without some; what counts is how often the best next token is the same, and how much time the draft would save.
    Layers are ranked by how little each alone is missed, then left out one after the other, each time the one of the
    next few that is missed least. Best is the draft of most tokens per second, by arithmetic on timed passes.

    Args:
        path: of a file that keeps the result; None keeps nothing.
    """
    if path is not None and (known := _read(path, model.config.num_hidden_layers)) is not None:
        return known
    with torch_beside(model):
        found = _Search(model, precision).run()
    if path is not None:
        # losing the file costs another search, so no word of it
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"version": _VERSION, **vars(found)}) + "\n", encoding="utf-8")
            partial.replace(path)
    return found


def _read(path: Path, num_layers: int) -> Found | None:
    try:
        kept: Any = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("version") != _VERSION:
            return None
        skip_layers = tuple(int(layer) for layer in kept["skip_layers"])
        is_sound = set(skip_layers) < set(range(num_layers))
        return Found(skip_layers=skip_layers, agreement=float(kept["agreement"])) if is_sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged


class _Search:
    def __init__(self, model: Model, precision: DraftPrecision | None) -> None:
        self._model = model
        self._precision = precision
        self._depth = model.config.num_hidden_layers
        self._cache = model.new_cache(_NUM_TEXTS, min(_LENGTH, model.config.max_position_embeddings))
        self._ids_N = self._write()
        everything = without((), self._depth)
        self._best_N = self._read(everything)
        self._pass_seconds = self._time(everything)
        self._step_seconds = self._time(without((), self._depth, precision))
        self._head_seconds = self._time(SelfDraft(source="layer-skip", layers=(), precision=precision))

    def run(self) -> Found:
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

    def _judge(self, skipped: tuple[int, ...]) -> tuple[float, Found]:
        """Expected speed-up of the draft without these layers, at its best length."""
        agreement = self._agreement(skipped)
        share = 1 - len(skipped) / self._depth
        step = self._head_seconds + share * (self._step_seconds - self._head_seconds)
        gains = []
        for length in range(1, 9):
            tokens = sum(agreement**place for place in range(length + 1))
            gains.append(tokens / (1 + length * step / self._pass_seconds))
        return max(gains), Found(skip_layers=skipped, agreement=agreement)

    def _agreement(self, skipped: Seq[int]) -> float:
        best_N = self._read(without(skipped, self._depth, self._precision))
        return float((best_N == self._best_N).float().mean())

    def _read(self, draft: SelfDraft) -> Tensor:
        """The best next token after each of the texts' tokens."""
        rows = Rows(Segment(slot, 0, self._cache.length) for slot in range(_NUM_TEXTS))
        part = draft.part_of(self._model)
        h_ND = run_by_number(self._model, self._model.embed(self._ids_N), part.layers, rows, self._cache)
        return part.unembed(h_ND).argmax(dim=-1)

    def _time(self, draft: SelfDraft) -> float:
        """Seconds of a pass of one row, head included; the least of a few."""
        part = draft.part_of(self._model)
        rows = Rows([Segment(0, self._cache.length - 1, 1)])
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            h_ND = run_by_number(self._model, self._model.embed(self._ids_N[:1]), part.layers, rows, self._cache)
            part.unembed(h_ND).argmax().item()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _write(self) -> Tensor:
        """Texts of the model's own, int32 [texts * length], one after the other."""
        generator = torch.Generator().manual_seed(0)
        config = self._model.config
        first = 0 if config.bos_token_id is None else config.bos_token_id
        texts = torch.full((_NUM_TEXTS, 1), first, dtype=torch.int32)
        for position in range(self._cache.length - 1):
            rows = Rows(Segment(slot, position, 1) for slot in range(_NUM_TEXTS))
            h_ND = self._model.run_layers(self._model.embed(texts[:, -1]), 0, self._depth, rows, self._cache)
            probs_NV = self._model.unembed(h_ND).float().softmax(dim=-1).cpu()
            drawn = torch.multinomial(probs_NV, 1, generator=generator)
            texts = torch.cat((texts, drawn.int()), dim=1)
        return texts.flatten()
