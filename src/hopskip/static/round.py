"""A round of speculative decoding, draft and verify, without a word from the host.

Everything that a round needs to know, and all that it finds out, is on the device: positions, acceptance, ends of
texts. So a round is one CUDA graph, rounds can be queued ahead, and whoever reads the reports may do so late.

Shape letters: B sequences, k draft tokens, R rows of each sequence in a verify pass, N = B R, D hidden size, A taps.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.branch import ExitBranch, Mixing
from hopskip.static.matrix import Matrix
from hopskip.static.model import Layer, StaticModel


@dataclass(frozen=True)
class State:
    """Where each sequence stands. A round changes these tensors in place."""

    last_B: Tensor
    """The last token, which has not been through the model yet, int64."""
    position_B: Tensor
    """Its position, int64."""
    limit_B: Tensor
    """The position at which the sequence ends: reached, a round leaves it as it is. int64."""
    report_BC: Tensor
    """What the last round did, int64 [B, 2 + R]: how many tokens it committed, how many of its draft tokens agreed with
    the model, and the model's tokens, of which the committed are the first."""

    @classmethod
    def empty(cls, batch_size: int, num_rows: int, device: torch.device) -> State:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(zeros(batch_size), zeros(batch_size), zeros(batch_size), zeros(batch_size, 2 + num_rows))


class StaticDraft(Protocol):
    taps: tuple[int, ...]
    """Layers after which it wants to see the hidden states of every verify pass, rising."""

    def propose(self, model: StaticModel, state: State, num_draft_tokens: int) -> Tensor:
        """Tokens to follow each sequence's last, int64 [B, k]. May write to the cache from that token's position on,
        where the verify pass writes again."""
        ...

    def observe(self, states: Seq[Tensor], num_committed_B: Tensor) -> None:
        """Told of every verify pass: hidden states [B, R, D] after the layers in `taps`, and how many rows hold."""
        ...


class EarlyExit(StaticDraft):
    """The model's first layers, its norm and its head (LayerSkip, arXiv 2404.16710)."""

    taps = ()

    def __init__(self, layers: Seq[Layer], head: Matrix) -> None:
        self._layers = layers
        self._head = head

    def propose(self, model: StaticModel, state: State, num_draft_tokens: int) -> Tensor:
        token_B, drafted = state.last_B, []
        for step in range(num_draft_tokens):
            h_BD = model.run_layers(model.embed(token_B), self._layers, 0, state.position_B + step)
            token_B = model.best(h_BD, self._head)
            drafted.append(token_B)
        return torch.stack(drafted, dim=1)

    def observe(self, states: Seq[Tensor], num_committed_B: Tensor) -> None:
        return


