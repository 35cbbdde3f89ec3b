"""Tensors as they lie in a file: rows of plain values, or of ggml's quantized blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockType:
    """How a row is stored: blocks of `num_values` values in `num_bytes` bytes. Names as in ggml and safetensors."""

    name: str
    num_values: int
    num_bytes: int
    dtype: str | None = None
    """The plain type of each value, `float32`, `float16` or `bfloat16`; None where the block is quantized."""


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, "float32"),
    1: BlockType("F16", 1, 2, "float16"),
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
    30: BlockType("BF16", 1, 2, "bfloat16"),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
"""The types that hopskip reads, by their number in a GGUF file: all that the gguf package can dequantize."""


FP8_TYPES = {name: BlockType(name, 1, 1) for name in ("F8_E4M3", "F8_E5M2")}
"""Types of weights that have a scale beside them."""

_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E8M0": 1,
}
SMALL_TYPES = {name: BlockType(name, 1, size) for name, size in _SIZES.items()}
"""Types that no weight has here; scales of powers of two are kept as their exponents."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: rows of blocks, one after the other. `shape` has the rows' length last."""

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

    def blocks(self, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        """The stored bytes of `count` rows, uint8 [rows, bytes per row].

        A private map of the file: pages are read when touched and freed with the array; writes stay in memory.
        """
        rows = self.num_rows - first if count is None else min(count, self.num_rows - first)
        start, size = self.offset + first * self.row_bytes, rows * self.row_bytes
        data = np.memmap(self.path, dtype=np.uint8, mode="c", offset=start, shape=(size,))
        return np.asarray(data).reshape(rows, self.row_bytes)

    def values(self, first: int = 0, count: int | None = None) -> NDArray[np.float32]:
        """The values of `count` rows, float32 [rows, values per row]."""
        return dequantize(self.blocks(first, count), self.type)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All values, in the tensor's shape: wherever numpy takes an array, it takes a stored tensor."""
        return np.array(self.values().reshape(self.shape), dtype=dtype, copy=copy)


def dequantize(blocks: NDArray[np.uint8], block_type: BlockType) -> NDArray[np.float32]:
    """Stored rows, uint8 [rows, bytes per row] -> values, float32 [rows, values per row]. Of F32 it is a view of
    `blocks`, unless a file keeps its values at odd addresses."""
    if block_type.dtype == "float32":
        return np.require(blocks.view(np.float32), requirements="A")
    if block_type.dtype == "float16":
        return blocks.view(np.float16).astype(np.float32)
    if block_type.dtype == "bfloat16":  # the upper half of a float32
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_array

    values: NDArray[np.float32] = dequantize_array(blocks, GGMLQuantizationType[block_type.name])
    return values


def plain_blocks(values: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    """Values as the bytes of a plain type (F32, F16, BF16), rounded to nearest: uint8 [rows, bytes per row]. Those that
    are too large for F16 become infinite."""
    if type_name == "F32":
        stored: NDArray[Any] = values
    elif type_name == "F16":
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
    else:
        bits = values.view(np.uint32).astype(np.uint64)
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        stored[np.isnan(values)] = 0x7FC0
    return np.ascontiguousarray(stored).view(np.uint8)


def unpermuted(num_rows: int, num_heads: int) -> NDArray[np.int32]:
    """Where llama.cpp stores each row of a query or key matrix, int32 [rows]: it has reordered the rows of each head
    from (i, i + half) to pairs (0, 1), (2, 3), ..."""
    pairs = np.arange(num_rows, dtype=np.int32).reshape(num_heads, num_rows // num_heads // 2, 2)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(num_rows)
