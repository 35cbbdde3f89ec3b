"""From logits to tokens: penalties, biases, masks, temperature, truncation, noise.

A drawn token is the one of the largest sum of log-probability and Gumbel noise, among those that truncation leaves: an
exact draw from their distribution (the Gumbel-max trick). The noise is a function of seed, position in the text and
token id alone. So a text depends on prompt, parameters and seed, and on nothing else; and a draft that adds the *same*
noise to its own log-probabilities proposes what the model will say wherever the two are alike (Daliri, Musco, Suresh,
arXiv 2408.07978). It is verified by comparing ids. Greedy is the case without noise.

This is the readable version, for any array namespace. The native engine has the same rules in native/choose.cpp, and
gives the same tokens for the same logits.

Shape letters: N rows, V vocabulary, n tokens of a draft's head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Place

Array = Any

_LARGEST_LOGIT = 1e30
"""A bias of infinity must leave something to compare."""
_SMALLEST_FLOAT, _LARGEST_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def choose_tokens(logits_NV: Array, places: Seq[Place], xp: Any) -> list[int]:
    """The token of each row; -1 where there is `NoTokenError`."""
    logits_NV = adjust_logits(logits_NV, places, xp)
    scaled_NV = _scaled(logits_NV, [place.rule.params for place in places], xp)
    kept_NV = scaled_NV > -math.inf
    if truncated := [row for row, place in enumerate(places) if place.rule.params.truncates]:
        kept_NV[truncated] &= kept_tokens(logits_NV[truncated], [places[row].rule.params for row in truncated], xp)
    sums_NV = xp.where(kept_NV, scaled_NV, -math.inf)
    is_drawn_N1 = _column([not place.rule.params.is_greedy for place in places], logits_NV, xp) > 0
    rows, ids = xp.nonzero(kept_NV & is_drawn_N1)  # noise is for what is left, all of it at once
    keys = [noise_key(place.rule.seed, place.position) for place in places]
    first, second = (xp.asarray(half, dtype=xp.int64, device=device(logits_NV)) for half in zip(*keys, strict=True))
    sums_NV[rows, ids] += _gumbel(_random_bits(ids, first[rows], second[rows]), xp)
    can_be_N = xp.any(kept_NV, axis=-1) & is_number(xp.max(logits_NV, axis=-1))
    return [int(token) if can else -1 for token, can in zip(xp.argmax(sums_NV, axis=-1), can_be_N, strict=True)]


def best_sums(
    logits_n: Array, ids: Seq[int] | None, place: Place, number: int, xp: Any, sharpness: float = 1.0
) -> tuple[list[tuple[float, int]], float]:
    """What a draft takes for a token, and its next best: sums of scaled logits and noise, and rows of the head, best
    first; and how probable the first is without noise. None where there is `NoTokenError`. Nothing is truncated: that
    changes how many tokens are accepted, not which text comes.

    Args:
        ids: tokens that the head's rows stand for; None: all, in order.
        sharpness: what the scaled logits are multiplied by before the noise.
    """
    params, row_of = place.rule.params, None if ids is None else {token: row for row, token in enumerate(ids)}
    logits_n = _adjusted(xp.asarray(logits_n, copy=True), place, row_of, xp)
    if not is_number(xp.max(logits_n)):
        return [], 0.0
    scale = scale_of(params.temperature)
    if not params.is_greedy:
        scale = float(np.float32(scale) * np.float32(sharpness))
    scaled_n = sums_n = (logits_n - xp.max(logits_n)) * scale
    if not params.is_greedy:
        ids_n = xp.asarray(range(len(logits_n)) if ids is None else ids, dtype=xp.int64, device=device(logits_n))
        sums_n = sums_n + gumbel_noise(place.rule.seed, place.position, ids_n, xp)
    order = xp.argsort(-sums_n, stable=True)[:number]
    probability = float(xp.exp(scaled_n[order[0]]) / xp.sum(xp.exp(scaled_n)))
    return [(float(sums_n[row]), int(row)) for row in order], probability


def adjust_logits(logits_NV: Array, places: Seq[Place], xp: Any) -> Array:
    """Apply penalties, then biases, then masks. Returns new logits, float32 [N, V]."""
    logits_NV = xp.astype(logits_NV, xp.float32)  # a copy
    for row, place in enumerate(places):
        if place.rule.params.changes_logits or place.allowed is not None:
            logits_NV[row] = _adjusted(logits_NV[row], place, None, xp)
    return logits_NV


def _adjusted(logits_n: Array, place: Place, row_of: dict[int, int] | None, xp: Any) -> Array:
    """The logits, changed in place. `row_of`: of the tokens that have one; None: each has that of its own number."""
    params, counts = place.rule.params, place.rule.counts
    if params.has_penalties:
        assert counts is not None
        output = Counter(dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)))
        output.update(place.path)
        rows, seen = _rows_of([*output], logits_n, row_of, xp)
        output_S = xp.asarray([float(output[token]) for token in seen], dtype=xp.float32, device=device(logits_n))
        own_S = logits_n[rows]
        if params.repetition_penalty != 1:
            penalty = np.float32(min(max(params.repetition_penalty, _SMALLEST_FLOAT), _LARGEST_FLOAT))
            own_S = xp.where(own_S > 0, own_S * float(np.float32(1) / penalty), own_S * float(penalty))
        penalty_S = params.presence_penalty + params.frequency_penalty * output_S
        logits_n[rows] = xp.where(output_S > 0, own_S - penalty_S, own_S)
    if params.logit_bias:
        rows, biased = _rows_of([*params.logit_bias], logits_n, row_of, xp)
        biases = [min(params.logit_bias[token], _LARGEST_LOGIT) for token in biased]
        added = logits_n[rows] + xp.asarray(biases, dtype=xp.float32, device=device(logits_n))
        logits_n[rows] = xp.where(added > _LARGEST_LOGIT, _LARGEST_LOGIT, added)
    if place.allowed is not None:
        allowed_V = np.unpackbits(place.allowed.view(np.uint8), bitorder="little", count=len(logits_n)).astype(bool)
        logits_n[xp.asarray(~allowed_V, device=device(logits_n))] = -math.inf
    return logits_n


def _rows_of(tokens: list[int], logits_n: Array, row_of: dict[int, int] | None, xp: Any) -> tuple[Array, list[int]]:
    """Rows of the tokens that have one, and these tokens."""
    known = tokens if row_of is None else [token for token in tokens if token in row_of]
    rows = known if row_of is None else [row_of[token] for token in known]
    return xp.asarray(rows, dtype=xp.int64, device=device(logits_n)), known


def _scaled(logits_NV: Array, params: Seq[SamplingParams], xp: Any) -> Array:
    """Log-probabilities but for a term that all tokens of a row share."""
    scales = [scale_of(p.temperature) for p in params]
    best_N1 = xp.max(logits_NV, axis=-1, keepdims=True)
    best_N1 = xp.where(is_number(best_N1), best_N1, xp.zeros_like(best_N1))  # of a row where nothing is allowed
    return (logits_NV - best_N1) * _column(scales, logits_NV, xp)


def scale_of(temperature: float) -> float:
    """What logits are multiplied by; a temperature of 0 takes them as they are, and the best of them."""
    if temperature == 0:
        return 1.0
    with np.errstate(divide="ignore", over="ignore"):
        return min(float(np.float32(1) / np.float32(temperature)), _LARGEST_FLOAT)


def kept_tokens(logits_NV: Array, params: Seq[SamplingParams], xp: Any) -> Array:
    """Which tokens truncation leaves, bool [N, V]. Truncations apply in the order of Hugging Face's warpers:
    temperature, top-k, top-p, min-p.

    Tokens are ordered by their logits, best first; of equal logits the lower id comes first. top-k keeps the first k
    tokens of that order, exactly k; top-p the first ones whose probabilities (of what top-k leaves) reach the sum, and
    not one more. min-p is a threshold: it keeps every token that is at least this fraction as probable as the best.

    transformers differs where logits are equal. Its top-k keeps all tokens that are as good as the k-th. Its top-p
    keeps as many as here, but which of equals is left open.
    """
    scaled_NV = _scaled(logits_NV, params, xp)
    num_tokens = logits_NV.shape[-1]
    order_NV = xp.argsort(-logits_NV, axis=-1, stable=True)
    rank_NV = xp.argsort(order_NV, axis=-1)
    kept_NV = rank_NV < _column([p.top_k or num_tokens for p in params], logits_NV, xp)
    weights_NV = xp.where(kept_NV, xp.exp(xp.astype(scaled_NV, xp.float64)), 0.0)
    by_rank_NV = xp.take_along_axis(weights_NV, order_NV, axis=-1)
    before_NV = xp.cumulative_sum(by_rank_NV, axis=-1) - by_rank_NV
    reached_NV = before_NV < xp.sum(weights_NV, axis=-1, keepdims=True) * _column(
        [max(float(np.float32(p.top_p)), _SMALLEST_FLOAT) for p in params], before_NV, xp
    )
    has_nucleus_N1 = _column([p.top_p < 1 for p in params], logits_NV, xp) > 0
    kept_NV &= ~has_nucleus_N1 | xp.take_along_axis(reached_NV, rank_NV, axis=-1)
    least = [float(np.log(np.float32(max(p.min_p, _SMALLEST_FLOAT)))) if p.min_p else -math.inf for p in params]
    least_N1 = _column(least, logits_NV, xp)
    return kept_NV & (scaled_NV >= least_N1)


def is_number(largest: Array) -> Array:
    """Whether the largest of some logits can be chosen. It is NaN if any of them is, and minus infinity if none is
    allowed."""
    return (largest > -math.inf) & (largest < math.inf)


def logprobs_of(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of all tokens."""
    shifted_V = logits_V - logits_V.max()
    logprobs_V: NDArray[np.float32] = shifted_V - np.log(np.exp(shifted_V, dtype=np.float64).sum()).astype(np.float32)
    return logprobs_V


