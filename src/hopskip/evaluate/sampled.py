"""Proof that sampled speculation leaves the target's distribution, and that a seed fixes the text.

A model's vocabulary is too large to count joint frequencies of several tokens. So its own logits are put into a small
table: the few best tokens at a place, and after each of them the logits of those tokens, at the exit and at the last
layer. The engine then runs on that table, thousands of times, and the exact distribution can be written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hopskip.branch import ExitBranch
from hopskip.cache import Cache, Rows
from hopskip.draft.config import SpeculativeConfig
from hopskip.engine import Engine
from hopskip.evaluate.greedy import exits_to_try, hidden_states
from hopskip.evaluate.proof import Proof
from hopskip.evaluate.recorder import run
from hopskip.model import Model
from hopskip.sampling import SamplingParams

NUM_DRAWS = 20_000
MIN_P_VALUE = 0.001
_NUM_CANDIDATES = 5
_TOP_K = 4
_LENGTH = 2
_AT_ONCE = 100


class TableModel:
    """A "decoder" of two layers whose logits depend on the last token only: `exit_VV` after the first layer,
    `target_VV` after the second."""

    row_exact = True
    has_own_threads = False
    device = torch.device("cpu")
    branch: ExitBranch | None = None

    def __init__(self, model: Model, exit_VV: Tensor, target_VV: Tensor) -> None:
        self.config = replace(
            model.config, vocab_size=len(target_VV), num_hidden_layers=2, eos_token_ids=(), recommended_exit_layer=None
        )
        self.exit_VV, self.target_VV = exit_VV, target_VV
        likely = int(target_VV[1].argmax())
        self.prompt = [0, 1, likely, int(target_VV[likely].argmax()), 0, 1]
        """Its end stands in it before, followed by what is likely to follow: n-gram drafts that are often accepted."""

    def new_cache(self, num_slots: int, length: int) -> Cache:
        tiny = replace(self.config, num_key_value_heads=1, num_attention_heads=1, head_dim=2)
        return Cache(tiny, num_slots, length, torch.float32)

    def embed(self, ids_N: Tensor) -> Tensor:
        return torch.stack((ids_N.float(), torch.zeros(len(ids_N))), dim=1)

    def run_layers(self, h_ND: Tensor, start: int, stop: int, rows: Rows, cache: Cache) -> Tensor:
        return h_ND + torch.tensor([0.0, float(stop - start)])

    def unembed(self, h_ND: Tensor) -> Tensor:
        token_N, depth_N = h_ND[:, 0].long(), h_ND[:, 1].long()
        return torch.stack((self.exit_VV, self.target_VV))[depth_N - 1, token_N]

    def greedy(self, h_ND: Tensor) -> Tensor:
        return self.unembed(h_ND).argmax(dim=-1)


def sampling_proofs(model: Model, prompts: Seq[Seq[int]], num_draws: int = NUM_DRAWS) -> Iterator[Proof]:
    """Distribution of sampled tokens, from early-exit and n-gram drafts; then seeds."""
    for index, prompt in enumerate(prompts[:2]):
        table = tabulate(model, prompt)
        for draft in ("early-exit", "ngram"):
            yield _distribution_proof(table, SpeculativeConfig(draft=draft, num_draft_tokens=_LENGTH), index, num_draws)
    yield _seed_proof(model, prompts[0])


def tabulate(model: Model, prompt: Seq[int]) -> TableModel:
    """The model's logits of the best few tokens after `prompt`, and after each of them."""
    depth = model.config.num_hidden_layers
    exit_layer = next(iter(exits_to_try(model.config)), depth)
    best = model.unembed(hidden_states(model, prompt, depth)[-1:])[0].topk(_NUM_CANDIDATES).indices.tolist()
    tables = []
    for num_layers in (exit_layer, depth):
        after = [hidden_states(model, [*prompt, token], num_layers)[-1] for token in best]
        tables.append(model.unembed(torch.stack(after))[:, best].float().cpu())
    return TableModel(model, *tables)


