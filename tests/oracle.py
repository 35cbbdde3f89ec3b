"""Plain float64 versions of the sampling rules, written apart from the package, to hold it against."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from hopskip import SamplingParams

Array = NDArray[np.float64]


def exact_probabilities(logits: Array, params: SamplingParams) -> Array:
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-logits, kind="stable")  # of equal logits the lower token id comes first
    if params.top_k:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        total = 0.0
        for rank, token in enumerate(order):
            if total >= params.top_p:
                probs[order[rank:]] = 0
                break
            total += probs[token]
        probs /= probs.sum()
    if params.min_p:
        probs[probs < params.min_p * probs.max()] = 0
        probs /= probs.sum()
    return np.asarray(probs)


def exact_adjusted(logits: Array, params: SamplingParams, prompt: list[int], output: list[int]) -> Array:
    adjusted = logits.astype(np.float64).copy()
    for token in range(len(adjusted)):
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
        if token in output:
            adjusted[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        adjusted[token] += params.logit_bias.get(token, 0.0)
    return adjusted


def exact_joint(table: Array, prompt: list[int], params: SamplingParams, skip: int, length: int) -> Array:
    """Distribution of output tokens `skip` .. `skip + length - 1` of a Markov model, flattened [V ** length]."""
    vocab = len(table)
    joint = np.zeros((vocab,) * length)
    for output in itertools.product(range(vocab), repeat=skip + length):
        probability = 1.0
        for i, token in enumerate(output):
            last = output[i - 1] if i else prompt[-1]
            adjusted = exact_adjusted(table[last], params, prompt, list(output[:i]))
            probability *= exact_probabilities(adjusted, params)[token]
        joint[output[skip:]] += probability
    return joint.ravel()