def best_of(logprobs_V: NDArray[np.float32], number: int) -> dict[int, float]:
    """The most probable tokens, best first; of equals the lower id."""
    if not number:
        return {}
    best = np.argpartition(-logprobs_V, number - 1)[:number]
    best = best[np.lexsort((best, -logprobs_V[best]))]
    return dict(zip(best.tolist(), logprobs_V[best].tolist(), strict=True))


def _column(values: Seq[float], like: Array, xp: Any) -> Array:
    """[N, 1]"""
    return xp.asarray(values, dtype=like.dtype, device=device(like))[:, None]


# -- noise -------------------------------------------------------------------------------------------------------------


def gumbel_noise(seed: int, position: int, ids: Array, xp: Any) -> Array:
    """Gumbel noise of some tokens, int64, at a position: float32.

    A written-down integer hash, as numpy's Philox multiplies 64 bits by 64, which vector instructions cannot. All that
    follows it is sums and products of float32, so that the bits are the same everywhere.
    """
    return _gumbel(_random_bits(ids, *noise_key(seed, position)), xp)


def _gumbel(random: Array, xp: Any) -> Array:
    """-log(E), E = -log(1 - (random + 1/2) / 2**32)."""
    small = xp.astype(random & 0x3FFFFFFF, xp.float32)
    large = xp.astype((random ^ 0xFFFFFFFF) >> 1, xp.float32)
    f, exponent = _split((large + 0.5) * 2.0**-31, xp)
    # E has full precision where it is small, which is where a token wins
    is_small = random < 2**30
    waiting = -_logarithm(
        xp.where(is_small, -((small + 0.5) * 2.0**-32), f), xp.where(is_small, xp.zeros_like(exponent), exponent)
    )
    return -_logarithm(*_split(waiting, xp))


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two halves of a hash; seeds and positions may follow each other."""
    key = _mixed((_mixed(seed) + 0x9E3779B97F4A7C15 * (position + 1)) % 2**64)
    return key % 2**32, key >> 32


def _mixed(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _random_bits(x: Array, first: Any, second: Any) -> Array:
    """triple32 (Chris Wellons, hash-prospector) of 32-bit values in int64, with one half of the key before it and the
    other within."""
    x = x ^ first
    x = (x ^ x >> 17) * 0xED5AD4BB & 0xFFFFFFFF
    x = (x ^ x >> 11 ^ second) * 0xAC4C1B51 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x31848BAB & 0xFFFFFFFF
    return x ^ x >> 14


def _split(x: Array, xp: Any) -> tuple[Array, Array]:
    """A positive normal number as 2**exponent * (1 + f), with 1 + f from sqrt(1/2) to sqrt(2): f and the exponent."""
    pattern = x.view(xp.int32)
    exponent = (pattern - 0x3F3504F3) >> 23
    return (pattern - (exponent << 23)).view(xp.float32) - 1.0, xp.astype(exponent, xp.float32)


def _logarithm(f: Array, exponent: Array) -> Array:
    """log(1 + f) + exponent * log(2): the polynomial is that of Cephes. No products and sums may be fused."""
    y = f * 7.0376836292e-2 - 1.1514610310e-1
    for coefficient in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        y = y * f + coefficient
    square = f * f
    y = y * f * square - exponent * 2.12194440e-4
    y = y - square * 0.5
    return f + y + exponent * 0.693359375
