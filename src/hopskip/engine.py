"""The engine: admits requests, and steps them together. A step is a prefill pass or a round: draft, verify, commit.

It speaks token ids only; text, templates and stop strings live at the edge (`llm.py`). One cache serves draft and
target. Lengths belong to the sequences, so rejecting a draft is no work at all: the next pass overwrites its positions.

Shape letters: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from hopskip.cache import Cache, Rows, Segment
from hopskip.draft.base import Draft, Drafter
from hopskip.draft.config import SpeculativeConfig
from hopskip.errors import ConfigError, PromptError
from hopskip.model import Model, run_tapped, torch_beside
from hopskip.sampling import Constraint, SamplingParams, adjust_logits, probabilities
from hopskip.sequence import Origin, Sequence, Token
from hopskip.trace import Round, RoundOfSequence
from hopskip.verify import Verdict, verify_greedy, verify_sampled

_CACHE_BLOCK = 256
"""The cache grows in steps of this many positions, so that it is not reallocated for every longer prompt."""
_PREFILL_ROWS = 512
"""Most prompt tokens in one pass: enough to keep the arithmetic units busy, few enough to bound activations."""
_PREFILL_ROWS_BESIDE_DECODING = 128
"""The same while other sequences decode: they wait for this pass in every step."""


class Engine:
    """Generates for many sequences at once, each with its own length, sampling parameters and acceptance.

    Args:
        model: the decoder.
        speculative: how to draft and verify; resolved against the model.
        max_model_len: longest sequence, prompt and output; None for the model's own context.
        max_num_seqs: sequences that are stepped together; further ones wait.
        prefix_caching: start a prompt from the cached keys and values of an earlier request that shares its beginning.
            None: where the model is `row_exact`, since only there a cached prefix has the very bits of a computed one.
        rows_per_sequence: pad every decoding pass to this many rows per sequence. With draft `none` this is the
            *reference path at the verify shape*, to which `recompute` is bit-identical. None: as the speculation needs.
        drafter: in place of the one that `speculative` makes.
        identity: of the model's weights and precision, see `SpeculativeConfig.make_drafter`.
    """

    def __init__(
        self,
        model: Model,
        speculative: SpeculativeConfig | None = None,
        *,
        eos_token_ids: Seq[int] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool | None = None,
        rows_per_sequence: int | None = None,
        drafter: Drafter | None = None,
        identity: Mapping[str, object] | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        if max_model_len is not None and not 1 < max_model_len <= context:
            raise ConfigError(f"max_model_len is {max_model_len}; the model's context allows 2 to {context}")
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        self.model = model
        self.speculative = (speculative or SpeculativeConfig()).resolve(
            model.config, model.branch, row_exact=model.row_exact
        )
        if drafter is None:
            self.speculative = self.speculative.search(model, identity)
        self.max_model_len = max_model_len or context
        self.max_num_seqs = max_num_seqs
        self._eos_token_ids = frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._drafter = drafter or self.speculative.make_drafter(model, identity)
        self._taps = self._drafter.taps if self._drafter else None
        self.on_round: Callable[[Round], None] | None = None
        """Told of every round, once its tokens are committed."""
        self._num_requests = 0
        self._drafters_by_exit: dict[int, Drafter] = {}
        """Those of requests that ask for an exit layer of their own."""
        self._prefix_caching = model.row_exact if prefix_caching is None else prefix_caching
        self._rows_per_sequence = rows_per_sequence or self._verify_rows()
        self._cache: Cache | None = None
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._slot_token_ids: dict[int, list[int]] = {}
        """Tokens whose keys and values each free slot still holds."""

    def _verify_rows(self) -> int:
        """Rows per sequence and pass. A model whose bits depend on the number of rows verifies at one fixed shape, so
        that its numerics do not depend on what was drafted; the others never compute a row for nothing."""
        if self.speculative.verify == "recompute" and not self.model.row_exact:
            assert self.speculative.num_draft_tokens is not None
            return self.speculative.num_draft_tokens + 1 + (self.speculative.num_runner_ups or 0)
        return 1

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams,
        is_stop: Callable[[int], bool] | None = None,
        *,
        constraint: Constraint | None = None,
        max_draft_tokens: int | None = None,
        exit_layer: int | None = None,
    ) -> Sequence:
        """Queue a request.

        Args:
            prompt_ids: at least one token id.
            is_stop: called with every committed token in order; returning True makes that token the last.
            constraint: which tokens may come; its own state, not shared with other requests.
            max_draft_tokens: draft at most so many tokens in a round, 0 for none.
            exit_layer: of this request's early-exit drafts, in place of the engine's.

        Raises:
            PromptError: the prompt is empty, holds an unknown id, or does not fit the context with `max_new_tokens`.
            ConfigError: a value is out of range, or would have no effect.
        """
        self._check_drafting(max_draft_tokens, exit_layer)
        if constraint is not None and params.ignore_eos:
            raise ConfigError("ignore_eos contradicts a grammar, which says itself where the text ends; leave it out")
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise PromptError("the prompt is empty; give at least one token")
        for ids, name in (prompt_ids, "prompt"), (params.logit_bias, "logit_bias"):
            unknown = next((i for i in ids if not 0 <= i < vocab_size), None)
            if unknown is not None:
                raise PromptError(f"{name} has token id {unknown}; the model's ids are 0 to {vocab_size - 1}")
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise ConfigError(f"logprobs is {params.logprobs}; the vocabulary has only {vocab_size} tokens")
        room = self.max_model_len - len(prompt_ids)
        if params.max_new_tokens > room:
            remedy = f"use max_new_tokens <= {room} or a shorter prompt" if room > 0 else "shorten the prompt"
            raise PromptError(
                f"the prompt has {len(prompt_ids)} tokens and max_new_tokens is {params.max_new_tokens}: "
                f"more than the context of {self.max_model_len}; {remedy}"
            )
        sequence = Sequence(
            list(prompt_ids),
            params,
            self._eos_token_ids,
            vocab_size,
            is_stop,
            constraint=constraint,
            max_draft_tokens=max_draft_tokens,
            exit_layer=exit_layer,
        )
        sequence.number = self._num_requests
        self._num_requests += 1
        self._waiting.append(sequence)
        return sequence

    def _check_drafting(self, max_draft_tokens: int | None, exit_layer: int | None) -> None:
        """Whether this engine can draft as a request asks for."""
        speculative = self.speculative
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
        self._drafter_at(exit_layer)

    def _drafter_at(self, exit_layer: int) -> Drafter:
        if exit_layer not in self._drafters_by_exit:
            config = replace(self.speculative, exit_layer=exit_layer).resolve(self.model.config)
            drafter = config.make_drafter(self.model)
            assert drafter is not None
            self._drafters_by_exit[exit_layer] = drafter
        return self._drafters_by_exit[exit_layer]

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
        if self._cache is None:
            return 0.0
        return sum(s.num_cached for s in self._running) / (self._cache.num_slots * self._cache.length)

    def reserve(self, kv_memory: int, *, shrink: bool = False) -> None:
        """Allocate the whole cache now, so that it never grows: `max_num_seqs` slots of `max_model_len` positions.

        Args:
            kv_memory: bytes that it may take.
            shrink: lower `max_model_len` to what fits, instead of refusing.

        Raises:
            ConfigError: it does not fit; the message names the numbers.
        """
        assert not self.has_work
        per_position = self.model.new_cache(1, 1).nbytes
        num_seqs = self.max_num_seqs
        available = kv_memory // (per_position * num_seqs) // _CACHE_BLOCK * _CACHE_BLOCK
        available -= self._rows_per_sequence + (self.speculative.num_runner_ups or 0)
        if shrink and 2 <= available < self.max_model_len:
            self.max_model_len = available
        length = self._cache_length(self.max_model_len)
        needed = per_position * num_seqs * length
        if needed > kv_memory:
            raise ConfigError(
                f"the key/value cache needs {needed / 2**20:.0f} MiB: {num_seqs} sequences x {length} positions x "
                f"{per_position} bytes; it may take {kv_memory / 2**20:.0f} MiB (kv-memory); lower max-model-len or "
                "max-num-seqs, or raise kv-memory"
            )
        self._cache = self.model.new_cache(num_seqs, length)
        self._slot_token_ids.clear()

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, only: Seq[Sequence] | None = None) -> None:
        """Advance: one round for every sequence that decodes, then one pass over prompts if any are unfinished.

        So a long prompt holds the others up for one of its chunks at a time. New tokens appear in the sequences'
        `tokens`. If a pass raises, no sequence has gained or lost a token by it.

        Args:
            only: leave all running sequences but these as they are, and admit none: to find out which of them it is
                that makes a pass raise.
        """
        if only is None:
            self._admit()
        moving = [s for s in self._running if only is None or s in only]
        decoding = [s for s in moving if s.is_prefilled]
        prefilling = [s for s in moving if not s.is_prefilled]
        try:
            with torch_beside(self.model):
                if decoding:
                    self._round(decoding)
                if prefilling:
                    self._prefill(prefilling, _PREFILL_ROWS_BESIDE_DECODING if decoding else _PREFILL_ROWS)
        finally:
            self._retire()

    def _admit(self) -> None:
        num_admitted = min(len(self._waiting), self.max_num_seqs - len(self._running))
        if not num_admitted:
            return
        newcomers = [self._waiting[i] for i in range(num_admitted)]
        self._reserve(self._running + newcomers)
        for sequence in newcomers:
            self._take_slot(sequence)
            # in this order, so that an interrupt between the two loses no request
            self._running.append(sequence)
            self._waiting.popleft()

    def _reserve(self, sequences: list[Sequence]) -> None:
        """Make the cache large enough for these sequences at their longest, keeping what it holds."""
        longest = max(s.num_prompt_tokens + s.params.max_new_tokens for s in sequences)
        length = self._cache_length(longest)
        old = self._cache
        if old is not None and old.num_slots >= len(sequences) and old.length >= length:
            return
        num_slots = max(len(sequences), old.num_slots if old else 0)
        self._cache = self.model.new_cache(num_slots, max(length, old.length if old else 0))
        if old is not None:
            self._cache.copy_from(old)

    def _cache_length(self, num_positions: int) -> int:
        # a padded verify pass may reach past the last token, and so may the leaves of a tree
        spare = self._rows_per_sequence + (self.speculative.num_runner_ups or 0)
        return -(-(num_positions + spare) // _CACHE_BLOCK) * _CACHE_BLOCK

    def _take_slot(self, sequence: Sequence) -> None:
        """Give a sequence the free slot whose content shares the longest beginning with it; else an empty, else any.

        Where a running sequence shares more with it (a system prompt, say), that much is copied.
        """
        taken = {s.slot for s in self._running}
        free = [slot for slot in range(self._cache_or_fail.num_slots) if slot not in taken]
        shared = dict.fromkeys(free, 0)
        # the last prompt token always runs: its hidden state yields the first new token
        prompt = sequence.token_ids[:-1]
        if self._prefix_caching:
            shared = {slot: _common_prefix(self._slot_token_ids.get(slot, []), prompt) for slot in free}
            if self._taps is not None:
                # the drafter wants the states of the last shared token, which the cache does not hold
                shared = {slot: max(0, length - 1) for slot, length in shared.items()}
        sequence.slot = max(free, key=lambda slot: (shared[slot], slot not in self._slot_token_ids, -slot))
        sequence.num_cached = shared[sequence.slot]
        # a copy has no states for a drafter that wants to see every token
        if self._prefix_caching and self._running and self._taps is None:
            donor = max(self._running, key=lambda s: _common_prefix(s.token_ids[: s.num_cached], prompt))
            length = _common_prefix(donor.token_ids[: donor.num_cached], prompt)
            if length > sequence.num_cached:
                self._cache_or_fail.copy_prefix(donor.slot, sequence.slot, length)
                sequence.num_cached = length
        sequence.stats.num_cached_prompt_tokens = sequence.num_cached
        self._slot_token_ids.pop(sequence.slot, None)

    def _retire(self) -> None:
        for sequence in [s for s in self._running if s.is_finished]:
            self._running.remove(sequence)
            self._slot_token_ids[sequence.slot] = sequence.token_ids[: sequence.num_cached]

    @property
    def _cache_or_fail(self) -> Cache:
        assert self._cache is not None, "the cache is made when the first request is admitted"
        return self._cache

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _prefill(self, sequences: list[Sequence], budget: int) -> None:
        """One pass over the next `budget` rows of these prompts; those that reach their end get their first token.

        Each gets an equal share, and what short prompts leave of theirs goes to the longer: none waits for another.
        """
        now = time.perf_counter()
        segments: list[Segment] = []
        chunk: list[Sequence] = []
        by_rest = sorted(sequences, key=lambda s: s.num_prompt_tokens - s.num_cached)
        for index, sequence in enumerate(by_rest):
            sequence.prefill_started = sequence.prefill_started or now
            share = -(-budget // (len(by_rest) - index))
            num_rows = min(share, sequence.num_prompt_tokens - sequence.num_cached)
            if num_rows:
                segments.append(Segment(sequence.slot, sequence.num_cached, num_rows))
                chunk.append(sequence)
                budget -= num_rows
        rows = Rows(segments)
        ids = [
            i
            for s, segment in zip(chunk, segments, strict=True)
            for i in s.token_ids[segment.start : segment.start + segment.count]
        ]
        h_ND, states_NAD = self._run(ids, rows)
        self._observe(rows, states_NAD)
        is_complete = [seg.start + seg.count == s.num_prompt_tokens for s, seg in zip(chunk, segments, strict=True)]
        last_rows = [last for last, complete in zip(_last_rows(segments), is_complete, strict=True) if complete]
        completed = [s for s, complete in zip(chunk, is_complete, strict=True) if complete]
        choices = self._choose(completed, [Draft()] * len(completed), h_ND[last_rows])
        for sequence, segment in zip(chunk, segments, strict=True):
            sequence.num_cached += segment.count
        for sequence, (_, tokens) in zip(completed, choices, strict=True):
            if not tokens:
                continue  # it has failed
            sequence.append(tokens[0])
            sequence.first_token_at = time.perf_counter()
            sequence.stats.prefill_seconds = sequence.first_token_at - sequence.prefill_started
            sequence.stats.num_tokens = 1

    # -- a round -------------------------------------------------------------------------------------------------------

    def _round(self, sequences: list[Sequence]) -> None:
        """Draft for every sequence, verify all drafts in one pass, commit what stands."""
        started = time.perf_counter()
        drafts = self._draft(sequences)
        drafted = time.perf_counter()
        h_ND, states_NAD, rows = self._verify_pass(sequences, drafts)
        passed = time.perf_counter()
        choices = self._choose(sequences, drafts, h_ND)
        self._keep(sequences, drafts, [verdict for verdict, _ in choices], states_NAD, rows)
        now = time.perf_counter()
        parts: list[RoundOfSequence] = []
        for sequence, draft, (verdict, tokens) in zip(sequences, drafts, choices, strict=True):
            num_before = len(sequence.tokens)
            for token in tokens:
                sequence.append(token)
                if sequence.is_finished:
                    break
            num_committed = len(sequence.tokens) - num_before
            sequence.num_cached += num_committed
            is_whole = 0 < verdict.num_accepted <= num_committed  # the text has not ended within the branch
            last = verdict.branch[-1] if is_whole else -1
            part = RoundOfSequence(
                request=sequence.number,
                position=num_before,
                source=draft.name,
                num_draft_tokens=len(draft.token_ids),
                num_accepted_tokens=min(verdict.num_accepted, num_committed),
                num_committed=num_committed,
                num_runner_ups=len(draft.token_ids) - draft.num_chained,
                runner_up=last - draft.num_chained if last >= draft.num_chained else None,
            )
            parts.append(part)
            if not tokens:
                continue  # it has failed
            stats = sequence.stats
            stats.num_target_passes += 1
            if draft.token_ids:
                stats.record_draft(part.num_draft_tokens, part.num_accepted_tokens, draft.depth)
            stats.num_tokens = len(sequence.tokens)
            stats.decode_seconds = now - sequence.first_token_at
        if self._drafter is None and self.on_round is None:
            return
        counts = [len(draft.token_ids) + 1 for draft in drafts]
        outcome = Round(
            draft_seconds=drafted - started,
            pass_seconds=passed - drafted,
            choose_seconds=now - passed,
            commit_seconds=time.perf_counter() - now,
            num_rows=sum(max(count, self._rows_per_sequence) for count in counts),
            num_chosen_by_logits=sum(n for n, s in zip(counts, sequences, strict=True) if s.needs_logits),
            sequences=tuple(parts),
        )
        if self._drafter is not None:
            self._drafter.learn(sequences, outcome)
        if self.on_round is not None:
            self.on_round(outcome)

    def _draft(self, sequences: list[Sequence]) -> list[Draft]:
        if self._drafter is None:
            return [Draft() for _ in sequences]
        num_draft_tokens = self.speculative.num_draft_tokens
        assert num_draft_tokens is not None
        by_exit: dict[int | None, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_exit.setdefault(sequence.exit_layer, []).append(index)
        drafts = [Draft() for _ in sequences]
        for exit_layer, members in by_exit.items():
            drafter = self._drafter if exit_layer is None else self._drafter_at(exit_layer)
            own = [sequences[i] for i in members]
            # the verify pass itself yields one token, so a sequence never needs a draft of all it has left
            most = [num_draft_tokens if s.max_draft_tokens is None else s.max_draft_tokens for s in own]
            limits = [min(limit, s.num_tokens_left - 1) for s, limit in zip(own, most, strict=True)]
            for index, draft in zip(members, drafter.propose(own, limits, self._cache_or_fail), strict=True):
                drafts[index] = _cut(sequences[index], draft)
        return drafts

    def _verify_pass(self, sequences: list[Sequence], drafts: list[Draft]) -> tuple[Tensor, Tensor | None, Rows]:
        """What `_run` gives for each sequence's last token and draft tokens, N = sum of (draft length + 1), and the
        rows of the pass."""
        if self.speculative.verify == "reuse":
            h_ND, rows = self._reuse_pass(sequences, drafts)
            return h_ND, None, rows
        segments: list[Segment] = []
        ids: list[int] = []
        kept: list[int] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            own = [sequence.token_ids[-1], *draft.token_ids]
            kept.extend(range(len(ids), len(ids) + len(own)))
            num_padding = max(0, self._rows_per_sequence - len(own))
            ids.extend(own + own[-1:] * num_padding)
            parents = None
            if draft.parents is not None:
                parents = (-1, *(parent + 1 for parent in draft.parents), *([0] * num_padding))
            segments.append(Segment(sequence.slot, sequence.num_cached, len(own) + num_padding, parents))
        rows = Rows(segments)
        h_ND, states_NAD = self._run(ids, rows)
        if len(kept) == len(ids):
            return h_ND, states_NAD, rows
        return h_ND[kept], None if states_NAD is None else states_NAD[kept], rows

    def _keep(
        self,
        sequences: list[Sequence],
        drafts: list[Draft],
        verdicts: list[Verdict],
        states_NAD: Tensor | None,
        rows: Rows,
    ) -> None:
        """Put what a verify pass has left of accepted tokens in order, for the next pass and for the drafter."""
        if len(rows) == len(sequences):  # no drafts
            self._observe(rows, states_NAD)
            return
        branches = [(0, *(index + 1 for index in verdict.branch)) for verdict in verdicts]
        for sequence, draft, branch in zip(sequences, drafts, branches, strict=True):
            if draft.parents is not None:
                self._cache_or_fail.keep_branch(sequence.slot, sequence.num_cached, branch)
        if states_NAD is None:
            return
        seen: list[int] = []
        first = 0
        for draft, branch in zip(drafts, branches, strict=True):
            seen += [first + row for row in branch]
            first += len(draft.token_ids) + 1
        is_prefix = seen[-1] == len(seen) - 1  # of a sequence alone: no copy
        states_NAD = states_NAD[: len(seen)] if is_prefix else states_NAD[seen]
        accepted = [Segment(s.slot, s.num_cached, len(branch)) for s, branch in zip(sequences, branches, strict=True)]
        self._observe(Rows(accepted), states_NAD)

    def _reuse_pass(self, sequences: list[Sequence], drafts: list[Draft]) -> tuple[Tensor, Rows]:
        """Verify from the exit layer on: rows that the draft has already taken there go on from its hidden states."""
        exit_layer = self.speculative.exit_layer or 0
        cache = self._cache_or_fail
        missing_ids: list[int] = []
        missing: list[Segment] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            ids = [sequence.token_ids[-1], *draft.token_ids]
            num_done = len(draft.exit_states)
            missing_ids.extend(ids[num_done:])
            missing.append(Segment(sequence.slot, sequence.num_cached + num_done, len(ids) - num_done))
        h_missing = self.model.embed(torch.tensor(missing_ids, dtype=torch.int32))
        h_missing = self.model.run_layers(h_missing, 0, exit_layer, Rows(missing), cache)
        parts: list[Tensor] = []
        computed = torch.split(h_missing, [segment.count for segment in missing])
        for draft, rest in zip(drafts, computed, strict=True):
            parts.extend([torch.stack(draft.exit_states), rest] if draft.exit_states else [rest])
        rows = Rows(Segment(s.slot, s.num_cached, len(d.token_ids) + 1) for s, d in zip(sequences, drafts, strict=True))
        h_ND = self.model.run_layers(torch.cat(parts), exit_layer, self.model.config.num_hidden_layers, rows, cache)
        return h_ND, rows

    def _run(self, ids: list[int], rows: Rows) -> tuple[Tensor, Tensor | None]:
        """All layers on these tokens: final hidden states [N, D], and those that the drafter wants to see [N, A, D]."""
        h_ND = self.model.embed(torch.tensor(ids, dtype=torch.int32))
        if self._taps is None:
            depth = self.model.config.num_hidden_layers
            return self.model.run_layers(h_ND, 0, depth, rows, self._cache_or_fail), None
        return run_tapped(self.model, h_ND, self._taps, rows, self._cache_or_fail)

    def _observe(self, rows: Rows, states_NAD: Tensor | None) -> None:
        if self._drafter is not None and states_NAD is not None:
            self._drafter.observe(rows, states_NAD)

    # -- choosing tokens -----------------------------------------------------------------------------------------------

    def _choose(
        self, sequences: list[Sequence], drafts: list[Draft], h_ND: Tensor
    ) -> list[tuple[Verdict, list[Token]]]:
        """Verify each sequence's draft against its final hidden states; the tokens to commit, accepted ones first."""
        needs_logits = any(s.needs_logits for s in sequences)
        choices: list[tuple[Verdict, list[Token]]] = []
        first = 0
        best = [] if needs_logits else self.model.greedy(h_ND).tolist()
        logits_NV = self.model.unembed(h_ND) if needs_logits else None
        for sequence, draft in zip(sequences, drafts, strict=True):
            own = slice(first, first + len(draft.token_ids) + 1)
            first = own.stop
            if logits_NV is None:
                verdict = verify_greedy(draft.token_ids, best[own], draft.parents)
                choices.append((verdict, _tokens(draft, verdict)))
                continue
            try:
                verdict = _verify_logits(sequence, draft, logits_NV[own])
                choices.append((verdict, _tokens(draft, verdict, logits_NV[own], sequence.params.logprobs)))
            except Exception as error:  # of its constraint, or of its own numbers
                sequence.fail(error)
                choices.append((Verdict((), -1), []))
        return choices


