"""Keys and values in PyTorch tensors, one vector after the other.

Shape letters: L layers, S slots (one sequence each), H key/value heads, T positions, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hopskip.backends.rows import Cache
from hopskip.checkpoint.config import ModelConfig


class TensorCache(Cache):
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
        self.num_slots, self.length = num_slots, length
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        self.bytes_per_position = self.nbytes // (num_slots * length)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that the cache holds; the first four dimensions are L, S, H, T."""
        found = (self.k_LSHTD, self.v_LSHTD, self.k_scales_LSHT, self.v_scales_LSHT)
        return [tensor for tensor in found if tensor is not None]

    def copy_from(self, other: Cache) -> None:
        assert isinstance(other, TensorCache)
        slots, length = other.num_slots, other.length
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[:, :slots, :, :length] = theirs

    def keep_path(self, slot: int, start: int, rows: Sequence[int]) -> None:
        first = next((i for i, row in enumerate(rows) if row != i), len(rows))  # those before are in their place
        if first == len(rows):
            return
        places = torch.tensor(rows[first:]) + start
        for tensor in self.tensors:
            # indexing copies before anything is overwritten
            tensor[:, slot, :, start + first : start + len(rows)] = tensor[:, slot][:, :, places]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for tensor in self.tensors:
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()