class BranchExit(StaticDraft):
    """A trained branch (see `hopskip.branch`), brought up to date by a pass over as many rows as were verified.

    Row i of that pass is the token behind row i of the last verify pass, so it sees what that row left behind. Rows
    behind the last committed token are computed for nothing; the next round overwrites what they write.

    Args:
        layers: the branch's own.
        first: the layers of the model that run before them.
        head: the rows of the model's head that make its draft vocabulary.
        mixing: where features meet token states; in the model's precision.
        like: its precision and device count.
    """

    def __init__(
        self,
        branch: ExitBranch,
        *,
        layers: Seq[Layer],
        first: Seq[Layer],
        head: Matrix,
        mixing: Mixing,
        batch_size: int,
        num_rows: int,
        like: Tensor,
    ) -> None:
        self._config = branch.config
        # without layers of its own a branch has no cache to keep up to date
        self.taps = branch.config.taps if layers else ()
        self.has_layers = bool(layers)
        self._layers, self._first, self._head, self._mixing = layers, first, head, mixing
        self._vocabulary = branch.vocabulary.to(like.device)
        self._states = [like.new_zeros((batch_size, num_rows, head.shape[1])) for _ in self.taps]
        """What the last verify pass left behind at each tap, [B, R, D]."""
        self._num_known_B = torch.ones(batch_size, dtype=torch.int64, device=like.device)
        """Rows of it that hold; the last of them stands right before each sequence's last token."""

    def begin(self, slot: int, states: Seq[Tensor]) -> None:
        """A prompt was read into a slot: what its last token left behind at each tap, [D]."""
        for own, new_D in zip(self._states, states, strict=True):
            own[slot, 0] = new_D
        self._num_known_B[slot] = 1

    def enter(self, x_ND: Tensor, states: Seq[Tensor], before: Seq[Tensor]) -> Tensor:
        """What enters the branch's layers for tokens that the model has seen.

        Args:
            x_ND: embeddings.
            states: what the tokens left behind at each tap, [N, D].
            before: what the tokens before them did.
        """
        if self._config.start:
            x_ND = states[self.taps.index(self._config.start)]
        return self._mix(x_ND, before)

    def propose(self, model: StaticModel, state: State, num_draft_tokens: int) -> Tensor:
        position_B = state.position_B
        h_BD = self._catch_up(model, state)
        drafted = [self._choose(model, h_BD)]
        for step in range(1, num_draft_tokens):
            x_BD = self._token_states(model, drafted[-1], position_B + step)
            if self._config.features:
                x_BD = self._mixing.mix(x_BD, h_BD)  # the branch's own output in place of the model's
            h_BD = model.run_layers(x_BD, self._layers, model.config.num_hidden_layers, position_B + step)
            drafted.append(self._choose(model, h_BD))
        return torch.stack(drafted, dim=1)

    def observe(self, states: Seq[Tensor], num_committed_B: Tensor) -> None:
        for own, new in zip(self._states, states, strict=True):
            own.copy_(new)
        self._num_known_B.copy_(num_committed_B.clamp_min(1))

    def _catch_up(self, model: StaticModel, state: State) -> Tensor:
        """Give the tokens since the last verify pass their keys and values. Returns the last one's output [B, D]."""
        h_BD = self._token_states(model, state.last_B, state.position_B)
        if not self.has_layers:
            return h_BD
        batch_size, num_rows = len(h_BD), state.report_BC.shape[1] - 2
        newest_B1 = self._num_known_B[:, None] - 1
        if self._config.start:
            # row i is the token that was row i + 1 of the verify pass; the last one was in none
            own_BRD = F.pad(self._states[self.taps.index(self._config.start)][:, 1:], (0, 0, 0, 1))
            is_newest_BR = torch.arange(num_rows, device=newest_B1.device) == newest_B1
            x_BRD = torch.where(is_newest_BR[..., None], h_BD[:, None], own_BRD)
        else:
            x_BRD = model.embed(state.report_BC[:, 2:])
        x_ND = self._mix(x_BRD.flatten(0, 1), [states.flatten(0, 1) for states in self._states])
        # an idle slot stands at 0 and has no token before; what it computes is nobody's
        first_B = (state.position_B - newest_B1[:, 0]).clamp_min(0)
        h_ND = model.run_layers(x_ND, self._layers, model.config.num_hidden_layers, first_B)
        index_B1D = newest_B1[..., None].expand(-1, 1, h_BD.shape[1])
        return h_ND.view(batch_size, num_rows, -1).gather(1, index_B1D)[:, 0]

    def _token_states(self, model: StaticModel, token_B: Tensor, position_B: Tensor) -> Tensor:
        return model.run_layers(model.embed(token_B), self._first, 0, position_B)

    def _mix(self, x_ND: Tensor, before: Seq[Tensor]) -> Tensor:
        if not self._config.features:
            return x_ND
        features_NAD = torch.stack([before[self.taps.index(feature)] for feature in self._config.features], dim=-2)
        return self._mixing.mix(x_ND, self._mixing.fuse(features_NAD))

    def _choose(self, model: StaticModel, h_BD: Tensor) -> Tensor:
        return self._vocabulary[model.best(h_BD, self._head)]


