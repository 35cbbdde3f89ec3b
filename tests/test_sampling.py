"""Sampling parameters and what they do to logits, against a plain float64 version of each rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hopskip import ConfigError, SamplingParams
from hopskip.sampling import TokenCounts, adjust_logits, draw, probabilities
from tests.oracle import exact_probabilities

logits_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40, unique=True)


@given(
    logits_lists,
    st.floats(0.2, 2.0),
    st.integers(0, 10),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
)
@example([0.0, -5.0, -6.0], 0.25, 0, 0.9999999999999999, 0.0)
def test_probabilities_match_the_plain_rules(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = probabilities(torch.tensor([logits]), params)[0]
    expected = exact_probabilities(np.array(logits), params)
    differing = (probs > 0).numpy() != (expected > 0)
    if not differing.any():
        np.testing.assert_allclose(probs.numpy(), expected, atol=1e-5)
    else:
        # where a cumulative sum meets top_p within rounding, the next token may be in or out, and with it those so
        # improbable that the sum does not leave top_p again
        masses = np.sort(np.maximum(probs.numpy(), expected)[differing])
        assert masses[:-1].sum() < 1e-6


def test_the_nucleus_is_exact_beyond_the_shortcut() -> None:
    """A flat distribution over more tokens than the shortcut looks at takes the full sort."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.01
    params = SamplingParams(temperature=1.0, top_p=0.9)
    probs = probabilities(logits[None], params)[0]
    np.testing.assert_allclose(probs.numpy(), exact_probabilities(logits.numpy(), params), atol=1e-6)
    assert 850 < int((probs > 0).sum()) < 920


def test_penalties_see_prompt_output_and_draft() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -1.0})
    counts = TokenCounts([0], vocab_size=4)
    counts.add(1)
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0], [-2.0, 2.0, 2.0, 2.0]])
    before, after = adjust_logits(logits, params, counts, draft_ids=[1]).tolist()
    assert before == [1.0, 1.0 - 0.5 - 0.25, 2.0, 1.0]
    assert after == [-4.0, 1.0 - 0.5 - 0.5, 2.0, 1.0]
    assert adjust_logits(logits[1:], params, counts, draft_ids=[1]).tolist() == [after]
    assert adjust_logits(logits[1:], params, counts).tolist()[0][1:] == before[1:]


@given(st.integers(0, 2**32), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_draw_never_takes_an_impossible_token(seed: int, weights: list[float]) -> None:
    weights[seed % len(weights)] = 1.0
    probs = torch.tensor(weights)
    assert probs[draw(probs, torch.Generator().manual_seed(seed))] > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect"),
        ({"seed": 1}, "seed=1 has no effect"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_the_smallest_top_p_keeps_the_best_token() -> None:
    probs_NV = probabilities(torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(temperature=1.0, top_p=5e-324))
    assert probs_NV.tolist() == [[0.0, 1.0, 0.0]]
