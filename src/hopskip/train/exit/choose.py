"""Which exit is the fastest: every candidate decodes held-out prompts, in turn with plain decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean, stdev
from typing import Any, Protocol, TypeVar

import torch

from hopskip.backends.base import Backend
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.base import Round
from hopskip.engine.engine import Engine, make_engine
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence, SpeculativeStats
from hopskip.speculative import SpeculativeConfig
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.recipe import SearchRecipe
from hopskip.train.exit.vocabulary import answers_of

_SURE = 0.06
"""The width, over the gain itself, within which a gain is called known."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trained exit with one draft vocabulary, draft length and number of runner-ups, and how fast it is."""

    trained_exit: TrainedExit
    speedup: float
    """Decoding speed over that of plain decoding."""
    low: float
    high: float
    """Between which it lies, by the spread of the runs, in 19 of 20 cases."""
    num_runs: int

    @property
    def described(self) -> str:
        return f"{self.speedup:.2f} x ({self.low:.2f} to {self.high:.2f})"

    @property
    def shape(self) -> str:
        exit = self.trained_exit
        return (
            f"{exit.num_draft_tokens} draft tokens from a vocabulary of {len(exit.vocabulary):,} and "
            f"{exit.num_runner_ups} runner-ups"
        )

    @property
    def tokens_per_pass(self) -> float:
        return float(self.trained_exit.notes["held_out_tokens_per_pass"])

    def as_json(self) -> dict[str, Any]:
        exit = self.trained_exit
        measured = ("held_out_coverage", "held_out_tokens_per_pass", "held_out_acceptance")
        return {
            **asdict(exit.config),
            "vocabulary": len(exit.vocabulary),
            "num_draft_tokens": exit.num_draft_tokens,
            "num_runner_ups": exit.num_runner_ups,
            "over_plain_decoding": round(self.speedup, 3),
            "between": [round(self.low, 3), round(self.high, 3)],
            "num_runs": self.num_runs,
            **{name: exit.notes[name] for name in measured},
        }


def measure(
    backend: Backend,
    trained: TrainedExit,
    held_out: Seq[Conversation],
    search: SearchRecipe,
    eos_token_ids: Seq[int],
    notes: Mapping[str, Any],
) -> Iterator[Candidate]:
    """A trained exit with every shape of draft.

    Args:
        backend: without an exit; `trained` is attached to it.
        notes: how the exit was made; what is measured is added.
    """
    backend.attach_exit(trained)
    prompts = [c.prompt for c in held_out[: search.num_prompts]]
    coverage = float(torch.isin(answers_of(held_out), torch.tensor(trained.vocabulary_list)).float().mean())
    plain = make_engine(backend, SpeculativeConfig(draft="none"), eos_token_ids=eos_token_ids)
    racers = []
    for length, num_runner_ups in product(search.num_draft_tokens, search.num_runner_ups):
        setting = SpeculativeConfig(draft="exit-branch", num_draft_tokens=length, num_runner_ups=num_runner_ups)
        racers.append(_Racer(make_engine(backend, setting, eos_token_ids=eos_token_ids), length, num_runner_ups))
    race(
        racers,
        prompts,
        lambda prompt: _decode(plain, prompt, search).stats.decode_seconds,
        lambda racer, prompt: racer.count(_decode(racer.engine, prompt, search).stats),
        search,
    )
    for racer in racers:
        measured = {
            "held_out_coverage": round(coverage, 4),
            "held_out_tokens_per_pass": round(racer.tokens_per_pass, 3),
            "held_out_acceptance": [round(share, 4) for share in racer.acceptance.shares],
        }
        found = replace(
            trained,
            num_draft_tokens=racer.num_draft_tokens,
            num_runner_ups=racer.num_runner_ups,
            notes={**notes, **measured},
        )
        middle, low, high = spread(racer.logs)
        # a pass with drafts takes no less than one without: what is above can only be noise
        bound = racer.tokens_per_pass
        yield Candidate(
            trained_exit=found,
            speedup=min(middle, bound),
            low=min(low, bound),
            high=min(high, bound),
            num_runs=len(racer.logs),
        )


