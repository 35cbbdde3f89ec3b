"""Sampling through the whole speculative path leaves the target's exact distribution; a wrong accept rule does not."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

import hopskip.engine.choose
from hopskip import SamplingParams, SpeculativeConfig
from hopskip.engine import make_engine
from hopskip.engine.verify import Verdict, verify_sampled
from hopskip.sampling import draw
from hopskip.sequence import Request
from tests.models import engine_with, table_model
from tests.oracle import exact_joint
from tests.test_auto import whimsical

VOCAB = 4
NUM_SAMPLES = 100_000
SKIP, LENGTH = 1, 3  # token 0 comes from the prompt's pass; tokens 1 to 3 from drafts of up to two, and the bonus
PROMPT = [0, 1, 2, 0, 1, 3, 0, 1]  # its end stands in it before, so that n-gram lookup has something to propose
PARAMS = SamplingParams(
    max_new_tokens=SKIP + LENGTH,
    temperature=0.9,
    top_p=0.92,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={2: 0.4},
)
PLAIN_PARAMS = SamplingParams(max_new_tokens=SKIP + LENGTH, temperature=0.9, top_p=0.92)
"""For trees: where the distribution depends on the text, drafts are chains."""


def params_of(draft: str) -> SamplingParams:
    return PLAIN_PARAMS if draft == "tree" else PARAMS


def tables() -> tuple[Tensor, Tensor]:
    """Logits of a Markov model at its exit and at its end: alike, but not the same."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(VOCAB, VOCAB, generator=generator)
    return target + 0.8 * torch.randn(VOCAB, VOCAB, generator=generator), target


def sample(draft: str, seeds: range) -> tuple[NDArray[np.float64], int, int]:
    """How often each `LENGTH` tokens came out, one request per seed; draft tokens, and how many were accepted."""
    torch.set_num_threads(1)
    model = table_model(*tables())
    # the sources in turn, and drafts that end by how sure they are
    drafter = whimsical(model, min_confidence=0.5) if draft == "auto" else None
    config = SpeculativeConfig(
        draft="early-exit" if draft == "tree" else draft,  # type: ignore[arg-type]
        num_draft_tokens=3,
        num_runner_ups=3 if draft == "tree" else None,
        skip_layers=(0,) if draft == "layer-skip" else None,
    )
    engine = (
        make_engine(model, config, max_num_seqs=500, prefix_caching=False)
        if drafter is None
        else engine_with(drafter, model, config, max_num_seqs=500, prefix_caching=False)
    )
    sequences = [engine.add(Request(PROMPT, replace(params_of(draft), seed=seed))) for seed in seeds]
    while engine.has_work:
        engine.step()
    observed = np.zeros((VOCAB,) * LENGTH)
    for sequence in sequences:
        observed[tuple(token.id for token in sequence.tokens[SKIP:])] += 1
    drafted = sum(s.stats.num_draft_tokens for s in sequences)
    accepted = sum(s.stats.num_accepted_tokens for s in sequences)
    return observed.ravel(), drafted, accepted


def p_value(draft: str, num_samples: int = NUM_SAMPLES) -> float:
    """Of the chi-squared test of generated against exactly computed frequencies of `LENGTH` tokens."""
    shares = [range(0, num_samples // 2), range(num_samples // 2, num_samples)]
    # forked, not spawned: the children must see the rule that a test has put in place of the right one
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        parts = list(pool.map(sample, [draft] * 2, shares))
    observed = np.sum([part[0] for part in parts], axis=0)
    drafted, accepted = (sum(part[i] for part in parts) for i in (1, 2))
    assert 0 < accepted < drafted
    expected = exact_joint(tables()[1].double().numpy(), PROMPT, params_of(draft), SKIP, LENGTH) * num_samples
    assert observed[expected == 0].sum() == 0
    # cells too rare for the chi-squared approximation are taken together
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(chisquare(observed[keep], expected[keep], sum_check=False).pvalue)


@pytest.mark.parametrize(
    ("draft", "num_samples"),
    [
        ("early-exit", NUM_SAMPLES),
        ("layer-skip", NUM_SAMPLES // 4),
        ("ngram", NUM_SAMPLES // 4),
        ("auto", NUM_SAMPLES // 8),
        ("tree", NUM_SAMPLES // 4),
    ],
)
def test_joint_distribution_is_exact(draft: str, num_samples: int) -> None:
    assert p_value(draft, num_samples) > 0.001


def resample_from_the_target(
    draft_ids: Sequence[int],
    draft_probs: Sequence[Tensor] | None,
    target_probs: Tensor,
    generator: torch.Generator,
    parents: object,
) -> Verdict:
    """Wrong: on rejection draws from the target, not from what the draft left of it."""
    for index, token in enumerate(draft_ids):
        draft_probability = 1.0 if draft_probs is None else float(draft_probs[index][token])
        if float(torch.rand((), generator=generator)) * draft_probability >= float(target_probs[index][token]):
            return Verdict(tuple(range(index)), draw(target_probs[index], generator))
    return Verdict(tuple(range(len(draft_ids))), draw(target_probs[len(draft_ids)], generator))


def compare_greedily(
    draft_ids: Sequence[int],
    draft_probs: Sequence[Tensor] | None,
    target_probs: Tensor,
    generator: torch.Generator,
    parents: object,
) -> Verdict:
    """Wrong: accepts a token whenever the target likes it at least as much as the draft did."""
    for index, token in enumerate(draft_ids):
        draft_probability = 0.5 if draft_probs is None else float(draft_probs[index][token])
        if float(target_probs[index][token]) < draft_probability:
            return Verdict(tuple(range(index)), draw(target_probs[index], generator))
    return Verdict(tuple(range(len(draft_ids))), draw(target_probs[len(draft_ids)], generator))


@pytest.mark.parametrize("draft", ["early-exit", "ngram"])
@pytest.mark.parametrize("wrong", [resample_from_the_target, compare_greedily])
def test_a_wrong_accept_rule_is_found_out(draft: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopskip.engine.choose, "verify_sampled", wrong)
    assert p_value(draft, NUM_SAMPLES // 10) < 0.001


def as_if_drawn_with_replacement(
    draft_ids: Sequence[int],
    draft_probs: Sequence[Tensor],
    target_probs: Tensor,
    generator: torch.Generator,
    parents: Sequence[int] | None,
) -> Verdict:
    """Wrong: tests every candidate of a place against the distribution that its first one was drawn from."""
    if parents is None:  # nothing drafted
        return verify_sampled(draft_ids, draft_probs, target_probs, generator)
    first = [draft_probs[parents.index(parent)] for parent in parents]
    return verify_sampled(draft_ids, first, target_probs, generator, parents)


def test_a_wrong_rule_for_trees_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopskip.engine.choose, "verify_sampled", as_if_drawn_with_replacement)
    assert p_value("tree", NUM_SAMPLES // 10) < 0.001
