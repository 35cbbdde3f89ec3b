"""Sampling parameters and what they do to logits, against a plain float64 version of each rule."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hopskip import ConfigError, SamplingParams
from hopskip.sampling import TokenCounts, adjust_logits, draw, probabilities
from tests.oracle import exact_probabilities

# equal, or so far apart that rounding does not make them equal: which tokens stay is then the same in any precision
logits_lists = st.lists(
    st.one_of(st.integers(-2, 2), st.integers(-512, 512).map(lambda n: n / 64), st.just(-math.inf)),
    min_size=1,
    max_size=40,
).filter(lambda logits: max(logits) > -math.inf)


@given(
    logits_lists,
    st.floats(0.2, 2.0),
    st.integers(0, 10),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
)
@example([0.0, -5.0, -6.0], 0.25, 0, 0.9999999999999999, 0.0)
@example([0.0, 2.7e-35, 1.3e-41], 1.0, 0, 0.25, 0.0)  # three probabilities that no precision tells apart
@example([3.0, 0.0, 3.0, 3.0, 0.0], 1.0, 2, 0.6, 0.4)
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


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.integers(1, 10))
def test_top_k_follows_any_difference_of_logits(logits: list[float], top_k: int) -> None:
    """Also one that is lost when the logits become probabilities."""
    probs = probabilities(torch.tensor([logits]), SamplingParams(temperature=1.0, top_k=top_k))[0]
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    assert probs.nonzero().flatten().tolist() == sorted(best)


def kept(logits: Tensor, **settings: Any) -> list[int]:
    probs_V = probabilities(logits[None], SamplingParams(temperature=1.0, **settings))[0]
    assert float(probs_V.sum()) == pytest.approx(1)
    np.testing.assert_allclose(
        probs_V.numpy(), exact_probabilities(logits.numpy(), SamplingParams(temperature=1.0, **settings)), atol=1e-6
    )
    return probs_V.nonzero().flatten().tolist()


@pytest.mark.parametrize("vocab_size", [4, 64, 256, 257, 1000])  # fewer and more than the nucleus looks at
def test_of_equal_logits_the_lowest_ids_stay(vocab_size: int) -> None:
    flat = torch.zeros(vocab_size)
    assert kept(flat, top_k=3) == [0, 1, 2]
    assert kept(flat, top_k=vocab_size) == kept(flat, top_k=vocab_size + 1) == list(range(vocab_size))
    assert kept(flat, top_p=2.5 / vocab_size) == [0, 1, 2]
    half = vocab_size // 2
    assert kept(flat, top_p=(half - 0.5) / vocab_size) == list(range(half))
    assert kept(flat, top_k=4, top_p=0.5) == [0, 1]
    assert kept(flat, min_p=1.0) == list(range(vocab_size))


@pytest.mark.parametrize("vocab_size", [8, 1000])
def test_ties_at_the_edge_of_k_and_p(vocab_size: int) -> None:
    logits = torch.full((vocab_size,), -30.0)
    logits[[1, 3, 5, 7]] = torch.tensor([2.0, 2.0, 3.0, 2.0])  # 0.475, and three of 0.175
    assert kept(logits, top_k=1) == [5]
    assert kept(logits, top_k=2) == [1, 5]
    assert kept(logits, top_k=3) == [1, 3, 5]
    assert kept(logits, top_k=4) == [1, 3, 5, 7]
    assert kept(logits, top_k=5) == [0, 1, 3, 5, 7]  # of those far below the lowest id too
    assert kept(logits, top_p=0.47) == [5]
    assert kept(logits, top_p=0.48) == kept(logits, top_p=0.64) == [1, 5]
    assert kept(logits, top_p=0.66) == [1, 3, 5]
    assert kept(logits, top_p=0.9) == [1, 3, 5, 7]
    assert kept(logits, top_k=3, top_p=0.75) == [1, 5]  # 0.576 and 0.212 of what top_k leaves
    assert kept(logits, min_p=0.36) == [1, 3, 5, 7]
    assert kept(logits, min_p=0.37) == [5]


def test_a_nucleus_as_large_as_the_shortcut() -> None:
    """255, 256 and 257 of equal tokens: the last candidate that is looked at has an equal behind it."""
    for count in (255, 256, 257):
        assert kept(torch.zeros(512), top_p=(count - 0.5) / 512) == list(range(count))
        assert kept(torch.zeros(512), top_k=count) == list(range(count))


def test_ruled_out_tokens_never_stay() -> None:
    """Fewer tokens possible than top_k keeps, and minus infinity at the edge."""
    logits = torch.full((300,), -torch.inf)
    logits[[7, 100, 200]] = 1.0
    for settings in ({"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.5}, {"top_k": 300}):
        assert kept(logits, **settings) == [7, 100, 200], settings
    assert kept(logits, top_k=2) == kept(logits, top_p=0.5) == [7, 100]


def test_rows_have_their_own_ties() -> None:
    rows = torch.tensor([[0.0, 1, 1, 1], [3, 2, 1, 0], [1, 1, 0, 1], [-torch.inf, 0, -torch.inf, -torch.inf]])
    for settings, expected in [
        ({"top_k": 2}, [[1, 2], [0, 1], [0, 1], [1]]),
        ({"top_p": 0.5}, [[1, 2], [0], [0, 1], [1]]),
    ]:
        params = SamplingParams(temperature=1.0, **settings)  # type: ignore[arg-type]
        probs_NV = probabilities(rows, params)
        assert [row.nonzero().flatten().tolist() for row in probs_NV] == expected
        for row, probs_V in zip(rows, probs_NV, strict=True):
            assert torch.equal(probabilities(row[None], params)[0], probs_V)


def test_ties_that_penalties_make() -> None:
    """Of three best tokens one has been seen: it falls among the equals below, and has the highest id of them."""
    params = SamplingParams(temperature=1.0, top_k=3, presence_penalty=1.0)
    counts = TokenCounts([], vocab_size=6)
    counts.add(5)
    logits = adjust_logits(torch.tensor([[1.0, 2.0, 0.0, 1.0, 2.0, 2.0]]), params, counts)
    assert probabilities(logits, params)[0].nonzero().flatten().tolist() == [0, 1, 4]


def test_transformers_keeps_as_many_tokens_where_no_logits_are_equal() -> None:
    """And where they are: top-p as many tokens, top-k all equals of the k-th, min-p the same."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    distinct, tied = torch.randperm(300, generator=generator) / 16, torch.randint(0, 8, (300,), generator=generator) / 2
    ids = torch.zeros((1, 1), dtype=torch.long)

    def theirs(logits: Tensor, warper: Any) -> list[int]:
        kept: list[int] = (warper(ids, logits[None])[0] > -torch.inf).nonzero().flatten().tolist()
        return kept

    assert theirs(distinct, TopKLogitsWarper(40)) == kept(distinct, top_k=40)
    assert theirs(distinct, TopPLogitsWarper(0.9)) == kept(distinct, top_p=0.9)
    for logits in (distinct, tied):
        assert theirs(logits, MinPLogitsWarper(0.05)) == kept(logits, min_p=0.05)
    assert len(theirs(tied, TopPLogitsWarper(0.9))) == len(kept(tied, top_p=0.9))
    assert len(kept(tied, top_k=10)) == 10
    assert set(kept(tied, top_k=10)) < set(theirs(tied, TopKLogitsWarper(10)))


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
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p is 2.0"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect"),
        ({"top_k": 1}, "top_k=1 has no effect"),
        ({"min_p": 0.1}, "min_p=0.1 has no effect"),
        ({"seed": 1}, "seed=1 has no effect"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_values_at_the_bounds_are_taken() -> None:
    SamplingParams(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=0)
    SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0, repetition_penalty=1e-9, logprobs=1)
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):  # requests share them
        SamplingParams().top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):  # a bare number says nothing
        SamplingParams(256)  # type: ignore[call-arg]
    assert SamplingParams(logit_bias={3: -math.inf}).changes_logits


