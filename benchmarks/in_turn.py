"""Contenders that decode the same prompts in turn, and must write the same."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from hopskip import LLM, SamplingParams
from hopskip.llm import GenerationResult, Prompt

Results = dict[str, list[GenerationResult]]
"""By contender, one for each prompt."""


def results_in_turn(
    contenders: Mapping[str, LLM], prompts: Seq[Prompt], params: SamplingParams, repeats: int
) -> list[Results]:
    """Decode all prompts one after the other, each by every contender before the next, as a machine's speed changes
    within seconds.

    Returns:
        The results of each repeat.

    Raises:
        AssertionError: a contender writes other tokens than the first.
    """
    found: list[Results] = []
    for _ in range(repeats):
        results: Results = {name: [] for name in contenders}
        for prompt in prompts:
            for name, llm in contenders.items():
                results[name].append(llm.generate([prompt], params)[0])
        first, *others = results
        expected = [result.token_ids for result in results[first]]
        for name in others:
            got = [result.token_ids for result in results[name]]
            assert got == expected, f"{name} wrote other text than {first}"
        found.append(results)
    return found


def decode_in_turn(
    contenders: Mapping[str, LLM], prompts: Seq[Prompt], params: SamplingParams, repeats: int
) -> dict[str, dict[str, float]]:
    """As `results_in_turn`, one of the contenders being called `plain`.

    Returns:
        By contender: tokens per second without the prompts' passes, the median of the repeats; mean acceptance length;
        and speed over that of `plain`.
    """
    repeated = results_in_turn(contenders, prompts, params, repeats)
    measured = {name: statistics.median(_rate(results[name]) for results in repeated) for name in contenders}
    return {
        "tokens_per_second": measured,
        "mean_acceptance_length": {name: _acceptance_length(repeated[-1][name]) for name in contenders},
        "speedup": {name: rate / measured["plain"] for name, rate in measured.items()},
    }


def _rate(results: Seq[GenerationResult]) -> float:
    stats = [result.stats for result in results]
    return sum(s.num_tokens - 1 for s in stats) / sum(s.decode_seconds for s in stats)


def _acceptance_length(results: Seq[GenerationResult]) -> float:
    num_drafts = sum(result.stats.num_drafts for result in results)
    num_accepted = sum(result.stats.num_accepted_tokens for result in results)
    return 1 + num_accepted / num_drafts if num_drafts else 1.0
