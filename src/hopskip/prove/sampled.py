"""Proof that sampling draws from the model's distribution, and that a seed fixes the text however it is drafted.

Drafts are verified by comparing ids (`greedy.sampled_proofs` runs every way of drafting), so the distribution is a
matter of plain decoding alone. A model's vocabulary is too large to count joint frequencies of several tokens. So its
own logits are put into a small table: the few best tokens at a place, and after each of them the logits of these.
The engine then runs on that table, thousands of times, and the exact distribution can be written down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.table import TableBackend
from hopskip.engine.engine import make_engine
from hopskip.prove.greedy import PLAIN, best_tokens, exits_to_try, hidden_states, last_logits, sampled_proofs
from hopskip.prove.proof import Proof
from hopskip.prove.recorder import run
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request
from hopskip.speculative import SpeculativeConfig

NUM_DRAWS = 20_000
MIN_P_VALUE = 0.001
_NUM_CANDIDATES = 5
_TOP_K = 4
_LENGTH = 3
_AT_ONCE = 100
_SEED = 7
_HOW = SamplingParams(temperature=0.8, top_p=0.95, seed=_SEED, ignore_eos=True)


def sampling_proofs(
    backend: Backend, prompts: Seq[Seq[int]], max_new_tokens: int, num_draws: int = NUM_DRAWS
) -> Iterator[Proof]:
    """The distribution of plain sampling; seeds; and sampled texts by every way of drafting, id by id."""
    for index, prompt in enumerate(prompts[:2]):
        yield _distribution_proof(tabulate(backend, prompt), index, num_draws)
    yield _seed_proof(backend, prompts[0])
    yield from sampled_proofs(backend, prompts, replace(_HOW, max_new_tokens=max_new_tokens))


def tabulate(backend: Backend, prompt: Seq[int]) -> TableBackend:
    """The model's logits of the best few tokens after `prompt`, and after each of them."""
    depth = backend.config.num_hidden_layers
    exit_layer = next(iter(exits_to_try(backend.config)), depth)
    best = best_tokens(last_logits(backend, prompt), _NUM_CANDIDATES)
    tables = []
    for num_layers in (exit_layer, depth):
        after = [hidden_states(backend, [*prompt, token], num_layers)[-1:] for token in best]
        logits_NV = backend.on_host(backend.logits(backend.xp.concat(after)))
        tables.append(logits_NV[:, best])
    return TableBackend(replace(backend.config, eos_token_ids=()), *tables)


def _distribution_proof(table: TableBackend, index: int, num_draws: int) -> Proof:
    # a temperature at which no token is certain
    spread = float(table.tables[1].std())
    params = SamplingParams(max_new_tokens=_LENGTH, temperature=max(1.0, spread), top_k=_TOP_K, ignore_eos=True)
    expected = _exact_joint(table, params) * num_draws
    p_value = 0.0
    # chance alone fails one run in a thousand; a fault fails the second too
    for attempt in range(2):
        seeds = range(attempt * num_draws, (attempt + 1) * num_draws)
        p_value = chi_squared_p_value(_count(table, params, seeds), expected)
        if p_value > MIN_P_VALUE:
            break
    is_right = p_value > MIN_P_VALUE
    return Proof(
        topic="sampling",
        setting=f"plain, logits after prompt {index}",
        claim=f"the joint distribution of {_LENGTH} tokens is the target's (chi-squared, p > {MIN_P_VALUE})",
        status="passed" if is_right else "failed",
        detail=f"p = {p_value:.3f}"
        if is_right
        else f"p = {p_value:.2g} in two runs of {num_draws} draws: another distribution",
        counts={"num_draws": num_draws, "p_value": p_value},
    )


def _count(table: TableBackend, params: SamplingParams, seeds: range) -> NDArray[np.float64]:
    """How often each joint outcome came, flattened; one request for each seed."""
    engine = make_engine(table, PLAIN, max_num_seqs=_AT_ONCE, prefix_caching=False)
    observed = np.zeros((table.config.vocab_size,) * _LENGTH)
    for first in range(0, len(seeds), _AT_ONCE):
        batch = [engine.add(Request([0], replace(params, seed=seed))) for seed in seeds[first : first + _AT_ONCE]]
        while engine.has_work:
            engine.step()
        for sequence in batch:
            observed[tuple(token.id for token in sequence.tokens)] += 1
    return observed.ravel()


def _exact_joint(table: TableBackend, params: SamplingParams) -> NDArray[np.float64]:
    """Probability of every outcome of the tokens after token 0, by enumeration in float64.

    Written apart from `hopskip.sampling` on purpose: the two must agree.
    """
    table_VV = table.tables[1].astype(np.float64)
    scaled = np.exp((table_VV - table_VV.max(axis=1, keepdims=True)) / params.temperature)
    # of equal logits the lower token id comes first
    best = np.argsort(-table_VV, axis=1, kind="stable")[:, : params.top_k]
    chain = np.zeros_like(scaled)
    np.put_along_axis(chain, best, np.take_along_axis(scaled, best, axis=1), axis=1)
    chain /= chain.sum(axis=1, keepdims=True)
    joint = np.zeros((len(chain),) * _LENGTH)
    for outcome in itertools.product(range(len(chain)), repeat=_LENGTH):
        joint[outcome] = np.prod([chain[a, b] for a, b in itertools.pairwise((0, *outcome))])
    return joint.ravel()


def chi_squared_p_value(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Probability that frequencies from the expected distribution lie as far off as these; 0 for an impossible outcome.

    Outcomes expected fewer than 5 times, too few for the approximation, are counted together.
    """
    if observed[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return _chi_squared_tail(statistic, len(expected) - 1)


def _chi_squared_tail(statistic: float, degrees: int) -> float:
    """Probability of a larger one: a finite sum (Abramowitz and Stegun, 26.4.4 and 26.4.5)."""
    half = statistic / 2
    if degrees < 1 or half == 0:
        return 1.0
    is_odd = degrees % 2
    exponents = np.arange(1, (degrees + 1) // 2) - 0.5 if is_odd else np.arange(degrees // 2)
    terms = np.exp([exponent * math.log(half) - half - math.lgamma(exponent + 1) for exponent in exponents])
    return min(1.0, float(terms.sum()) + (math.erfc(math.sqrt(half)) if is_odd else 0.0))


def _seed_proof(backend: Backend, prompt: Seq[int]) -> Proof:
    """The same seed twice, then others, which must not all give the same text (or the proof could not fail)."""
    draft: SpeculativeConfig = SpeculativeConfig(
        draft="both" if exits_to_try(backend.config) else "ngram", num_draft_tokens=3
    )

    def text(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)
        return run(backend, [prompt], draft, params, max_num_seqs=1)[0].token_ids

    first = text(1)
    repeats = text(1) == first
    differs = any(text(seed) != first for seed in range(2, 6))
    fault = "other seeds give the same text, so nothing is proved" if repeats else "the second text differs"
    return Proof(
        topic="sampling",
        setting=f"{draft.draft} k={draft.num_draft_tokens}, one seed twice",
        claim="same seed, same text",
        status="passed" if repeats and differs else "failed",
        detail="equal; another seed gives another text" if repeats and differs else fault,
    )
