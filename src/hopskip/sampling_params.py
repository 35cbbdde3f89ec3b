"""How the tokens of one request are chosen, as the user says it: a value and the rules that it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hopskip.errors import ConfigError
from hopskip.options import option


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. `temperature` 0 is greedy: the best token, always.

    Raises:
        ConfigError: a value is out of range, or would have no effect (`top_p` with greedy decoding, say).
    """

    max_new_tokens: int = option(
        256, "Most tokens to generate (default: 256; in a chat 1024 an answer).", "N", short="-n"
    )
    temperature: float = option(0.0, "0 is greedy: always the best token.", "T")
    top_k: int = option(0, "Sample from the k most probable tokens; 0 is all.", "K")
    top_p: float = option(1.0, "Sample from the fewest tokens whose probabilities reach this sum.", "P")
    """Nucleus sampling, arXiv 1904.09751."""
    min_p: float = option(0.0, "Sample from tokens at least this fraction as probable as the best.", "P")
    """arXiv 2407.01082."""
    repetition_penalty: float = option(1.0, "Above 1: makes tokens seen before less likely.", "X")
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (arXiv 1909.05858)."""
    presence_penalty: float = option(0.0, "Taken off the logit of tokens generated before.", "X")
    frequency_penalty: float = option(0.0, "Taken off once for each time that a token was generated.", "X")
    """Off its logit."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = option(None, "Same seed, same text (with a temperature).", "N")
    """Of 64 bits, signed or not. None takes a fresh one, which the result reports."""
    stop: tuple[str, ...] = option((), "End before this text; may be given several times.", "TEXT")
    """The text returned ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = option(False, "Go on when the model ends its text.")
    logprobs: int | None = None
    """Report each token's log-probability and those of the n best; 0 for the token's own only. None reports none.
    Log-probabilities are the model's own: before penalties, bias and temperature."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or above")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (keep all) or above")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a number of 64 bits")
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, 0 or above")
        _require(all(self.stop), "stop", self.stop, "non-empty texts")
        for token_id, bias in self.logit_bias.items():
            _require(not math.isnan(bias), "logit_bias", {token_id: bias}, "a number for each token id")
        if self.is_greedy:
            for item in fields(self):
                if item.name in ("top_k", "top_p", "min_p", "seed") and getattr(self, item.name) != item.default:
                    value = getattr(self, item.name)
                    raise ConfigError(
                        f"{item.name}={value} has no effect at temperature 0 (greedy); set temperature above 0"
                    )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """True if penalties or biases apply, so that the best token is not simply the model's."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def with_defaults(given: Mapping[str, Any], recommended: Mapping[str, Any]) -> SamplingParams:
    """What was asked for, and for the rest what the model's makers recommend (`generation.recommended_sampling`). Who
    asks for temperature 0 gets the model's best tokens: nothing of the makers' settings then.

    >>> with_defaults({"temperature": 0.3}, {"temperature": 0.7, "top_p": 0.8}).top_p
    0.8
    >>> with_defaults({"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}).top_p
    1.0

    Raises:
        ConfigError: as `SamplingParams` does.
    """
    return SamplingParams(**(given if given.get("temperature") == 0 else {**recommended, **given}))


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
