"""Tensors as they lie in a file: rows of plain values, or of ggml's quantized blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class BlockType:
    """How a row is stored: blocks of `num_values` values in `num_bytes` bytes. Names as in ggml and safetensors."""

    name: str
    num_values: int
    num_bytes: int
    dtype: torch.dtype | None = None
    """The plain type of each value; None where the block is quantized."""


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, torch.float32),
    1: BlockType("F16", 1, 2, torch.float16),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, torch.bfloat16),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
"""The types that hopskip reads, by their number in a GGUF file: all that the gguf package can dequantize."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: rows of blocks, one after the other. `shape` is in torch order."""

    path: Path
    offset: int
    type: BlockType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.num_values * self.type.num_bytes

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def blocks(self, first: int = 0, count: int | None = None) -> Tensor:
        """The stored bytes of `count` rows, uint8 [rows, bytes per row].

        A private map of the file: pages are read when touched and freed with the tensor; writes stay in memory.
        """
        rows = self.num_rows - first if count is None else min(count, self.num_rows - first)
        start, size = self.offset + first * self.row_bytes, rows * self.row_bytes
        data = np.memmap(self.path, dtype=np.uint8, mode="c", offset=start, shape=(size,))
        return torch.from_numpy(data).view(rows, self.row_bytes)

    def values(self, first: int = 0, count: int | None = None) -> Tensor:
        """The values of `count` rows, [rows, values per row], as `dequantize` gives them."""
        return dequantize(self.blocks(first, count), self.type)

    def copy_into(self, out: Tensor) -> None:
        """Write the values to `out`, of this shape and any precision and device; dequantized to float32, rounded once.

        Goes a few hundred rows at a time: neither the mapped file nor float32 values pile up beside a large matrix.
        """
        rows = out.view(self.num_rows, self.shape[-1])
        step = max(1, _CHUNK_VALUES // self.shape[-1])
        for first in range(0, self.num_rows, step):
            rows[first : first + step] = self.values(first, step)


def dequantize(blocks: Tensor, block_type: BlockType) -> Tensor:
    """Stored rows, uint8 [rows, bytes per row] -> values [rows, values per row].

    In the stored precision where that is a plain one (and then a view of `blocks`), else float32.
    """
    if block_type.dtype is not None:
        # only a file that keeps its values at an odd address costs a copy
        is_aligned = blocks.data_ptr() % block_type.num_bytes == 0
        return (blocks if is_aligned else blocks.clone()).view(block_type.dtype)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_array

    values: Tensor = torch.from_numpy(dequantize_array(blocks.numpy(), GGMLQuantizationType[block_type.name]))
    return values


def unpermute_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's reordering of query and key rows: from pairs (0, 1), (2, 3), ... back to (i, i + half).

    Whole rows move, so quantized blocks [rows, bytes] stay as they are. Returns a copy.
    """
    num_rows, num_columns = rows.shape
    pairs = rows.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)
