"""From conversations to batches on a device: their states read from disk by worker processes, or made by the model.

Shape letters: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.train.exit.batch import Batch, make_batch
from hopskip.train.exit.conversations import Conversation

WithStates = Callable[[Seq[Conversation]], list[Conversation]]
"""Conversations with the outputs of the tapped layers."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Makes the batches of one exit."""

    exit_config: ExitConfig
    taps: Seq[int]
    """Layers whose outputs the conversations have."""
    index_V: Tensor
    """For every token its index in the draft vocabulary, -1 for none."""
    embedding: Tensor
    """The model's, [V, D]."""
    with_states: WithStates | None = None
    """Makes the states of a batch when it is its turn, in the main process; None: they are stored."""
    num_workers: int = 0
    """Processes that read and put together what is stored, while the step before runs."""

    @classmethod
    def index_of(cls, vocabulary: Tensor, vocab_size: int) -> Tensor:
        """`index_V` of a draft vocabulary."""
        index_V = torch.full((vocab_size,), -1)
        index_V[vocabulary] = torch.arange(len(vocabulary))
        return index_V

    def batches(
        self, conversations: Seq[Conversation], wanted: Iterable[list[int]], device: torch.device
    ) -> Iterator[Batch]:
        """In the order of `wanted`, which names conversations by their number."""
        loader: Any = DataLoader(
            conversations,  # type: ignore[arg-type]  # a list has all that it asks of a data set
            batch_sampler=wanted,
            collate_fn=self._batch if self.with_states is None else list,
            num_workers=0 if self.with_states is not None else self.num_workers,
            multiprocessing_context="fork" if self.num_workers and self.with_states is None else None,
            pin_memory=device.type == "cuda" and self.with_states is None,
        )
        for found in loader:
            batch = found if self.with_states is None else self._batch(self.with_states(found))
            yield batch.to(device)

    def _batch(self, conversations: Seq[Conversation]) -> Batch:
        return make_batch(conversations, self.taps, self.exit_config, self.index_V, self.embedding)
