"""Which exit is the fastest: every candidate decodes held-out prompts, in turn with plain decoding."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hopskip.backends.base import Backend
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.draft.base import Round
from hopskip.engine.engine import Engine, make_engine
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.recipe import SearchRecipe


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trained exit with one draft vocabulary, draft length and number of runner-ups, and how fast it is."""

    trained_exit: TrainedExit
    speedup: float
    """Decoding speed over that of plain decoding; the median of the repeats."""

    @property
    def shape(self) -> str:
        exit = self.trained_exit
        return f"{exit.num_draft_tokens} draft tokens of {len(exit.vocabulary)} and {exit.num_runner_ups} runner-ups"

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
            **{name: exit.notes[name] for name in measured},
        }


def draft_vocabulary(conversations: Seq[Conversation], size: int) -> Tensor:
    """The tokens that the model's own answers use most, rising: int64 [at most size]."""
    counts = _answers(conversations).bincount()
    return counts.argsort(descending=True, stable=True)[: min(size, int((counts > 0).sum()))].sort().values


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
    prompts = [c.ids_T[: c.num_prompt_tokens].tolist() for c in held_out[: search.num_prompts]]
    coverage = float(torch.isin(_answers(held_out), torch.tensor(trained.vocabulary_list)).float().mean())
    plain = make_engine(backend, SpeculativeConfig(draft="none"), eos_token_ids=eos_token_ids)
    for length, num_runner_ups in product(search.num_draft_tokens, search.num_runner_ups):
        setting = SpeculativeConfig(draft="exit-branch", num_draft_tokens=length, num_runner_ups=num_runner_ups)
        drafting = make_engine(backend, setting, eos_token_ids=eos_token_ids)
        acceptance = _Acceptance(length)
        drafting.on_round = acceptance
        speedup, tokens_per_pass = _race(plain, drafting, prompts, search)
        measured = {
            "held_out_coverage": round(coverage, 4),
            "held_out_tokens_per_pass": round(tokens_per_pass, 3),
            "held_out_acceptance": [round(share, 4) for share in acceptance.shares],
        }
        found = replace(trained, num_draft_tokens=length, num_runner_ups=num_runner_ups, notes={**notes, **measured})
        yield Candidate(trained_exit=found, speedup=speedup)


def _race(plain: Engine, drafting: Engine, prompts: Seq[list[int]], search: SearchRecipe) -> tuple[float, float]:
    """Speed over plain decoding, and tokens per pass. The two take turns prompt by prompt, as a machine's speed changes
    within seconds."""
    ratios: list[float] = []
    num_tokens = num_passes = 0
    for _ in range(search.repeats):
        slow = fast = 0.0
        for prompt in prompts:
            slow += _decode(plain, prompt, search).stats.decode_seconds
            stats = _decode(drafting, prompt, search).stats
            fast += stats.decode_seconds
            num_tokens += stats.num_tokens - 1
            num_passes += stats.num_target_passes
        ratios.append(slow / fast)
    return statistics.median(ratios), num_tokens / max(1, num_passes)


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


def _answers(conversations: Seq[Conversation]) -> Tensor:
    return torch.cat([c.ids_T[c.num_prompt_tokens :] for c in conversations])
