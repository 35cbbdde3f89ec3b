"""The key/value cache: tensors only. Whoever runs the model owns the lengths.

Shape letters: L layers, S slots (one sequence each), H key/value heads, T positions, D head dimension.

Rewinding is arithmetic in the caller (`length -= n`): a position is valid because its owner says so, and a rejected one
is overwritten by the next pass. Nothing is ever copied to reject a draft.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hopskip.config import ModelConfig


@dataclass(frozen=True)
class Segment:
    """`count` consecutive tokens of the sequence in `slot`, the first at position `start`."""

    slot: int
    start: int
    count: int


class Rows:
    """Where each of the N rows of a hidden-state tensor lives in the cache.

    Rows come in segments: consecutive tokens of one sequence (a prompt, a draft to verify), one token of many sequences
    (a batch), or both at once. No two segments share a slot.

    >>> Rows([Segment(slot=0, start=7, count=3), Segment(slot=2, start=40, count=1)]).positions.tolist()
    [7, 8, 9, 40]
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    @cached_property
    def slots(self) -> Tensor:
        """Cache slot of each row, int32 [N]."""
        return torch.tensor([s.slot for s in self.segments for _ in range(s.count)], dtype=torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each row in its sequence, int32 [N]."""
        return torch.tensor([s.start + i for s in self.segments for i in range(s.count)], dtype=torch.int32)

    @property
    def max_position(self) -> int:
        return max(segment.start + segment.count - 1 for segment in self.segments)


class Cache:
    """Keys and values of every layer, `k_LSHTD` and `v_LSHTD`, allocated once.

    In int8 each vector of D numbers has a float32 scale, in `k_scales_LSHT` and `v_scales_LSHT`; else these are None.

    Memory is only reserved here: the operating system commits a page when it is first written.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, length, config.head_dim)
        self.k_LSHTD = torch.empty(shape, dtype=dtype, device=device)
        self.v_LSHTD = torch.empty(shape, dtype=dtype, device=device)
        has_scales = dtype == torch.int8
        self.k_scales_LSHT = torch.empty(shape[:-1], device=device) if has_scales else None
        self.v_scales_LSHT = torch.empty(shape[:-1], device=device) if has_scales else None

    @property
    def num_slots(self) -> int:
        return self.k_LSHTD.shape[1]

    @property
    def length(self) -> int:
        """Positions per slot."""
        return self.k_LSHTD.shape[3]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that the cache holds; the first four dimensions are L, S, H, T."""
        found = (self.k_LSHTD, self.v_LSHTD, self.k_scales_LSHT, self.v_scales_LSHT)
        return [tensor for tensor in found if tensor is not None]

    def copy_from(self, other: Cache) -> None:
        """Take over every slot of a smaller cache (used when the engine must grow its cache, never to reject)."""
        slots, length = other.num_slots, other.length
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[:, :slots, :, :length] = theirs

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for tensor in self.tensors:
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
