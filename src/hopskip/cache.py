"""The key/value cache: tensors only. Whoever runs the model owns the lengths.

Shape letters: L layers, S slots (one sequence each), H key/value heads, T positions, D head dimension.

Rewinding is arithmetic in the caller (`length -= n`): a position is valid because its owner says so, and a rejected one
is overwritten by the next pass. Nothing is ever copied to reject a draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hopskip.config import ModelConfig


@dataclass(frozen=True)
class Segment:
    """`count` tokens of the sequence in `slot`, the first at position `start`: consecutive ones, or a tree of them."""

    slot: int
    start: int
    count: int
    parents: tuple[int, ...] | None = None
    """Of a tree: for each row the row of the segment that it follows, an earlier one; -1 for the first, the root. The
    rows of a branch have consecutive positions, but keys and values lie in the order of the rows (`places`), so that
    branches do not overwrite each other. `Cache.keep_branch` brings one of them into place."""

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many steps each row is from the first."""
        if self.parents is None:
            return tuple(range(self.count))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    def places_to(self, row: int) -> list[int]:
        """Cache positions of a tree's row and of those that it follows, from the first on."""
        assert self.parents is not None
        places = []
        while row >= 0:
            places.append(self.start + row)
            row = self.parents[row]
        return places[::-1]


class Rows:
    """Where each of the N rows of a hidden-state tensor lives in the cache.

    Rows come in segments: consecutive tokens of one sequence (a prompt, a draft to verify), a tree of them, one token
    of many sequences (a batch), or all at once. No two segments share a slot.

    >>> Rows([Segment(slot=0, start=7, count=3), Segment(slot=2, start=40, count=1)]).positions.tolist()
    [7, 8, 9, 40]
    >>> Rows([Segment(slot=0, start=7, count=4, parents=(-1, 0, 1, 0))]).positions.tolist()
    [7, 8, 9, 8]
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
        return torch.tensor([s.start + depth for s in self.segments for depth in s.depths], dtype=torch.int32)

    @cached_property
    def back(self) -> Tensor | None:
        """How many rows before each row the one is that it follows, 0 for the first of a segment: int32 [N]. None if no
        segment is a tree."""
        if all(segment.parents is None for segment in self.segments):
            return None
        steps: list[int] = []
        for segment in self.segments:
            parents = segment.parents or range(-1, segment.count - 1)
            steps += [0, *(row - parent for row, parent in enumerate(parents) if row)]
        return torch.tensor(steps, dtype=torch.int32)

    @property
    def max_position(self) -> int:
        """The last position of the cache that is written."""
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

    def keep_branch(self, slot: int, start: int, rows: Sequence[int]) -> None:
        """Move what a tree's rows have left to where consecutive tokens have it.

        Args:
            start: position of the tree's first row.
            rows: the branch to keep, from the first row on; each comes after the one that it follows.
        """
        first = next((i for i, row in enumerate(rows) if row != i), len(rows))  # those before are in their place
        if first == len(rows):
            return
        places = torch.tensor(rows[first:]) + start
        for tensor in self.tensors:
            # indexing copies before anything is overwritten
            tensor[:, slot, :, start + first : start + len(rows)] = tensor[:, slot][:, :, places]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for tensor in self.tensors:
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
