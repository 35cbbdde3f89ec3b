"""Drafting from an exit: the model's own after some layers (LayerSkip, arXiv 2404.16710), whichever they are and in
whatever precision (`SelfDraft`), or a trained branch.

All are the same loop: states of the latest token, the branch's layers if there are any, final norm, head. A branch has
keys and values of its own for every position, in the cache's last layers, made from what the model's passes left
behind. They are brought up to date when a draft begins: one pass over the tokens that were committed since, the last of
which yields the first draft token. While drafting on, the branch's own outputs take the place of the model's, so those
positions are made anew next time.

Shape letters: N rows, A taps, D hidden size, V vocabulary, n draft vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hopskip.branch import BranchConfig, ExitBranch, Mixing
from hopskip.cache import Cache, Rows, Segment
from hopskip.draft.base import Draft, Drafter
from hopskip.draft.self_draft import SelfDraft, early_exit
from hopskip.model import BranchedModel, Chains, DraftPart, Model, run_by_number
from hopskip.sampling import adjust_logits, draw, probabilities
from hopskip.sequence import DraftOrigin, Sequence


class DraftChains(Protocol):
    """`draft_chains` of a model that can take all steps of a draft in one call, as `NativeModel` does."""

    def __call__(
        self,
        ids_N: Tensor,
        rows: Rows,
        limits: Seq[int],
        cache: Cache,
        *,
        layers: Seq[int] | None,
        head: Any,
        features_NAD: Tensor | None,
        token_states_ND: Tensor | None,
        min_confidence: float,
        num_runner_ups: int | None,
        temperatures: Seq[float] | None,
        uniforms_Bk: Tensor | None,
    ) -> Chains: ...


_MAX_RUNNER_UPS_OF_A_STEP = 4
_MOST_PASSES = 32
"""That are kept as they are, before their states are sorted by slot."""


class _Slot:
    """What is known of one slot of the cache: outputs of the tapped layers, of all positions that the model has seen
    from `first` on. They come in parts, joined when a draft wants them: many rounds may go by without one."""

    def __init__(self) -> None:
        self.num_cached = 0
        """Positions that hold the branch's keys and values as the model's own states make them."""
        self._first = self._end = 0
        self._parts_NAD: list[Tensor] = []

    def observe(self, start: int, count: int, states_NAD: Tensor) -> None:
        """A pass over `count` positions from `start` on. What was known of them before is void, but for the token at
        `start`: it was committed when the pass began, so the branch's keys and values there hold."""
        self.num_cached = min(self.num_cached, start + 1) if start else 0
        if start < self._first or start > self._end:
            self._first, self._parts_NAD = start, []
        elif start < self._end:
            self._parts_NAD = [self._joined()[: start - self._first]]
        self._parts_NAD.append(states_NAD)
        self._end = start + count

    def take(self, start: int, stop: int) -> Tensor:
        """States of positions start..stop-1; zeros for the position before the first."""
        states_NAD = self._joined()
        found = states_NAD[max(0, start - self._first) : stop - self._first]
        return torch.cat((torch.zeros_like(states_NAD[:1]), found)) if start < 0 else found

    def forget(self, stop: int) -> None:
        """Drop the states of positions before `stop`."""
        if stop > self._first:
            self._parts_NAD = [self._joined()[stop - self._first :]]
            self._first = stop

    def _joined(self) -> Tensor:
        if len(self._parts_NAD) > 1:
            self._parts_NAD = [torch.cat(self._parts_NAD)]
        return self._parts_NAD[0]


def _follows(after: Rows, before: Rows) -> bool:
    """Whether two passes have the same slots in the same order, and each one token, the next."""
    return len(after.segments) == len(before.segments) and all(
        b.slot == a.slot and b.start == a.start + 1 and a.count == b.count == 1
        for a, b in zip(before.segments, after.segments, strict=True)
    )