def test_what_params_say_of_themselves() -> None:
    plain = SamplingParams()
    assert (plain.is_greedy, plain.truncates, plain.changes_logits, plain.has_penalties) == (True, False, False, False)
    assert not SamplingParams(temperature=1.0).is_greedy
    for settings in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert SamplingParams(temperature=1.0, **settings).truncates
    assert not SamplingParams(temperature=1.0).truncates
    for settings in ({"repetition_penalty": 0.9}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        params = SamplingParams(**settings)  # type: ignore[arg-type]
        assert params.has_penalties
        assert params.changes_logits
    biased = SamplingParams(logit_bias={0: 1.0})
    assert biased.changes_logits
    assert not biased.has_penalties


def test_counts_grow_along_a_draft() -> None:
    counts = TokenCounts([0, 0], vocab_size=3)
    counts.add(1)
    counts.add(1)
    assert counts.in_prompt_V.tolist() == [True, False, False]
    assert counts.along([2, 1]).tolist() == [[0, 2, 0], [0, 2, 1], [0, 3, 1]]
    assert counts.along([]).tolist() == [[0, 2, 0]], "the counts themselves stay"


def test_a_draw_at_the_very_end_takes_the_last_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform so near to 1 that its share of the total rounds to the total: no token without probability follows."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0, dtype=torch.float64))
    generator = torch.Generator()
    assert draw(torch.tensor([0.25, 0.0, 0.5, 0.0]), generator) == 2
    assert draw(torch.tensor([0.0, 0.3]), generator) == 1
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.0, dtype=torch.float64))
    assert draw(torch.tensor([0.0, 0.0, 0.5, 0.5]), generator) == 2


def test_the_smallest_top_p_keeps_the_best_token() -> None:
    probs_NV = probabilities(torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(temperature=1.0, top_p=5e-324))
    assert probs_NV.tolist() == [[0.0, 1.0, 0.0]]
