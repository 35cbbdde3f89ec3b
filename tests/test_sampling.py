"""Sampling parameters and what they do to logits, against a plain float64 version of each rule; and the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import FrozenInstanceError
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2, kstest
from torch import Tensor

from hopskip import ConfigError, SamplingParams
from hopskip.sampling import adjust_logits, best_sums, choose_tokens, gumbel_noise, kept_tokens, noise_key, scale_of
from hopskip.sequence import Place, Rule, TokenCounts, fresh_seed
from tests.oracle import exact_probabilities

NUMPY, TORCH = array_api_compat.numpy, array_api_compat.torch

# equal, or so far apart that rounding does not make them equal: which tokens stay is then the same in any precision
logits_lists = st.lists(
    st.one_of(st.integers(-2, 2), st.integers(-512, 512).map(lambda n: n / 64), st.just(-math.inf)),
    min_size=1,
    max_size=40,
).filter(lambda logits: max(logits) > -math.inf)


def place(params: SamplingParams, seed: int = 0, position: int = 0, **more: Any) -> Place:
    return Place(Rule(params, seed, more.pop("counts", None)), position, **more)


# -- truncation --------------------------------------------------------------------------------------------------------


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
def test_kept_tokens_match_the_plain_rules(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = torch.tensor([logits], dtype=torch.float32)
    kept_V = kept_tokens(row, [params], TORCH)[0] & (row[0] > -torch.inf)
    assert kept_V.tolist() == (kept_tokens(row.numpy(), [params], NUMPY)[0] & (row[0] > -torch.inf).numpy()).tolist()
    expected = exact_probabilities(np.array(logits), params)
    differing = kept_V.numpy() != (expected > 0)
    if differing.any():
        # where a cumulative sum meets top_p or a ratio min_p within rounding, the next token may be in or out, and with
        # it those so improbable that the sum does not leave top_p again
        plain = exact_probabilities(np.array(logits), SamplingParams(temperature=temperature))
        masses = np.sort(plain[differing])
        assert masses[:-1].sum() < 1e-6


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.integers(1, 10))
def test_top_k_follows_any_difference_of_logits(logits: list[float], top_k: int) -> None:
    """Also one that is lost when the logits become probabilities."""
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    assert kept(torch.tensor(logits), top_k=top_k, exact=False) == sorted(best)


def kept(logits: Tensor, *, exact: bool = True, **settings: Any) -> list[int]:
    params = SamplingParams(temperature=1.0, **settings)
    logits = logits.float()
    found = kept_tokens(logits[None], [params], TORCH)[0] & (logits > -torch.inf)
    tokens: list[int] = found.nonzero().flatten().tolist()
    if exact:
        assert tokens == exact_probabilities(logits.numpy(), params).nonzero()[0].tolist()
    return tokens


@pytest.mark.parametrize("vocab_size", [4, 64, 256, 257, 1000])
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


def test_a_nucleus_of_equals() -> None:
    """A nucleus that ends within equal tokens."""
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
    cases: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"top_k": 2}, [[1, 2], [0, 1], [0, 1], [1]]),
        ({"top_p": 0.5}, [[1, 2], [0], [0, 1], [1]]),
    ]
    for settings, expected in cases:
        params = SamplingParams(temperature=1.0, **settings)
        kept_NV = kept_tokens(rows, [params] * 4, TORCH) & (rows > -torch.inf)
        assert [row.nonzero().flatten().tolist() for row in kept_NV] == expected
        for row, own in zip(rows, expected, strict=True):
            assert kept(row, **settings) == own


def test_rows_have_their_own_truncations() -> None:
    rows = torch.tensor([[2.0, 1, 0, -1]] * 5)
    settings: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.7}, {"min_p": 0.3}, {}, {"top_k": 3}]
    params = [SamplingParams(temperature=1.0, **setting) for setting in settings]
    kept_NV = kept_tokens(rows, params, TORCH)
    assert kept_NV.sum(dim=-1).tolist() == [1, 2, 2, 4, 3]


def test_a_small_top_p_keeps_the_best_token() -> None:
    assert kept(torch.tensor([1.0, 3.0, 2.0]), top_p=5e-324) == [1]


def test_ties_that_penalties_make() -> None:
    """Of three best tokens one has been seen: it falls among the equals below, and has the highest id of them."""
    params = SamplingParams(temperature=1.0, top_k=3, presence_penalty=1.0)
    counts = TokenCounts([])
    counts.add(5)
    logits = adjust_logits(torch.tensor([[1.0, 2.0, 0.0, 1.0, 2.0, 2.0]]), [place(params, counts=counts)], TORCH)
    assert kept_tokens(logits, [params], TORCH)[0].nonzero().flatten().tolist() == [0, 1, 4]


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


# -- penalties, biases, masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xp", [NUMPY, TORCH])
def test_penalties_see_prompt_output_and_draft(xp: Any) -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -1.0})
    counts = TokenCounts([0])
    counts.add(1)
    logits = xp.asarray([[2.0, 2.0, 2.0, 2.0], [-2.0, 2.0, 2.0, 2.0], [-2.0, 2.0, 2.0, 2.0]], dtype=xp.float32)
    paths: list[tuple[int, ...]] = [(), (1,), (2, 1, 2)]
    found = adjust_logits(logits, [place(params, counts=counts, path=path) for path in paths], xp)
    assert found.tolist() == [
        [1.0, 1.0 - 0.5 - 0.25, 2.0, 1.0],
        [-4.0, 1.0 - 0.5 - 0.5, 2.0, 1.0],
        [-4.0, 1.0 - 0.5 - 0.5, 1.0 - 0.5 - 0.5, 1.0],
    ]
    assert logits[0].tolist() == [2.0] * 4, "the logits themselves stay"


def test_counts_grow_with_the_text() -> None:
    counts = TokenCounts([7, 0, 7])
    for token in (1, 7, 1, *range(100, 140)):
        counts.add(token)
    assert counts.ids.tolist() == [7, 0, 1, *range(100, 140)]
    assert counts.counts.tolist() == [1, 0, 2, *[1] * 40]


@pytest.mark.parametrize("xp", [NUMPY, TORCH])
def test_masks_and_biases_rule_tokens_out_and_in(xp: Any) -> None:
    logits = xp.asarray([[float(-token) for token in range(70)]] * 6, dtype=xp.float32)
    allowed = np.zeros(3, dtype=np.uint32)
    allowed[[0, 1, 2]] = 1 << 31, 1 << 1, 1 << 5
    bias = SamplingParams(logit_bias={69: math.inf, 0: -math.inf})
    greedy = SamplingParams()
    places = [
        place(greedy),
        place(greedy, allowed=allowed),
        place(bias),
        place(bias, allowed=allowed),
        place(greedy, allowed=np.zeros(3, dtype=np.uint32)),
        place(SamplingParams(temperature=1.0, logit_bias={69: math.inf, 68: math.inf}), seed=1),
    ]
    found = choose_tokens(logits, places, xp)
    assert found[:5] == [0, 31, 69, 69, -1]
    assert found[5] in (68, 69)


def test_of_equal_sums_the_lowest_id_is_chosen() -> None:
    assert choose_tokens(torch.tensor([[0.0, 2.0, 2.0]]), [place(SamplingParams())], TORCH) == [1]
    found, probability = best_sums(torch.tensor([0.0, 2, 2, 1]), None, place(SamplingParams()), 3, TORCH)
    assert probability == pytest.approx(float(torch.tensor([0.0, 2, 2, 1]).softmax(-1)[1]))
    assert [row for _, row in found] == [
        1,
        2,
        3,
    ]


def test_logits_that_are_no_numbers_choose_nothing() -> None:
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)):
        assert choose_tokens(torch.full((1, 9), torch.nan), [place(params)], TORCH) == [-1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """The lowest are greedy, the highest uniform."""
    params = SamplingParams(temperature=temperature)
    logits = torch.tensor([[0.0, 5.0, 4.999, 1.0]] * 200)
    found = choose_tokens(logits, [place(params, seed) for seed in range(200)], TORCH)
    assert set(found) == ({1} if temperature < 1 else {0, 1, 2, 3})
    assert math.isfinite(scale_of(temperature))


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_has_the_same_bits_everywhere() -> None:
    ids = np.arange(70_000)
    for seed, position in ((0, 0), (7, 100), (2**64 - 1, 2**31 - 1)):
        found = gumbel_noise(seed, position, ids, NUMPY)
        assert found.dtype == np.float32
        assert np.array_equal(found, gumbel_noise(seed, position, torch.from_numpy(ids), TORCH).numpy())
        assert np.array_equal(found[5:9], gumbel_noise(seed, position, ids[5:9], NUMPY))


def test_the_noise_is_the_one_that_is_written_down() -> None:
    """Texts of a seed must not change from one release to the next."""
    assert noise_key(0, 0) == (2065550767, 3793791033)
    found = gumbel_noise(1234, 56, np.array([0, 1, 2, 49151]), NUMPY)
    np.testing.assert_array_equal(
        found,
        np.array([0.8457931876182556, -0.16554167866706848, 0.03299577534198761, 1.7578186988830566], dtype=np.float32),
    )


def test_noise_has_the_right_distribution_and_tails() -> None:
    values = np.concatenate([gumbel_noise(seed, 3, np.arange(50_000), NUMPY) for seed in range(100)])
    assert np.isfinite(values).all()
    assert kstest(values[:200_000], "gumbel_r").pvalue > 0.001
    assert values.mean() == pytest.approx(0.5772, abs=0.002)
    # of 5 million, about 500 lie above the point that one in 10,000 reaches, and 5 above that of one in a million
    assert (values > -math.log(1e-4)).sum() == pytest.approx(500, abs=100)
    assert 0 < (values > -math.log(1e-6)).sum() < 20
    assert values.max() < 23


def test_noise_is_exact_where_it_is_large() -> None:
    """As float64 has it, from the same random bits."""
    from hopskip.sampling import _random_bits

    random = _random_bits(np.arange(2_000_000), *noise_key(5, 6))
    exact = -np.log(-np.log1p(-(random + 0.5) / 2.0**32))
    is_large = exact > -2  # below, a bit of the 32 is lost
    np.testing.assert_allclose(
        gumbel_noise(5, 6, np.arange(2_000_000), NUMPY)[is_large], exact[is_large], rtol=3e-7, atol=1e-6
    )
    assert exact.max() > 14


def uniform_pairs(first: Seq[NDArray[Any]], second: Seq[NDArray[Any]]) -> float:
    """p-value of the chi-squared test that pairs of noise fall evenly on an 8 x 8 grid of their quantiles."""
    x, y = (
        np.floor(8 * np.exp(-np.exp(-np.concatenate(side).astype(np.float64)))).astype(int) for side in (first, second)
    )
    counts = np.bincount(x * 8 + y, minlength=64)
    expected = len(x) / 64
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 63))


def test_noise_is_independent_across_positions_ids_seeds_and_choices() -> None:
    ids = np.arange(2000)
    for step in (1, 2, 64, 2**32):
        rows = [(gumbel_noise(s, 9, ids, NUMPY), gumbel_noise(s + step, 9, ids, NUMPY)) for s in range(100)]
        assert uniform_pairs(*zip(*rows, strict=True)) > 1e-4, f"seeds {step} apart"
    for step in (1, 3, 1000):
        rows = [(gumbel_noise(4, p, ids, NUMPY), gumbel_noise(4, p + step, ids, NUMPY)) for p in range(100)]
        assert uniform_pairs(*zip(*rows, strict=True)) > 1e-4, f"positions {step} apart"
        rows = [
            (gumbel_noise(s, s, ids, NUMPY), gumbel_noise(s + step, s - step + 2000, ids, NUMPY)) for s in range(100)
        ]
        assert uniform_pairs(*zip(*rows, strict=True)) > 1e-4, f"seeds and positions {step} apart"
    for step in (1, 2, 256, 32768):
        rows = [(gumbel_noise(s, 2, ids, NUMPY), gumbel_noise(s, 2, ids + step, NUMPY)) for s in range(100)]
        assert uniform_pairs(*zip(*rows, strict=True)) > 1e-4, f"ids {step} apart"


def test_fresh_seeds_differ_and_survive_json() -> None:
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**53 for seed in seeds)
    drawn = Rule.of(SamplingParams(temperature=1.0), [1])
    assert drawn.seed != Rule.of(SamplingParams(temperature=1.0), [1]).seed
    assert Rule.of(SamplingParams(temperature=1.0, seed=-1), [1]).seed == 2**64 - 1
    assert drawn.counts is None
    assert Rule.of(SamplingParams(presence_penalty=1.0), [3]).counts is not None


def test_choices_follow_the_exact_distribution() -> None:
    """One place, 20,000 seeds, each truncation."""
    logits = np.array([1.0, 0.2, -0.5, 0.9, -2.0, 0.0], dtype=np.float32)
    sums = np.stack([logits / np.float32(0.8) + gumbel_noise(seed, 1, np.arange(6), NUMPY) for seed in range(20_000)])
    settings: list[dict[str, Any]] = [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}]
    for setting in (*settings, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        params = SamplingParams(temperature=0.8, **setting)
        kept_V = kept_tokens(logits[None], [params], NUMPY)[0]
        chosen = np.where(kept_V, sums, -np.inf).argmax(axis=1)
        expected = exact_probabilities(logits.astype(np.float64), params) * len(sums)
        statistic = ((np.bincount(chosen, minlength=6) - expected)[kept_V] ** 2 / expected[kept_V]).sum()
        assert chi2.sf(statistic, kept_V.sum() - 1) > 1e-4, setting
        places = [place(params, seed, 1) for seed in range(300)]
        assert choose_tokens(np.tile(logits, (300, 1)), places, NUMPY) == chosen[:300].tolist()


@pytest.mark.parametrize("xp", [NUMPY, TORCH])
def test_a_draft_shares_the_noise(xp: Any) -> None:
    """Where exit and model are alike they choose the same tokens, also from a draft vocabulary; far apart, others."""
    generator = np.random.default_rng(0)
    logits_NV = generator.normal(size=(300, 40)).astype(np.float32) * 2
    ids = [3, 39, 0, 17, 21, 5, 8, 30, 11, 12]
    params = SamplingParams(temperature=0.9)
    same = alike = 0
    for row, logits in enumerate(logits_NV):
        here = place(params, row, row)
        chosen = choose_tokens(xp.asarray(logits[None]), [here], xp)[0]
        (_, best), *others = best_sums(xp.asarray(logits), None, here, 3, xp)[0]
        assert best == chosen
        assert len({best, *(row for _, row in others)}) == 3
        masked = np.full_like(logits, -np.inf)
        masked[ids] = logits[ids]
        own = best_sums(xp.asarray(logits[ids]), ids, here, 1, xp)[0][0][1]
        assert ids[own] == choose_tokens(xp.asarray(masked[None]), [here], xp)[0]
        near = logits + generator.normal(size=40).astype(np.float32) * 0.2
        alike += best_sums(xp.asarray(near), None, here, 1, xp, sharpness=1.25)[0][0][1] == chosen
        same += best_sums(xp.asarray(near), None, place(params, row + 1000, row), 1, xp)[0][0][1] == chosen
    assert alike > 240
    assert same < 120


# -- parameters --------------------------------------------------------------------------------------------------------


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
        ({"temperature": 1.0, "seed": 2**64}, "seed is"),
        ({"temperature": 1.0, "seed": -(2**63) - 1}, "seed is"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_values_at_the_bounds_are_taken() -> None:
    SamplingParams(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=0)
    SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0, repetition_penalty=1e-9, logprobs=1)
    assert SamplingParams(stop="end").stop == ("end",)
    with pytest.raises(FrozenInstanceError):  # requests share them
        SamplingParams().top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):  # a bare number says nothing
        SamplingParams(256)  # type: ignore[call-arg]
    assert SamplingParams(logit_bias={3: -math.inf}).changes_logits


def test_what_narrows_a_draw_is_accepted_and_idle_where_nothing_is_drawn() -> None:
    params = SamplingParams(top_k=1, top_p=0.5, min_p=0.3, seed=7)
    assert params.is_greedy
    assert not params.truncates
    with pytest.raises(ConfigError, match="top_p is 0"):  # what could never work is wrong at any temperature
        SamplingParams(top_p=0.0)


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