@dataclass
class _Entry:
    """The rows that a draft begins with: each sequence's tokens that the branch has not seen, its last at the end."""

    token_ids: list[int]
    rows: Rows
    features_NAD: Tensor | None = None
    """Of the token before each row."""
    token_states_ND: Tensor | None = None
    """Of each row, where the branch begins. Those of the last rows are undefined: no pass has been there."""


class _Work(NamedTuple):
    """One sequence's draft to be made."""

    sequence: Sequence
    limit: int
    draft: Draft
    num_runner_ups: int


class ExitDrafter(Drafter):
    """Drafts token by token.

    A draft ends early after its first token whose probability at the exit is below `min_confidence`: what follows an
    unsure token is likely to be rejected with it.

    Beside its own best tokens it may name others for the same places, so that the draft is a tree of one long branch
    and leaves beside it: they cost rows of the verify pass, but no draft step. Sequences whose distribution depends on
    the text (penalties, a grammar) get none.

    Args:
        exit: the layers to run, or how many of the first ones, or the trained branch that is attached to the model.
        num_runner_ups: how many such others a draft has.
    """

    def __init__(
        self, model: Model, exit: int | SelfDraft | ExitBranch, min_confidence: float = 0.0, num_runner_ups: int = 0
    ) -> None:
        self._model = model
        self._min_confidence = min_confidence
        self._num_runner_ups = num_runner_ups
        self._self = early_exit(exit) if isinstance(exit, int) else exit if isinstance(exit, SelfDraft) else None
        self._vocabulary: Tensor | None = None
        self._mixing: Mixing | None = None
        if isinstance(exit, ExitBranch):
            branched = cast(BranchedModel, model)  # only such a model has a branch
            self._branch = exit.config
            self._part = DraftPart(tuple(range(exit.config.start)), None, branched.unembed_draft)
            self._vocabulary = exit.vocabulary
            self._mixing = Mixing(exit, model.config.rms_norm_eps, branched.dtype, model.device)
        else:
            assert self._self is not None
            self._branch = BranchConfig(start=len(self._self.layers), num_layers=0)
            self._part = self._self.part_of(model)
        self._feature_columns = [self._branch.taps.index(feature) for feature in self._branch.features]
        self._slots: dict[int, _Slot] = defaultdict(_Slot)
        self._passes: list[tuple[Rows, Tensor]] = []
        """What the slots have yet to be told of: one pass, or several that follow each other. To tell of each by itself
        would take longer, and many may go by without a draft."""
        # without layers of its own a branch has no cache to keep up to date
        self.taps = self._branch.taps if self._branch.num_layers else None
        # a model may do without: the steps below give the same drafts
        self._draft_chains: DraftChains | None = getattr(model, "draft_chains", None)

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        if self._passes and (len(self._passes) == _MOST_PASSES or not _follows(rows, self._passes[-1][0])):
            self._catch_up()
        self._passes.append((rows, states_NAD))

    def _catch_up(self) -> None:
        """Tell the slots of the passes so far."""
        if not self._passes:
            return
        segments = self._passes[0][0].segments
        all_states = [states_NAD for _, states_NAD in self._passes]
        self._passes = []
        if len(all_states) == 1:
            parts = all_states[0].split_with_sizes([segment.count for segment in segments])
        else:
            parts = torch.stack(all_states, dim=1).unbind()
        for segment, own in zip(segments, parts, strict=True):
            self._slots[segment.slot].observe(segment.start, len(own), own)

    def num_unseen(self, sequence: Sequence) -> int:
        """Tokens that a draft begins with: the sequence's last, and those before it that the branch has yet to see."""
        if self.taps is None:
            return 1
        self._catch_up()
        return sequence.num_cached + 1 - min(self._slots[sequence.slot].num_cached, sequence.num_cached)

    def propose(
        self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache, num_runner_ups: Seq[int] | None = None
    ) -> list[Draft]:
        """As `Drafter.propose`. `num_runner_ups`: of each sequence's draft, in place of the drafter's own number."""
        source: DraftOrigin = "exit-branch" if self._self is None else self._self.source
        name = None if self._self is None else self._self.name
        drafts = [Draft(source, probs=None if s.params.is_greedy else [], label=name) for s in sequences]
        active = [i for i, limit in enumerate(limits) if limit > 0]
        most = num_runner_ups or [self._num_runner_ups] * len(sequences)
        work = [
            _Work(sequence, limit, draft, number if allows_runner_ups(sequence) else 0)
            for sequence, limit, draft, number in zip(sequences, limits, drafts, most, strict=True)
        ]
        chained = [i for i in active if self._can_chain(sequences[i])]
        stepped = [i for i in active if i not in chained]
        for run, chosen in (self._chain, chained), (self._step_by_step, stepped):
            if chosen:
                run([work[i] for i in chosen], cache)
        for draft in drafts:
            draft.signs = list(range(draft.num_chained))
        return drafts

    def _can_chain(self, sequence: Sequence) -> bool:
        """Whether all steps of a sequence can be left to the model: it takes the exit's own best tokens, or draws from
        all of them."""
        params = sequence.params
        is_plain = params.is_greedy or not params.truncates
        return self._draft_chains is not None and is_plain and not params.changes_logits

    def _chain(self, work: Seq[_Work], cache: Cache) -> None:
        """Whole drafts in one call."""
        assert self._draft_chains is not None
        entry = self._enter([part.sequence for part in work])
        # those of drawn tokens are drawn, too
        most = self._num_runner_ups_of_a_step(
            max((part.num_runner_ups for part in work if part.sequence.params.is_greedy), default=0)
        )
        temperatures = [part.sequence.params.temperature for part in work]
        uniforms_Bk = None
        if draws := any(temperatures):
            uniforms_Bk = torch.zeros((len(work), max(part.limit for part in work)), dtype=torch.float64)
            for part, temperature, uniforms_k in zip(work, temperatures, uniforms_Bk, strict=True):
                if temperature:
                    uniforms_k[: part.limit].uniform_(generator=part.sequence.generator)
        found = self._draft_chains(
            torch.tensor(entry.token_ids),
            entry.rows,
            [part.limit for part in work],
            cache,
            layers=None if self._self is None else self._part.layers,
            head=self._part.head,
            features_NAD=entry.features_NAD,
            token_states_ND=entry.token_states_ND,
            min_confidence=self._min_confidence,
            num_runner_ups=most or None,
            temperatures=temperatures if draws else None,
            uniforms_Bk=uniforms_Bk,
        )
        for i, (part, count) in enumerate(zip(work, found.counts_B.tolist(), strict=True)):
            part.draft.token_ids += found.tokens_Bk[i, :count].tolist()
            part.draft.exit_states += found.states_BkD[i, :count].unbind()
            if part.draft.probs is not None:
                assert found.distributions_Bkn is not None
                part.draft.probs += self._over_all_tokens(found.distributions_Bkn[i, :count], 0.0).unbind()
                if part.num_runner_ups:
                    draw_runner_ups(part.draft, part.sequence.generator, part.num_runner_ups)
            elif found.probs_Bkt is not None and found.runner_ups_Bkt is not None and part.num_runner_ups:
                tokens_kt, probs_kt = found.runner_ups_Bkt[i, :count], found.probs_Bkt[i, :count]
                add_runner_ups(part.draft, tokens_kt, probs_kt, part.num_runner_ups)

    def _step_by_step(self, work: Seq[_Work], cache: Cache) -> None:
        sequences, drafts = [part.sequence for part in work], [part.draft for part in work]
        entry = self._enter(sequences)
        x_ND = self._token_states(entry.token_ids, entry.rows, entry.token_states_ND, cache)
        if self._mixing is not None and entry.features_NAD is not None:
            x_ND = self._mixing.mix(x_ND, self._mixing.fuse(entry.features_NAD))
        h_ND = self._run(x_ND, entry.rows, cache)[_ends(entry.rows)]
        active = list(range(len(sequences)))
        probs: list[list[Tensor]] = [[] for _ in sequences]
        while True:
            for i, h_D, logits_1n in zip(active, h_ND, torch.split(self._part.unembed(h_ND), 1), strict=True):
                drafts[i].exit_states.append(h_D)
                probs[i].append(self._choose(sequences[i], drafts[i], logits_1n))
            goes_on = [not drafts[i].is_closed and len(drafts[i].token_ids) < work[i].limit for i in active]
            active = [i for i, goes in zip(active, goes_on, strict=True) if goes]
            if not active:
                break
            rows = Rows(
                Segment(sequences[i].slot, sequences[i].num_cached + len(drafts[i].token_ids), 1) for i in active
            )
            x_ND = self._token_states([drafts[i].token_ids[-1] for i in active], rows, None, cache)
            if self._mixing is not None and self._feature_columns:
                x_ND = self._mixing.mix(x_ND, h_ND[goes_on])
            h_ND = self._run(x_ND, rows, cache)
        for part, probs_kV in zip(work, probs, strict=True):
            if part.num_runner_ups and part.draft.probs is not None:
                draw_runner_ups(part.draft, part.sequence.generator, part.num_runner_ups)
            elif part.num_runner_ups:
                top = torch.stack(probs_kV).topk(1 + self._num_runner_ups_of_a_step(part.num_runner_ups))
                add_runner_ups(part.draft, top.indices[:, 1:], top.values, part.num_runner_ups)

    def _num_runner_ups_of_a_step(self, number: int) -> int:
        """How many next best tokens of each step may be among so many of a draft."""
        size = self._model.config.vocab_size if self._vocabulary is None else len(self._vocabulary)
        return min(number, _MAX_RUNNER_UPS_OF_A_STEP, size - 1)

    def _enter(self, sequences: Seq[Sequence]) -> _Entry:
        """The committed tokens that the branch has yet to see, with what is known of them; they count as seen then."""
        if self.taps is None:
            rows = Rows(Segment(s.slot, s.num_cached, 1) for s in sequences)
            return _Entry([s.token_ids[-1] for s in sequences], rows)
        self._catch_up()
        segments: list[Segment] = []
        token_ids: list[int] = []
        features: list[Tensor] = []
        states: list[Tensor] = []
        for sequence in sequences:
            slot, last = self._slots[sequence.slot], sequence.num_cached
            start = min(slot.num_cached, last)
            segments.append(Segment(sequence.slot, start, last + 1 - start))
            token_ids += sequence.token_ids[start:]
            features.append(slot.take(start - 1, last))
            if self._branch.start:
                own = slot.take(start, last)
                states += [own, own.new_zeros((1, *own.shape[1:]))]
            slot.num_cached = last + 1
            slot.forget(last)
        entry = _Entry(token_ids, Rows(segments))
        if self._feature_columns:
            features_NAD = torch.cat(features) if len(features) > 1 else features[0]
            if len(self._feature_columns) < len(self.taps):
                features_NAD = features_NAD[:, self._feature_columns]
            entry.features_NAD = features_NAD.contiguous()
        if self._branch.start:
            entry.token_states_ND = torch.cat(states)[:, self.taps.index(self._branch.start)].contiguous()
        return entry

    def _token_states(self, token_ids: list[int], rows: Rows, known_ND: Tensor | None, cache: Cache) -> Tensor:
        """What enters the branch for each row: embeddings, or outputs of the model's first layers, which are known for
        all but the last row of each segment."""
        ids_N = torch.tensor(token_ids, dtype=torch.int32)
        if not self._part.layers:
            return self._model.embed(ids_N)
        last = Rows(Segment(s.slot, s.start + s.count - 1, 1) for s in rows.segments)
        h_BD = run_by_number(self._model, self._model.embed(ids_N[_ends(rows)]), self._part.layers, last, cache)
        if known_ND is None:
            return h_BD
        x_ND = known_ND.clone()
        x_ND[_ends(rows)] = h_BD
        return x_ND

    def _run(self, x_ND: Tensor, rows: Rows, cache: Cache) -> Tensor:
        """The branch's own layers."""
        if not self._branch.num_layers:
            return x_ND
        first = self._model.config.num_hidden_layers
        return self._model.run_layers(x_ND, first, first + self._branch.num_layers, rows, cache)

    def _over_all_tokens(self, values_Nn: Tensor, other: float) -> Tensor:
        """Of the draft vocabulary's tokens and, with this value, of all others: [N, V]."""
        if self._vocabulary is None:
            return values_Nn
        values_NV = values_Nn.new_full((len(values_Nn), self._model.config.vocab_size), other)
        values_NV[:, self._vocabulary] = values_Nn
        return values_NV

    def _choose(self, sequence: Sequence, draft: Draft, logits_1n: Tensor) -> Tensor:
        """Add one token to a draft. The distribution that it comes from, [V]."""
        params = sequence.params
        logits_1V = self._over_all_tokens(logits_1n, float("-inf"))
        if params.changes_logits:
            logits_1V = adjust_logits(logits_1V, params, sequence.counts, draft.token_ids)
        if params.is_greedy:
            probs_V = logits_1V[0].softmax(dim=-1)
            token = int(logits_1V.argmax())
        else:
            probs_V = probabilities(logits_1V, params)[0]
            token = draw(probs_V, sequence.generator)
            assert draft.probs is not None
            draft.probs.append(probs_V)
        draft.token_ids.append(token)
        draft.is_closed = float(probs_V[token]) < self._min_confidence
        return probs_V