def _distribution_proof(table: TableModel, setting: SpeculativeConfig, index: int, num_draws: int) -> Proof:
    # a temperature at which no token is certain, so that drafts are accepted and rejected
    spread = float(table.target_VV.std())
    params = SamplingParams(max_new_tokens=_LENGTH + 2, temperature=max(1.0, spread), top_k=_TOP_K, ignore_eos=True)
    expected = _exact_joint(table, params) * num_draws
    p_value = num_drafted = num_accepted = 0.0
    # chance alone fails one run in a thousand; a fault fails the second too
    for attempt in range(2):
        seeds = range(attempt * num_draws, (attempt + 1) * num_draws)
        with _single_thread():
            observed, num_drafted, num_accepted = _count(table, setting, params, seeds)
        p_value = chi_squared_p_value(observed, expected)
        if p_value > MIN_P_VALUE:
            break
    faults = []
    if p_value <= MIN_P_VALUE:
        faults.append(f"p = {p_value:.2g} in two runs of {num_draws} draws: another distribution")
    if not 0 < num_accepted < num_drafted:
        faults.append(f"{num_accepted:.0f} of {num_drafted:.0f} draft tokens accepted, so nothing is proved")
    return Proof(
        topic="sampling",
        setting=f"{setting.draft} k={setting.num_draft_tokens}, logits after prompt {index}",
        claim=f"the joint distribution of {_LENGTH} tokens is the target's (chi-squared, p > {MIN_P_VALUE})",
        status="failed" if faults else "passed",
        detail="; ".join(faults) or f"p = {p_value:.3f}, {1 - num_accepted / num_drafted:.0%} of draft tokens rejected",
        counts={
            "num_draws": num_draws,
            "p_value": p_value,
            "num_draft_tokens": num_drafted,
            "num_rejected_tokens": num_drafted - num_accepted,
        },
    )


@contextmanager
def _single_thread() -> Iterator[None]:
    """Waking a second thread for five numbers takes longer than all the arithmetic."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _count(
    table: TableModel, setting: SpeculativeConfig, params: SamplingParams, seeds: range
) -> tuple[NDArray[np.float64], int, int]:
    """How often each joint outcome came, flattened; draft tokens; accepted ones.

    The first token comes from the prompt's pass; counted are those after it, which drafts had a part in.
    """
    engine = Engine(table, setting, max_num_seqs=_AT_ONCE, prefix_caching=False)
    observed = np.zeros((table.config.vocab_size,) * _LENGTH)
    num_drafted = num_accepted = 0
    for first in range(0, len(seeds), _AT_ONCE):
        batch = [engine.add(table.prompt, replace(params, seed=seed)) for seed in seeds[first : first + _AT_ONCE]]
        while engine.has_work:
            engine.step()
        for sequence in batch:
            observed[tuple(token.id for token in sequence.tokens[1 : _LENGTH + 1])] += 1
            num_drafted += sequence.stats.num_draft_tokens
            num_accepted += sequence.stats.num_accepted_tokens
    return observed.ravel(), num_drafted, num_accepted


def _exact_joint(table: TableModel, params: SamplingParams) -> NDArray[np.float64]:
    """Probability of every outcome of tokens 1 .. `_LENGTH` after the table's prompt, by enumeration in float64.

    Written apart from `hopskip.sampling` on purpose: the two must agree.
    """
    table_VV = table.target_VV.double().numpy()
    scaled = np.exp((table_VV - table_VV.max(axis=1, keepdims=True)) / params.temperature)
    # of equal logits the lower token id comes first
    best = np.argsort(-table_VV, axis=1, kind="stable")[:, : params.top_k]
    chain = np.zeros_like(scaled)
    np.put_along_axis(chain, best, np.take_along_axis(scaled, best, axis=1), axis=1)
    chain /= chain.sum(axis=1, keepdims=True)
    second = chain[table.prompt[-1]] @ chain  # distribution of token 1, over all first tokens
    vocab = len(chain)
    joint = np.zeros((vocab,) * _LENGTH)
    for outcome in itertools.product(range(vocab), repeat=_LENGTH):
        joint[outcome] = second[outcome[0]] * np.prod([chain[a, b] for a, b in itertools.pairwise(outcome)])
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
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


def _seed_proof(model: Model, prompt: Seq[int]) -> Proof:
    """The same seed twice, then others, which must not all give the same text (or the proof could not fail)."""
    draft: SpeculativeConfig = SpeculativeConfig(
        draft="both" if exits_to_try(model.config) else "ngram", num_draft_tokens=3
    )

    def text(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)
        return run(model, [prompt], draft, params, max_num_seqs=1)[0].token_ids

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