def _cut(sequence: Sequence, draft: Draft) -> Draft:
    """End a draft before its first token that the sequence's constraint forbids, so that no row is verified in vain.

    A draft that was *drawn* keeps that token as its last: there the target has probability 0, so it is rejected and
    the residual distribution is drawn from. To end such a draft before it would draw from the target's distribution
    instead, just where the draft had no luck, and so change the distribution of the text.
    """
    if sequence.constraint is None or not draft.token_ids:
        return draft
    try:
        num_kept = sequence.constraint.num_allowed(draft.token_ids) + (draft.probs is not None)
    except Exception:  # the verify pass meets it again, where it is this sequence's failure alone
        return Draft()
    return draft.cut(num_kept)


def _verify_logits(sequence: Sequence, draft: Draft, logits_NV: Tensor) -> Verdict:
    """Verify one draft against the target's logits after 0, 1, .. draft tokens."""
    params = sequence.params
    assert draft.parents is None or not (params.changes_logits or sequence.constraint)  # both go along a chain
    if params.changes_logits:
        logits_NV = adjust_logits(logits_NV, params, sequence.counts, draft.token_ids)
    if sequence.constraint is not None:
        allowed_NV = sequence.constraint.masks(draft.token_ids).to(logits_NV.device)
        logits_NV = logits_NV.masked_fill(~allowed_NV, -torch.inf)
    if params.is_greedy:
        return verify_greedy(draft.token_ids, logits_NV.argmax(dim=-1).tolist(), draft.parents)
    probs_NV = probabilities(logits_NV, params)
    return verify_sampled(draft.token_ids, draft.probs, probs_NV, sequence.generator, draft.parents)


def _tokens(
    draft: Draft, verdict: Verdict, logits_NV: Tensor | None = None, num_logprobs: int | None = None
) -> list[Token]:
    branch = verdict.branch
    ids = [*(draft.token_ids[index] for index in branch), verdict.next_token]
    is_bonus = bool(branch) and not draft.goes_on_after(branch[-1])
    origins: list[Origin] = [draft.source] * len(branch)
    origins.append("bonus" if is_bonus else "target")
    if logits_NV is None or num_logprobs is None:
        return [Token(i, origin) for i, origin in zip(ids, origins, strict=True)]
    tokens = []
    rows = [0, *(index + 1 for index in branch)]
    for i, origin, logprobs_V in zip(ids, origins, logits_NV[rows].log_softmax(dim=-1), strict=True):
        top = logprobs_V.topk(num_logprobs)
        top_logprobs = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        tokens.append(Token(i, origin, float(logprobs_V[i]), top_logprobs))
    return tokens


def _last_rows(segments: list[Segment]) -> list[int]:
    """Index of the last row of each segment."""
    rows, total = [], 0
    for segment in segments:
        total += segment.count
        rows.append(total - 1)
    return rows


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