def allows_runner_ups(sequence: Sequence) -> bool:
    """Penalties and grammars follow a chain of tokens."""
    return not sequence.params.changes_logits and sequence.constraint is None


def add_runner_ups(draft: Draft, tokens_kt: Tensor, probs_kt: Tensor, number: int) -> None:
    """Make a chain a tree: add the tokens that the exit finds likeliest to be right where the chain is wrong.

    Args:
        tokens_kt: the next best tokens of each step, best first, [k, t].
        probs_kt: probabilities of the step's own token and of those, [k, 1 + t].
        number: how many to add, if there are so many.
    """
    own_k = probs_kt[:, 0].tolist()
    candidates: list[tuple[float, int, int]] = []
    reached = 1.0  # probability that the chain is right so far
    for step, (tokens, probs) in enumerate(zip(tokens_kt.tolist(), probs_kt[:, 1:].tolist(), strict=True)):
        candidates += [(reached * probability, step, token) for token, probability in zip(tokens, probs, strict=True)]
        reached *= own_k[step]
    draft.parents = list(range(-1, len(draft.token_ids) - 1))
    # of one step's tokens the likelier comes first: among equals too
    for _, step, token in sorted(candidates, key=lambda candidate: -candidate[0])[:number]:
        draft.token_ids.append(token)
        draft.parents.append(step - 1)


