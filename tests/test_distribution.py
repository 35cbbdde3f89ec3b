"""Sampling has the exact distribution of the rules, and no way of drafting changes a sampled text."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

import hopskip.engine.choose
import hopskip.sampling
from hopskip import SamplingParams, SpeculativeConfig
from hopskip.engine import make_engine
from hopskip.engine.choose import Verdict, verify
from hopskip.sequence import Request, Sequence
from tests.models import engine_with, table_model
from tests.oracle import exact_joint
from tests.test_auto import whimsical

VOCAB = 4
NUM_SAMPLES = 20_000
LENGTH = 4
PROMPT = [0, 1, 2, 0, 1, 3, 0, 1]  # its end stands in it before, so that n-gram lookup has something to propose
ALL_RULES = SamplingParams(
    max_new_tokens=LENGTH,
    temperature=0.9,
    top_p=0.92,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={2: 0.4},
)
PLAIN = SpeculativeConfig(draft="none")


def tables() -> tuple[Tensor, Tensor]:
    """Logits of a Markov model at its exit and at its end: alike, but not the same."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(VOCAB, VOCAB, generator=generator)
    return target + 0.8 * torch.randn(VOCAB, VOCAB, generator=generator), target


def sample(config: SpeculativeConfig, params: SamplingParams, seeds: range) -> list[Sequence]:
    torch.set_num_threads(1)
    model = table_model(*tables())
    if config.draft == "auto":  # the sources in turn, and drafts that end by how sure they are
        engine = engine_with(
            whimsical(model, min_confidence=0.5), model, config, max_num_seqs=500, prefix_caching=False
        )
    else:
        engine = make_engine(model, config, max_num_seqs=500, prefix_caching=False)
    sequences = [engine.add(Request(PROMPT, replace(params, seed=seed))) for seed in seeds]
    while engine.has_work:
        engine.step()
    return sequences


def count(params: SamplingParams, seeds: range) -> NDArray[np.float64]:
    observed = np.zeros((VOCAB,) * LENGTH)
    for sequence in sample(PLAIN, params, seeds):
        observed[tuple(token.id for token in sequence.tokens)] += 1
    return observed.ravel()


def p_value(params: SamplingParams, num_samples: int = NUM_SAMPLES) -> float:
    """Of the chi-squared test of all texts of `LENGTH` tokens against their exactly computed frequencies."""
    shares = [range(0, num_samples // 2), range(num_samples // 2, num_samples)]
    # forked, not spawned: the children must see the rule that a test has put in place of the right one
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        observed = np.sum(list(pool.map(count, [params] * 2, shares)), axis=0)
    expected = exact_joint(tables()[1].double().numpy(), PROMPT, params, 0, LENGTH) * num_samples
    assert observed[expected == 0].sum() == 0
    # cells too rare for the chi-squared approximation are taken together
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(chisquare(observed[keep], expected[keep], sum_check=False).pvalue)


@pytest.mark.parametrize(
    "params",
    [
        ALL_RULES,
        SamplingParams(max_new_tokens=LENGTH, temperature=1.0),
        SamplingParams(max_new_tokens=LENGTH, temperature=1.3, top_k=3, min_p=0.2),
    ],
)
def test_joint_distribution_is_exact(params: SamplingParams) -> None:
    assert p_value(params) > 0.001


def test_noise_that_does_not_move_on_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the same noise at every position, so that each token alone is right, and texts are not."""
    right = hopskip.sampling.noise_key
    monkeypatch.setattr(hopskip.sampling, "noise_key", lambda seed, position: right(seed, 0))
    assert p_value(ALL_RULES, NUM_SAMPLES // 10) < 0.001


def test_noise_twice_as_large_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hopskip.sampling._gumbel
    monkeypatch.setattr(hopskip.sampling, "_gumbel", lambda *all: 2 * right(*all))
    assert p_value(ALL_RULES, NUM_SAMPLES // 10) < 0.001


DRAFTS: dict[str, dict[str, Any]] = {
    "early-exit": {"draft": "early-exit", "num_draft_tokens": 3},
    "layer-skip": {"draft": "layer-skip", "num_draft_tokens": 3, "skip_layers": (0,)},
    "ngram": {"draft": "ngram", "num_draft_tokens": 3},
    "both": {"draft": "both", "num_draft_tokens": 2},
    "auto": {"draft": "auto", "num_draft_tokens": 3},
    "tree": {"draft": "early-exit", "num_draft_tokens": 3, "num_runner_ups": 3},
}


def texts(config: SpeculativeConfig, params: SamplingParams) -> tuple[list[list[int]], int, int]:
    sequences = sample(config, params, range(300))
    drafted, accepted = (
        sum(getattr(s.stats, f"num_{what}_tokens") for s in sequences) for what in ("draft", "accepted")
    )
    return [[token.id for token in s.tokens] for s in sequences], drafted, accepted


@pytest.mark.parametrize(
    "params", [replace(ALL_RULES, max_new_tokens=12), SamplingParams(max_new_tokens=12, temperature=1.0)]
)
@pytest.mark.parametrize("draft", DRAFTS)
def test_no_draft_changes_a_sampled_text(draft: str, params: SamplingParams) -> None:
    found, drafted, accepted = texts(SpeculativeConfig(**DRAFTS[draft]), params)
    assert 0 < accepted < drafted
    assert found == texts(PLAIN, params)[0]


@pytest.mark.parametrize("draft", ["early-exit", "ngram", "tree"])
def test_a_wrong_accept_rule_is_found_out(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: accepts the first draft token unseen."""

    def accept_the_first(draft_ids: list[int], target_ids: list[int], parents: list[int] | None = None) -> Verdict:
        seen = draft_ids[:1] or target_ids[:1]
        return verify(draft_ids, [*seen, *target_ids[1:]], parents)

    expected = texts(PLAIN, ALL_RULES)[0]
    monkeypatch.setattr(hopskip.engine.choose, "verify", accept_the_first)
    assert texts(SpeculativeConfig(**DRAFTS[draft]), ALL_RULES)[0] != expected
