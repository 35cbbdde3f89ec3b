"""Contenders that decode the same prompts in turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hopskip import LLM, SamplingParams
from hopskip.llm import Prompt


def decode_in_turn(
    contenders: Mapping[str, LLM], prompts: Sequence[Prompt], params: SamplingParams, repeats: int
) -> dict[str, dict[str, float]]:
    """Decode all prompts one after the other, each time by every contender, the one called `plain` first.

    Returns:
        By contender: tokens per second without the prompts' passes, the median of the repeats; mean acceptance length;
        and speed over that of `plain`.

    Raises:
        AssertionError: a contender writes other tokens than `plain`.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    lengths: dict[str, float] = {}
    plain_ids: list[list[int]] = []
    for _ in range(repeats):
        for name, llm in contenders.items():
            results = [llm.generate([prompt], params)[0] for prompt in prompts]
            ids = [result.token_ids for result in results]
            plain_ids = plain_ids or ids
            assert ids == plain_ids, f"{name} wrote other text than plain decoding"
            stats = [result.stats for result in results]
            rates[name].append(sum(s.num_tokens - 1 for s in stats) / sum(s.decode_seconds for s in stats))
            drafts, accepted = sum(s.num_drafts for s in stats), sum(s.num_accepted_tokens for s in stats)
            lengths[name] = 1 + accepted / drafts if drafts else 1.0
    measured = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_second": measured,
        "mean_acceptance_length": lengths,
        "speedup": {name: value / measured["plain"] for name, value in measured.items()},
    }
