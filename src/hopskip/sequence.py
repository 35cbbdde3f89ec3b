"""One request on its way through the engine: token ids, position in the cache, and what has been generated."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import torch

from hopskip.sampling import Constraint, SamplingParams, TokenCounts
from hopskip.speculative import DraftKind
from hopskip.stats import SpeculativeStats

Origin = DraftKind | Literal["target", "bonus"]
"""Who came up with a token: an accepted draft's source; or the target, alone (plain decoding, or a *recovered* token in
place of a rejected draft), or as the *bonus* after a draft accepted whole."""

FinishReason = Literal["stop", "length", "abort", "error"]
"""`error`: something of this request alone has failed (its stop callback, its constraint); see `Sequence.error`."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    origin: Origin
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of the engine: one prompt, one text."""

    prompt_ids: Seq[int]
    """At least one token id."""
    params: SamplingParams = field(default_factory=SamplingParams)
    is_stop: Callable[[int], bool] | None = None
    """Called with every committed token in order; returning True makes that token the last."""
    constraint: Constraint | None = None
    """Which tokens may come; its own state, not shared with other requests."""
    max_draft_tokens: int | None = None
    """At most this many tokens are drafted in a round, 0 for none; None: as many as the engine's configuration says."""
    exit_layer: int | None = None
    """Its early-exit drafts run this many layers; None: as many as the engine's configuration says."""


class Sequence:
    """The state of one request. The engine alone changes it; everybody may read it.

    While decoding, `num_cached == len(token_ids) - 1`: the last token is chosen but has not been through the model yet.
    """

    def __init__(self, request: Request, eos_token_ids: frozenset[int], vocab_size: int, number: int = -1) -> None:
        params = request.params
        self.request = request
        self.params = params
        self.constraint = request.constraint
        self.number = number
        """Counts the requests of an engine, from 0."""
        self.token_ids = list(request.prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.stats = SpeculativeStats(num_prompt_tokens=self.num_prompt_tokens)
        self.slot = -1
        self.num_cached = 0
        self.prefill_started = 0.0
        self.first_token_at = 0.0
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.counts = TokenCounts(self.token_ids, vocab_size) if params.has_penalties else None

    @property
    def is_seeded(self) -> bool:
        """Whether its drawn text must come the same another time."""
        return self.params.seed is not None and not self.params.is_greedy

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def needs_logits(self) -> bool:
        """True if knowing the model's best token is not enough to choose this sequence's."""
        params = self.params
        return (
            not params.is_greedy or params.changes_logits or params.logprobs is not None or self.constraint is not None
        )

    @property
    def allows_runner_ups(self) -> bool:
        """Penalties and grammars follow a chain of tokens, so its drafts can be no trees."""
        return not self.params.changes_logits and self.constraint is None

    @property
    def is_prefilled(self) -> bool:
        return bool(self.tokens)

    @property
    def num_tokens_left(self) -> int:
        return self.params.max_new_tokens - len(self.tokens)

    def append(self, token: Token) -> None:
        """Commit one token, and finish if it ends the text."""
        assert not self.is_finished
        self.token_ids.append(token.id)
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.add(token.id)
        if self._ends_with(token.id):
            self.finish_reason = self.finish_reason or "stop"
        elif self.num_tokens_left == 0:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End the request because of an error of its own; its companions go on."""
        self.error = error
        self.finish_reason = "error"

    def _ends_with(self, token: int) -> bool:
        try:
            if token in self.stop_token_ids or (self.request.is_stop is not None and self.request.is_stop(token)):
                return True
            if self.constraint is not None:
                self.constraint.accept(token)
                return self.constraint.is_complete
        except Exception as error:  # whatever a request brings with it must not harm the others
            self.fail(error)
            return True
        return False
