"""One request on its way through the engine: how its tokens are chosen, where it stands, what has been generated.

Shape letters: W words of 32 bits, M draft tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hopskip.errors import HopskipError
from hopskip.options import short_repr
from hopskip.sampling_params import SamplingParams
from hopskip.speculative import DraftKind

Mask = NDArray[np.uint32]
"""Which tokens are allowed, a bit for each: [W], or [N, W]; token 0 is the lowest bit of the first word."""


def all_allowed(vocab_size: int) -> Mask:
    """[W]: nothing is forbidden."""
    return np.full(-(-vocab_size // 32), 2**32 - 1, dtype=np.uint32)


def without(mask_W: Mask, token_ids: Iterable[int] | NDArray[np.int64]) -> Mask:
    """A mask that forbids these tokens, too.

    >>> [f"{word:x}" for word in without(all_allowed(40), [0, 33])]
    ['fffffffe', 'fffffffd']
    """
    ids = token_ids if isinstance(token_ids, np.ndarray) else np.array([*token_ids], dtype=np.int64)
    ids = ids[ids < 32 * len(mask_W)]
    left_W = mask_W.copy()
    np.bitwise_and.at(left_W, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    return left_W


def paths_of(draft_ids: Seq[int], parents: Seq[int] | None) -> list[tuple[int, ...]]:
    """Of each row of a verify pass the draft tokens that lead to it: before any, and after each.

    Args:
        parents: of a tree, see `Draft.parents`; None is a chain.

    >>> paths_of([5, 9, 7], [-1, 0, 0])
    [(), (5,), (5, 9), (5, 7)]
    """
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft_ids, range(-1, len(draft_ids) - 1) if parents is None else parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


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


class NoTokenError(HopskipError, ValueError):
    """No token is allowed, or a logit is not a number."""

    def __init__(self) -> None:
        super().__init__(
            "no token can be chosen: none is allowed, or the model's logits are not numbers; without a grammar and "
            "biases its weights are damaged, or its numbers overflow: load it anew, or in another precision"
        )


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

    __repr__ = short_repr


class Score(NamedTuple):
    """How probable the model finds a token of a prompt, after those before it."""

    logprob: float
    rank: int
    """1 for the most probable."""
    top_logprobs: dict[int, float]
    """Of the most probable tokens, as many as were asked for."""


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
    banned: Constraint | None = None
    """Keeps texts away (`SamplingParams.bad_words`); its own state, too."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens whose text is given out, though others' is not: marks that are to be read."""
    max_draft_tokens: int | None = None
    """At most this many tokens are drafted in a round, 0 for none; None: as many as the engine's configuration says."""
    exit_layer: int | None = None
    """Its early-exit drafts run this many layers; None: as many as the engine's configuration says."""
    cache_salt: str | None = None
    """Its prompt may start from what requests with the same salt have left in the cache, and from nothing else."""
    client: str | None = None
    """Whose it is, where several share an engine: those of whom fewer run go first."""


@dataclass(kw_only=True)
class SpeculativeStats:
    """What a generation cost and what drafting gave, under the field's standard names (those of vLLM): counts and times
    of one request. Seconds are wall-clock; in a batch they include the companions' work."""

    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    """Prompt tokens whose keys and values an earlier request had left in the cache."""
    num_tokens: int = 0
    """Tokens generated."""
    prefill_seconds: float = 0.0
    """From the start of the prompt's first pass to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    num_target_passes: int = 0
    """Full-depth passes after the prompt's, with or without a draft to verify."""
    num_drafts: int = 0
    """Rounds that had a draft."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    """How often a draft's token was accepted in the first, second, .. place."""
    speedup_over_plain: float | None = None
    """Decoding speed over that of plain decoding: an estimate from measured costs (`hopskip.draft.gain`). None without
    a draft source, and where the model's costs are not known."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass after the prompt's yields, with or without a draft; 0 if there was none."""
        return (self.num_tokens - 1) / self.num_target_passes if self.num_target_passes else 0.0

    __repr__ = short_repr

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, per second of decoding; 0 if there were none."""
        return (self.num_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were computed, per second; 0 if nothing was measured."""
        num_computed = self.num_prompt_tokens - self.num_cached_prompt_tokens
        return num_computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of draft tokens that were accepted; 0 without drafts."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round with a draft yields, the bonus or recovered token counted; 1 without drafts."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def record_draft(self, num_draft_tokens: int, num_accepted_tokens: int, depth: int) -> None:
        """Count a round. `depth`: most tokens of the draft that could be accepted; all, unless it is a tree."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        per_pos = self.num_accepted_tokens_per_pos
        per_pos.extend([0] * (depth - len(per_pos)))
        for index in range(num_accepted_tokens):
            per_pos[index] += 1

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, ready for JSON."""
        derived = (
            "tokens_per_pass",
            "decode_tokens_per_second",
            "prefill_tokens_per_second",
            "acceptance_rate",
            "mean_acceptance_length",
        )
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


class Sequence:
    """The state of one request. The engine alone changes it; everybody may read it.

    While decoding, `num_cached == len(token_ids) - 1`: the last token is chosen but has not been through the model yet.
    """

    def __init__(self, request: Request, eos_token_ids: frozenset[int], number: int = -1) -> None:
        params = request.params
        self.request = request
        self.params = params
        self.constraint = request.constraint
        """The engine puts whatever else restricts its tokens here too."""
        self.number = number
        """Counts the requests of an engine, from 0."""
        self.token_ids = list(request.prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.tokens: list[Token] = []
        self.prompt_scores: list[Score] = []
        """Of the prompt's tokens but the first, if `SamplingParams.prompt_logprobs` asks for them."""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.stats = SpeculativeStats(num_prompt_tokens=self.num_prompt_tokens)
        self.slot = -1
        self.num_cached = 0
        self.prefill_started = 0.0
        self.first_token_at = 0.0
        self.rule = Rule.of(params, self.token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def takes_best(self) -> bool:
        """True if its tokens are the model's best ones, a grammar apart."""
        return self.params.is_greedy and not self.params.changes_logits

    @property
    def needs_logits(self) -> bool:
        """True if knowing the model's best token is not enough to choose this sequence's, or to report of it."""
        return not self.takes_best or self.params.logprobs is not None or self.constraint is not None

    @property
    def seed(self) -> int | None:
        """Of a drawn text, which it can be had again with; None of a greedy one."""
        return None if self.params.is_greedy else self.rule.seed

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
        if self.rule.counts is not None:
            self.rule.counts.add(token.id)
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
