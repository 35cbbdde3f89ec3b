"""How the tokens of one request are chosen: as the user says it, and as a backend is told.

Shape letters: V vocabulary, W words of 32 bits, M draft tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

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


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")


Mask = NDArray[np.uint32]
"""Which tokens are allowed, a bit for each: [W], or [N, W]; token 0 is the lowest bit of the first word."""


class TokenCounts:
    """Which tokens a text holds, and how often each was generated: what penalties depend on."""

    def __init__(self, prompt_ids: Seq[int]) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array([*self._place], dtype=np.int32)
        self._counts = np.zeros(len(self._ids), dtype=np.int32)

    def add(self, token: int) -> None:
        """The text goes on with a token."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            room = (0, len(self._ids) + 16)
            self._ids, self._counts = np.pad(self._ids, room), np.pad(self._counts, room)
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int32]:
        """Tokens of prompt and output, each once."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.int32]:
        """How often each of them was generated."""
        return self._counts[: len(self._place)]


class Constraint(Protocol):
    """Which tokens one sequence may take: the state of a grammar, after everything that the sequence has generated."""

    @property
    def is_complete(self) -> bool:
        """True if no token may follow, so that the text ends here."""
        ...

    def accept(self, token: int) -> None:
        """The sequence has taken this token."""
        ...

    def num_allowed(self, draft_ids: Seq[int]) -> int:
        """How many tokens of a chain may follow, one after the other. The state stays as it is."""
        ...

    def masks(self, draft_ids: Seq[int], parents: Seq[int] | None = None) -> Mask:
        """Tokens that may follow before any draft token, and after each, [M + 1, W]; at least one in each row. Rows
        behind a token that may not follow say nothing. The state stays as it is.

        Args:
            parents: of a tree, see `Draft.parents`; None is a chain.
        """
        ...


@dataclass(frozen=True, eq=False)
class Rule:
    """How the tokens of one text are chosen."""

    params: SamplingParams
    seed: int
    """Of the noise, 0 to 2**64 - 1."""
    counts: TokenCounts | None = None
    """Of the text so far; needed where `params.has_penalties`."""

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: Seq[int]) -> Rule:
        """For a text that begins now. Without a seed of its own it gets a fresh one."""
        seed = fresh_seed() if params.seed is None else params.seed % 2**64
        return cls(params, seed, TokenCounts(prompt_ids) if params.has_penalties else None)


def fresh_seed() -> int:
    """One that JSON carries unchanged everywhere."""
    return secrets.randbits(53)


class Place(NamedTuple):
    """Where a token is to be chosen."""

    rule: Rule
    position: int
    """Of the token in the text, the prompt's tokens counted."""
    path: tuple[int, ...] = ()
    """Draft tokens between the text and the token."""
    allowed: Mask | None = None
    """[W]; None: all are."""


class NoTokenError(ValueError):
    """No token is allowed, or no logit is a number."""