class Timed(Protocol):
    """What takes part in a race."""

    logs: list[float]
    """Logarithms of plain decoding's seconds over its own, prompt by prompt."""


_T = TypeVar("_T", bound=Timed)


def race(
    racers: Seq[_T],
    prompts: Seq[list[int]],
    plain: Callable[[list[int]], float],
    run: Callable[[_T, list[int]], float],
    search: SearchRecipe,
) -> None:
    """Let all run in turn with plain decoding, prompt by prompt, as a machine's speed changes within seconds. Those
    that are behind beyond the noise drop out, until one is left whose gain is known well enough, or until the repeats
    are over.

    Args:
        plain: decodes a prompt plainly; both give the seconds of decoding.
    """
    left = list(racers)
    for repeat in range(1, search.max_repeats + 1):
        for prompt in prompts:
            slow = plain(prompt)
            for racer in left:
                racer.logs.append(math.log(slow / run(racer, prompt)))
        if repeat < search.repeats:
            continue
        best = max(left, key=lambda racer: fmean(racer.logs))
        left = [racer for racer in left if racer is best or not _is_behind(racer, best)]
        middle, low, high = spread(best.logs)
        is_decided = low >= search.least_speedup or high < search.least_speedup
        if len(left) == 1 and is_decided and high - low < _SURE * middle:
            return


def _is_behind(racer: Timed, best: Timed) -> bool:
    """Whether a racer is slower than the best on the same prompts at the same times, beyond the noise."""
    _, low, _ = spread([ours - theirs for ours, theirs in zip(best.logs, racer.logs, strict=True)])
    return low > 1


def spread(logs: Seq[float]) -> tuple[float, float, float]:
    """The mean of ratios whose logarithms these are, and between what it lies in 19 of 20 cases, roughly.

    >>> spread([0.0, 0.0])
    (1.0, 1.0, 1.0)
    """
    error = 2 * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return math.exp(fmean(logs)), math.exp(fmean(logs) - error), math.exp(min(700.0, fmean(logs) + error))


class _Racer:
    """One draft length and number of runner-ups."""

    def __init__(self, engine: Engine, num_draft_tokens: int, num_runner_ups: int) -> None:
        self.engine = engine
        self.num_draft_tokens, self.num_runner_ups = num_draft_tokens, num_runner_ups
        self.logs: list[float] = []
        self.acceptance = _Acceptance(num_draft_tokens)
        engine.on_round = self.acceptance
        self._num_tokens = self._num_passes = 0

    def count(self, stats: SpeculativeStats) -> float:
        """Add a text; its seconds."""
        self._num_tokens += stats.num_tokens - 1
        self._num_passes += stats.num_target_passes
        return stats.decode_seconds

    @property
    def tokens_per_pass(self) -> float:
        return self._num_tokens / max(1, self._num_passes)


def _decode(engine: Engine, prompt: list[int], search: SearchRecipe) -> Sequence:
    sequence = engine.add(Request(prompt, SamplingParams(max_new_tokens=search.max_new_tokens)))
    while not sequence.is_finished:
        engine.step()
    return sequence


class _Acceptance:
    """Shares of drafts whose first 1, 2, .. tokens were all accepted, without runner-ups: where draft `auto` starts."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_drafts = 0
        self._num_accepted = [0] * num_draft_tokens

    def __call__(self, outcome: Round) -> None:
        for part in outcome.sequences:
            self._num_drafts += part.source is not None
            for place in range(part.num_accepted_tokens - (part.runner_up is not None)):
                self._num_accepted[place] += 1

    @property
    def shares(self) -> list[float]:
        return [number / max(1, self._num_drafts) for number in self._num_accepted]
