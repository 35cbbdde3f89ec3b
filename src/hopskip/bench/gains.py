"""What each kind of draft may be expected to gain for a model: by measured costs, or by arithmetic on its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import NamedTuple

from hopskip.bench.expected import MAX_DRAFT_TOKENS, ModelCosts
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.advice import usual_acceptance, usual_survival
from hopskip.draft.costs import Costs, DraftCost
from hopskip.speculative import LOOKUP, TRAINED_EXIT, Source, early_exit, layer_skip

_ROW = 0.05
"""Of a pass that a further row costs, as five rows take 1.2 times one on the native engine."""


class Gain(NamedTuple):
    """Of one kind of draft, at its best length."""

    source: Source
    low: float
    high: float
    """Speed over plain decoding, from the least to the most that is usual; both the same where more is known."""
    why: str
    """Where the acceptance is from."""


def modelled_costs(costs: ModelCosts, exit_bytes: int, copy_bytes: Mapping[str, int], exit_layer: int | None) -> Costs:
    """In units of a pass of one row, which takes as long as reading its weights.

    Args:
        exit_bytes: that a draft step of a trained exit reads.
        copy_bytes: by precision, that a step of a copy reads.
        exit_layer: of early-exit drafts, if the model can have any.
    """
    depth, whole = len(costs.layer_bytes), costs.bytes_per_pass
    drafts = {TRAINED_EXIT: DraftCost(begin=0.0, step=exit_bytes / whole)}
    for precision, size in copy_bytes.items():
        source = layer_skip((), depth, precision).source  # type: ignore[arg-type]
        drafts[source] = DraftCost(begin=0.0, step=size / whole)
    if exit_layer is not None:
        drafts[early_exit(exit_layer).source] = DraftCost(begin=0.0, step=costs.draft_step_cost(exit_layer))
    head = costs.head_bytes / whole
    most = 1 + MAX_DRAFT_TOKENS
    layers = {rows: 1 - head + _ROW * (rows - 1) for rows in (1, most)}
    return Costs(layers=layers, head=dict.fromkeys(layers, head), drafts=drafts)


def with_measured(modelled: Costs, measured: Costs) -> Costs:
    """Measured costs, and for sources that were not there to be measured what bytes say of them."""
    unit = measured.pass_seconds(1)
    rest = {
        source: replace(cost, begin=cost.begin * unit, step=cost.step * unit)
        for source, cost in modelled.drafts.items()
        if source not in measured.drafts
    }
    return replace(measured, drafts={**measured.drafts, **rest})


def gains(costs: Costs, model: ModelConfig, trained_exit: TrainedExit | None) -> list[Gain]:
    """Of every source of the table, and of lookup: the best first."""
    found = []
    for source in (*costs.drafts, LOOKUP):
        usual = usual_acceptance(source, model)
        if source == TRAINED_EXIT and trained_exit is not None and trained_exit.notes.get("held_out_acceptance"):
            survival = usual_survival(source, MAX_DRAFT_TOKENS, model, trained_exit)
            best = _best(costs, source, survival)
            found.append(Gain(source, best, best, "acceptance as its training has measured it"))
            continue
        low, high = ([rate**i for i in range(1, MAX_DRAFT_TOKENS + 1)] for rate in usual)
        found.append(Gain(source, _best(costs, source, low), _best(costs, source, high), _why(source, model)))
    return sorted(found, key=lambda gain: -gain.low - gain.high if gain.source != LOOKUP else 0.0)


def _best(costs: Costs, source: Source, survival: Seq[float]) -> float:
    """At the best length, or without drafts."""
    own = None if source == LOOKUP else source
    return max(costs.speedup(own, survival[:length]) for length in range(len(survival) + 1))


def _why(source: Source, model: ModelConfig) -> str:
    low, high = (f"{rate:.0%}" for rate in usual_acceptance(source, model))
    if source == LOOKUP:
        return "nothing on new text, the most where it repeats its prompt word by word"
    untrained = source.kind == "early-exit" and model.recommended_exit_layer is None
    kind = "of exits nobody has trained" if untrained else "as is usual"
    return f"{low} to {high} of its tokens accepted, {kind}"