class Round:
    """Draft, verify, commit.

    Args:
        draft: None for plain decoding.
        num_draft_tokens: k, 0 for plain decoding.
        num_rows: rows of each sequence in a verify pass, at least k + 1. More only pad: to decode plainly at the shape
            of a verify pass.
        stop_ids: tokens that end a text, int64.
    """

    def __init__(
        self,
        model: StaticModel,
        layers: Seq[Layer],
        head: Matrix,
        draft: StaticDraft | None,
        *,
        num_draft_tokens: int,
        num_rows: int,
        stop_ids: Tensor,
    ) -> None:
        assert num_rows > num_draft_tokens
        assert (draft is None) == (num_draft_tokens == 0)
        self._model = model
        self._layers, self._head = layers, head
        self._draft = draft
        self._num_draft_tokens = num_draft_tokens
        self._num_rows = num_rows
        self._stop_ids = stop_ids

    def __call__(self, state: State) -> None:
        """One round for every sequence. Mutates `state` and the model's cache."""
        draft_Bk = self.draft(state)
        target_BR, states = self.verify(state, draft_Bk)
        num_committed_B = self._commit(state, draft_Bk, target_BR)
        if self._draft is not None:
            self._draft.observe(states, num_committed_B)

    def draft(self, state: State) -> Tensor:
        """The draft alone, [B, k]."""
        if self._draft is None:
            return state.last_B.new_empty((len(state.last_B), 0))
        return self._draft.propose(self._model, state, self._num_draft_tokens)

    def verify(self, state: State, draft_Bk: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's best tokens after the last and each draft token, [B, R], and its states [B, R, D] at the draft's
        taps. Writes the keys and values of all layers."""
        ids_BR = torch.cat((state.last_B[:, None], draft_Bk), dim=1)
        ids_BR = F.pad(ids_BR, (0, self._num_rows - ids_BR.shape[1]))
        h_ND = self._model.embed(ids_BR.flatten())
        states, first = [], 0
        for tap in self._draft.taps if self._draft is not None else ():
            h_ND = self._model.run_layers(h_ND, self._layers[first:tap], first, state.position_B)
            states.append(h_ND.view(*ids_BR.shape, -1))
            first = tap
        h_ND = self._model.run_layers(h_ND, self._layers[first:], first, state.position_B)
        return self._model.best(h_ND, self._head).view(ids_BR.shape), states

    def _commit(self, state: State, draft_Bk: Tensor, target_BR: Tensor) -> Tensor:
        """Accept the draft's longest prefix that the model agrees with and one token of the model's, but nothing behind
        a stop token or the limit. Returns how many tokens each sequence gained, [B]."""
        agrees_Bk = draft_Bk == target_BR[:, : self._num_draft_tokens]
        num_accepted_B = agrees_Bk.long().cumprod(dim=1).sum(dim=1)
        stops_BR = (target_BR[..., None] == self._stop_ids).any(dim=-1)
        num_before_stop_BR = stops_BR.long().cumsum(dim=1) - stops_BR.long()
        num_to_stop_B = (num_before_stop_BR == 0).sum(dim=1)
        room_B = state.limit_B - state.position_B
        num_committed_B = torch.minimum(torch.minimum(num_accepted_B + 1, num_to_stop_B), room_B)
        state.report_BC.copy_(torch.cat((num_committed_B[:, None], num_accepted_B[:, None], target_BR), dim=1))
        newest_B1 = (num_committed_B - 1).clamp_min(0)[:, None]
        moved_B = num_committed_B > 0
        state.last_B.copy_(torch.where(moved_B, target_BR.gather(1, newest_B1)[:, 0], state.last_B))
        state.position_B.add_(num_committed_B)
        has_stopped_B = moved_B & stops_BR.gather(1, newest_B1)[:, 0]
        state.limit_B.copy_(torch.where(has_stopped_B, state.position_B, state.limit_B))
        return num_committed_B
