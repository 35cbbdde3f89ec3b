"""The engine: admits requests, and steps them together. A step is a prefill pass or a round: draft, verify, commit.

It speaks token ids only; text, templates and stop strings live at the edge (`llm.py`). One cache serves draft and
target. Lengths belong to the sequences, so rejecting a draft is no work at all: the next pass overwrites its positions.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from hopskip.backends.base import Backend
from hopskip.draft.base import Drafter, Round
from hopskip.draft.gain import GainEstimate
from hopskip.draft.make import DraftersByExit, Identity, prepare
from hopskip.engine.prefill import Prefill
from hopskip.engine.restrictions import restrict
from hopskip.engine.round import Rounds
from hopskip.engine.slots import PrefixStats, Slots
from hopskip.errors import ConfigError, PromptError
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig


class Engine:
    """Generates for many sequences at once, each with its own length, sampling parameters and acceptance.

    Args:
        speculative, drafter: as `hopskip.draft.make.prepare` gives them; see `make_engine`.
        eos_token_ids: end a text; None: those of the model's config.
        max_model_len: longest sequence, prompt and output; None for the model's own context.
        max_num_seqs: sequences that are stepped together; further ones wait.
        prefix_caching: start a prompt from the cached keys and values of an earlier request that shares its beginning.
            None: where the backend is `row_exact`, since only there a cached prefix has the bits of a computed one.
        rows_per_sequence: pad every decoding pass to this many rows per sequence. With draft `none` this is the
            *reference path at the verify shape*, to which `recompute` is bit-identical. None: as the speculation needs.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        backend: Backend,
        speculative: SpeculativeConfig,
        drafter: Drafter | None,
        *,
        eos_token_ids: Seq[int] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool | None = None,
        rows_per_sequence: int | None = None,
    ) -> None:
        context = backend.config.context_length
        if max_model_len is not None and not 1 < max_model_len <= context:
            raise ConfigError(f"max_model_len is {max_model_len}; the model's context allows 2 to {context}")
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        self.backend = backend
        self.speculative = speculative
        self.max_model_len = max_model_len or context
        self.max_num_seqs = max_num_seqs
        self.max_seqs_per_client = max_num_seqs
        """Most that are stepped together of one `Request.client`."""
        self.on_round: Callable[[Round], None] | None = None
        """Told of every round, once its tokens are committed."""
        self._eos_token_ids = frozenset(backend.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._num_requests = 0
        self._drafters_by_exit = DraftersByExit(speculative, backend)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        row_exact = backend.traits.row_exact
        rows_per_sequence = rows_per_sequence or _verify_rows(speculative, row_exact)
        self._slots = Slots(
            backend,
            # a padded verify pass may reach past the last token, and so may the leaves of a tree
            num_spare=rows_per_sequence + (speculative.num_runner_ups or 0),
            shares_prefixes=row_exact if prefix_caching is None else prefix_caching,
            needs_features=drafter is not None and drafter.taps is not None,
            on_copy=drafter.copy if drafter is not None else lambda source, target, length: None,
        )
        self._rounds = Rounds(
            backend,
            speculative,
            drafter,
            self._slots,
            drafter_at=self._drafters_by_exit.at,
            rows_per_sequence=rows_per_sequence,
        )
        self._prefill = Prefill(backend, self._rounds, self._slots)

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            PromptError: the prompt is empty, holds an unknown id, or does not fit the context with `max_new_tokens`.
            ConfigError: a value is out of range, or would have no effect.
        """
        self._check_drafting(request)
        self._check_text(request)
        sequence = Sequence(request, self._eos_token_ids, number=self._num_requests)
        restrict(sequence, self.backend.config.vocab_size)
        self._num_requests += 1
        self._waiting.append(sequence)
        return sequence

    def _check_text(self, request: Request) -> None:
        params, num_prompt_tokens = request.params, len(request.prompt_ids)
        vocab_size = self.backend.config.vocab_size
        if params.n > 1 or params.structure is not None:
            raise ConfigError("a request of the engine has one text, and what it must look like is its constraint")
        if request.constraint is not None and params.ignore_eos:
            raise ConfigError("ignore_eos contradicts a grammar, which says itself where the text ends; leave it out")
        if not num_prompt_tokens:
            raise PromptError("the prompt is empty; give at least one token")
        for ids, name in (request.prompt_ids, "prompt"), (params.logit_bias, "logit_bias"):
            unknown = next((i for i in ids if not 0 <= i < vocab_size), None)
            if unknown is not None:
                raise PromptError(f"{name} has token id {unknown}; the model's ids are 0 to {vocab_size - 1}")
        for name, number in ("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs):
            if number is not None and number > vocab_size:
                raise ConfigError(f"{name} is {number}; the vocabulary has only {vocab_size} tokens")
        room = self.max_model_len - num_prompt_tokens
        if params.max_new_tokens > room:
            remedy = f"use max_new_tokens <= {room} or a shorter prompt" if room > 0 else "shorten the prompt"
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens and max_new_tokens is {params.max_new_tokens}: "
                f"more than the context of {self.max_model_len}; {remedy}"
            )

    def _check_drafting(self, request: Request) -> None:
        """Whether this engine can draft as a request asks for."""
        speculative, max_draft_tokens, exit_layer = self.speculative, request.max_draft_tokens, request.exit_layer
        if max_draft_tokens is not None and not 0 <= max_draft_tokens <= (speculative.num_draft_tokens or 0):
            raise ConfigError(
                f"the request asks for {max_draft_tokens} draft tokens; this engine drafts at most "
                f"{speculative.num_draft_tokens or 0} (its num_draft_tokens), and 0 turns drafting off"
            )
        if exit_layer is None or exit_layer == speculative.exit_layer:
            return
        if speculative.exit_layer is None or speculative.draft not in ("early-exit", "both"):
            raise ConfigError(f"exit_layer={exit_layer} has no effect: this engine drafts by {speculative.draft!r}")
        if speculative.verify == "reuse":
            raise ConfigError(
                f"exit_layer={exit_layer}: with verify 'reuse' all requests share the engine's exit layer, "
                f"{speculative.exit_layer}; leave it out"
            )
        self._drafters_by_exit.at(exit_layer)

    def abort(self, sequence: Sequence) -> None:
        """End a request now; its slot is free for the next step. Aborting a finished request does nothing."""
        if not sequence.is_finished:
            sequence.finish_reason = "abort"
            self._waiting = deque(s for s in self._waiting if s is not sequence)
            self._retire()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The requests that have a slot."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """Share of the cache's positions that running requests hold."""
        return self._slots.usage(self._running)

    @property
    def gain(self) -> GainEstimate | None:
        """What drafting has gained so far; None for plain decoding, and where the model's costs are not known."""
        return self._rounds.gain

    @property
    def prefix_stats(self) -> PrefixStats:
        """What has been copied between slots, and lost from them."""
        return self._slots.stats

    def reserve(self, kv_memory: int, *, shrink: bool = False) -> None:
        """Allocate the whole cache now, so that it never grows: `max_num_seqs` slots of `max_model_len` positions.

        Args:
            kv_memory: bytes that it may take.
            shrink: lower `max_model_len` to what fits, instead of refusing.

        Raises:
            ConfigError: it does not fit; the message names the numbers.
        """
        assert not self.has_work
        self.max_model_len = self._slots.reserve(kv_memory, self.max_num_seqs, self.max_model_len, shrink=shrink)

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, only: Seq[Sequence] | None = None, *, resting: Seq[Sequence] = ()) -> None:
        """Advance: one round for every sequence that decodes, then one pass over prompts if any are unfinished.

        The pass over prompts gets a few rounds' time and rests then, so that a long prompt holds nobody up for long.
        New tokens appear in the sequences' `tokens`. If a pass raises, no sequence has gained or lost a token by it.

        Args:
            only: leave all running sequences but these as they are, and admit none: to find out which of them it is
                that makes a pass raise.
            resting: running sequences that this step leaves as they are.
        """
        if only is None:
            self._admit()
        else:
            self._prefill.forget()
        moving = [s for s in self._running if (only is None or s in only) and s not in resting]
        decoding = [s for s in moving if s.is_prefilled]
        prefilling = [s for s in moving if not s.is_prefilled]
        try:
            with self.backend.stepping():
                if decoding:
                    self._round(decoding)
                if prefilling:
                    self._prefill.step(prefilling, beside_decoding=bool(decoding))
        finally:
            self._retire()

    def _admit(self) -> None:
        self._slots.share_news(self._running)
        newcomers = self._newcomers()
        if not newcomers:
            return
        self._slots.make_room(self._running + newcomers)
        for sequence in newcomers:
            self._slots.take(sequence, self._running)
            # in this order, so that an interrupt between the two loses no request
            self._running.append(sequence)
            self._waiting.remove(sequence)

    def _newcomers(self) -> list[Sequence]:
        """Those that get a slot now: in the order in which they came, but those of a client of whom fewer run first."""
        num_free = self.max_num_seqs - len(self._running)
        if not self._waiting or not num_free:
            return []
        num_running = Counter(sequence.request.client for sequence in self._running)
        waiting: dict[str | None, deque[Sequence]] = {}
        for sequence in self._waiting:
            waiting.setdefault(sequence.request.client, deque()).append(sequence)
        found: list[Sequence] = []
        while len(found) < num_free and waiting:
            client = min(waiting, key=lambda client: (num_running[client], waiting[client][0].number))
            if client is not None and num_running[client] >= self.max_seqs_per_client:
                break
            found.append(waiting[client].popleft())
            num_running[client] += 1
            if not waiting[client]:
                del waiting[client]
        return found

    def _retire(self) -> None:
        for sequence in [s for s in self._running if s.is_finished]:
            self._running.remove(sequence)
            self._slots.give_back(sequence)

    def _round(self, sequences: list[Sequence]) -> None:
        started = time.perf_counter()
        record = self._rounds.run(sequences, wants_record=self.on_round is not None)
        self._prefill.pace.learn_round(time.perf_counter() - started)
        if self.on_round is not None and record is not None:
            self.on_round(record)


def make_engine(
    backend: Backend,
    speculative: SpeculativeConfig | None = None,
    *,
    identity: Identity | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
    **options: object,
) -> Engine:
    """An engine that drafts as a configuration says. Measures what must be measured first: see `prepare`.

    Args:
        speculative: None leaves everything to the model's recommendation.
        identity, progress: see `prepare`.
        options: of `Engine`.

    Raises:
        ConfigError: the configuration does not fit the model, or a number is out of range.
    """
    return Engine(backend, *prepare(backend, speculative or SpeculativeConfig(), identity, progress), **options)  # type: ignore[arg-type]


def _verify_rows(speculative: SpeculativeConfig, row_exact: bool) -> int:
    """Rows per sequence and pass. A backend whose bits depend on the number of rows verifies at one fixed shape, so
    that its numerics do not depend on what was drafted; the others never compute a row for nothing."""
    if speculative.verify == "recompute" and not row_exact:
        assert speculative.num_draft_tokens is not None
        return speculative.num_draft_tokens + 1 + (speculative.num_runner_ups or 0)
    return 1
