"""Which drafts are slower than plain decoding, and what is said of them.

Before an answer that follows from costs and from what is usual for a source; after it, from what it has shown.
"""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

from hopskip.backends.base import Backend
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit, shipped_exit
from hopskip.draft.costs import Costs
from hopskip.draft.gain import GainEstimate
from hopskip.errors import SlowDraftWarning
from hopskip.speculative import TRAINED_EXIT, Source, SpeculativeConfig

SLOW = 0.95
"""Speed over plain decoding below which a draft is called slower: estimates are no better."""
_ENOUGH_TOKENS = 48
"""That a verdict on what was seen needs."""


class Usual(NamedTuple):
    """How many draft tokens are usually accepted, of those whose predecessors were: from, to."""

    low: float
    high: float

    def survival(self, num_tokens: int) -> list[float]:
        """At best: the probabilities that the first 1, 2, .. tokens are all accepted."""
        return [self.high**place for place in range(1, num_tokens + 1)]


def usual_acceptance(source: Source, model: ModelConfig) -> Usual:
    """Of greedy answers to ordinary questions, by what was measured and published (`docs/speculation.md`). Of lookup
    it depends on the text alone: nothing, or nearly everything."""
    if source == TRAINED_EXIT:
        return Usual(0.5, 0.75)
    if source.kind == "layer-skip" or source.precision is not None:
        by_precision = {"q8": Usual(0.85, 0.95), "q4": Usual(0.5, 0.95), None: Usual(0.4, 0.85)}
        whole = by_precision[source.precision]
        if source.kind == "layer-skip":
            return whole
    if source.kind == "early-exit":
        if model.recommended_exit_layer is not None:
            return Usual(0.6, 0.85)
        # nobody trained them: nearly nothing but close to the last layer
        return Usual(0.0, max(0.1, ((source.num_layers or 0) / model.num_hidden_layers) ** 4))
    return Usual(0.0, 0.95)


def usual_survival(
    source: Source, num_tokens: int, model: ModelConfig, trained_exit: TrainedExit | None
) -> list[float]:
    """The probabilities that the first 1, 2, .. tokens are all accepted: of a trained exit as its training has noted
    them, further ones falling on as the last; else what is usual at best."""
    known = list(trained_exit.notes.get("held_out_acceptance", ())) if source == TRAINED_EXIT and trained_exit else []
    if not known:
        return usual_acceptance(source, model).survival(num_tokens)
    rate = known[-1] ** (1 / len(known))
    return [known[i] if i < len(known) else known[-1] * rate ** (i + 1 - len(known)) for i in range(num_tokens)]


def expected_speedup_of(
    speculative: SpeculativeConfig, costs: Costs, model: ModelConfig, trained_exit: TrainedExit | None
) -> float | None:
    """Speed over plain decoding of a fixed draft from an exit, as is usual at best. None without one: what lookup
    brings depends on the text.

    Args:
        speculative: as it was resolved.
        costs: of the model with that exit.
    """
    source = next(iter(costs.drafts), None)
    if source is None or speculative.draft == "auto":
        return None
    survival = usual_survival(source, speculative.num_draft_tokens or 0, model, trained_exit)
    return costs.speedup(source, survival, speculative.num_runner_ups or 0)


class Advice:
    """Warns once of a fixed draft that is slower than plain decoding. Draft `auto` needs none: it goes by costs.

    Args:
        speculative: as it was resolved.
        expected: see `expected_speedup_of`.
        gain: as answers show it.
        has_trained_exit: whether one is at hand for the model, in use or not.
    """

    def __init__(
        self,
        speculative: SpeculativeConfig,
        expected: float | None = None,
        gain: GainEstimate | None = None,
        *,
        has_trained_exit: bool = False,
    ) -> None:
        self._gain = gain
        self._draft = speculative.draft
        self._expected = expected
        self._has_trained_exit = has_trained_exit
        self._is_due = speculative.draft not in ("auto", "none")

    @classmethod
    def of(
        cls, speculative: SpeculativeConfig, gain: GainEstimate | None, backend: Backend, fingerprint: str
    ) -> Advice:
        """For an engine.

        Args:
            fingerprint: of the model's weights.
        """
        trained_exit = backend.trained_exit
        expected = None if gain is None else expected_speedup_of(speculative, gain.costs, backend.config, trained_exit)
        has_trained_exit = trained_exit is not None or shipped_exit(fingerprint) is not None
        return cls(speculative, expected, gain, has_trained_exit=has_trained_exit)

    def warn_before(self) -> None:
        """Before any answer, where costs and what is usual say so."""
        if self._expected is not None and self._expected < SLOW:
            where = ", where the text does not repeat itself," if self._draft == "both" else ""
            self._warn(f"is expected{where} to be slower than plain decoding ({self._expected:.2f} x)")

    def warn_after(self) -> None:
        """Once answers have shown it."""
        gain = self._gain
        if gain is not None and gain.num_tokens >= _ENOUGH_TOKENS and gain.speedup < SLOW:
            self._warn(f"has been slower than plain decoding (an estimated {gain.speedup:.2f} x)")

    def _warn(self, what: str) -> None:
        if self._is_due:
            self._is_due = False
            better = (
                "takes this model's trained exit, or lookup, where it pays"
                if self._has_trained_exit
                else "drafts only what pays"
            )
            warnings.warn(
                f"draft {self._draft!r}, as it is set, {what}; draft 'auto' without further options {better}",
                SlowDraftWarning,
                stacklevel=_levels_to_caller(),
            )


def _levels_to_caller() -> int:
    """From the function that calls this up to the first that is not hopskip's own: who is to be warned."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    return level