def draw_runner_ups(draft: Draft, generator: torch.Generator, number: int) -> None:
    """The same for a chain that was drawn: add tokens, drawn without those before them, where the exit finds it most
    likely that the chain is wrong. That depends on what has been drawn, not on what will be, as losslessness demands.
    """
    assert draft.probs is not None
    length = len(draft.token_ids)
    rest = [probs_V.clone() for probs_V in draft.probs]
    reached = [1.0]
    for token, probs_V in zip(draft.token_ids, draft.probs, strict=True):
        reached.append(reached[-1] * float(probs_V[token]))
    last = list(draft.token_ids)
    draft.parents = list(range(-1, length - 1))
    for _ in range(number):
        for step, token in enumerate(last):
            rest[step][token] = 0
        masses = [reached[step] * float(rest[step].sum()) for step in range(length)]
        step = max(range(length), key=masses.__getitem__)
        if not masses[step] > 0:
            return
        probs_V = rest[step] / rest[step].sum()
        last[step] = draw(probs_V, generator)
        draft.token_ids.append(last[step])
        draft.probs.append(probs_V)
        draft.parents.append(step - 1)


def _ends(rows: Rows) -> Tensor:
    """Index of the last row of each segment."""
    return torch.tensor([segment.count for segment in rows.segments]).cumsum(0) - 1
