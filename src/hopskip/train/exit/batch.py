"""Batches of conversations, as an exit is trained on.

Shape letters: B conversations, T tokens, A features, D hidden size, V vocabulary, P positions that are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.train.exit.conversations import Conversation


@dataclass(frozen=True)
class Batch:
    """Conversations padded at the end to one length."""

    x_BTD: Tensor
    """What enters the exit for each token: its embedding, or the output of layer `start`."""
    features_BTAD: Tensor
    """Of the token before; zeros before the first."""
    final_PD: Tensor
    """The model's final hidden states at the predicted positions: they hold the targets."""
    next_P: Tensor
    """Index in the draft vocabulary of the model's own next token; -1 where it is not in it."""
    places_P: Tensor
    """Where the predicted positions lie in the flattened [B * T]."""
    first_P: Tensor
    """For each predicted position, how many predicted positions of the same answer come before it."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)))

    def pin_memory(self) -> Batch:
        """For loaders that prepare copies to a GPU."""
        return Batch(*(getattr(self, part.name).pin_memory() for part in fields(self)))

    @property
    def is_finite(self) -> bool:
        """Whether all states behind it are numbers."""
        return bool(self.x_BTD.isfinite().all() & self.features_BTAD.isfinite().all() & self.final_PD.isfinite().all())


def make_batch(
    conversations: Seq[Conversation], taps: Seq[int], exit_config: ExitConfig, index_V: Tensor, embedding: Tensor
) -> Batch:
    """Pad conversations, with their states, to one batch.

    Args:
        taps: the layers whose outputs the conversations hold.
        index_V: for every token its index in the draft vocabulary, -1 for none.
        embedding: the model's, [V, D].
    """
    length = max(len(c.ids_T) - 1 for c in conversations)
    x, features, finals, nexts, places, firsts = [], [], [], [], [], []
    columns = [list(taps).index(layer) for layer in exit_config.features]
    for row, conversation in enumerate(conversations):
        ids, states = conversation.ids_T, conversation.states_TAD
        assert states is not None
        count, own_P = len(ids) - 1, conversation.predicted_P
        own = states[:, list(taps).index(exit_config.start)] if exit_config.start else embedding[ids[:-1]]
        x.append(F.pad(own.float(), (0, 0, 0, length - count)))
        features.append(F.pad(states[:-1, columns].float(), (0, 0, 0, 0, 1, length - count)))
        finals.append(states[own_P, -1].float())
        nexts.append(index_V[ids[own_P + 1]])
        places.append(own_P + row * length)
        firsts.append(places_in_runs(own_P))
    return Batch(
        torch.stack(x), torch.stack(features), torch.cat(finals), torch.cat(nexts), torch.cat(places), torch.cat(firsts)
    )


def places_in_runs(numbers_P: Tensor) -> Tensor:
    """For rising numbers, how many before each follow each other up to it.

    >>> places_in_runs(torch.tensor([4, 5, 6, 9, 10])).tolist()
    [0, 1, 2, 0, 1]
    """
    index_P = torch.arange(len(numbers_P))
    begins_P = F.pad(numbers_P[1:] != numbers_P[:-1] + 1, (1, 0), value=True)
    return index_P - torch.where(begins_P, index_P, 0).cummax(dim=0).values
