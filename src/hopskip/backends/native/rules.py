"""Rules of choosing tokens as the C++ engine takes them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from hopskip.backends.native.isa import extension
from hopskip.sampling import Rule

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""For what float32 would round to 0 or infinity, which have other meanings."""

_native: WeakKeyDictionary[Rule, Any] = WeakKeyDictionary()


def native_rule(rule: Rule) -> Any:
    """`extension.Rule`, with the counts of now."""
    found = _native.get(rule)
    if found is None:
        found = _native[rule] = _make(rule)
    if rule.counts is not None:
        found.set_counts(rule.counts.ids, rule.counts.counts)
    return found


def _make(rule: Rule) -> Any:
    params = rule.params
    return extension.Rule(
        temperature=max(params.temperature, _SMALLEST) if params.temperature else 0.0,
        seed=rule.seed,
        top_k=min(params.top_k, 2**31 - 1),
        top_p=max(params.top_p, _SMALLEST),
        min_p=max(params.min_p, _SMALLEST) if params.min_p else 0.0,
        repetition=min(max(params.repetition_penalty, _SMALLEST), _LARGEST),
        presence=min(max(params.presence_penalty, -_LARGEST), _LARGEST),
        frequency=min(max(params.frequency_penalty, -_LARGEST), _LARGEST),
        biased=[*params.logit_bias],
        biases=[*params.logit_bias.values()],
    )
