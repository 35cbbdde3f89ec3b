"""What tests need of packed weights: random blocks of every stored type, an independent reader of strips, quantizing in
plain PyTorch, and checkpoints in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hopskip.backends.native.formats import Format
from hopskip.backends.native.packing import Packed
from hopskip.checkpoint.checkpoint import expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.stored import BLOCK_TYPES, BlockType

HALVES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where a block of each type has its float16 numbers; all other bytes may have any value."""


def random_blocks(kind: str, rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of any bytes with scales below 0.1, uint8 [rows, bytes of a row]."""
    rng = np.random.default_rng(seed)
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows, cols // values, size), dtype=np.uint8)
    for at in HALVES_AT.get(kind, ()):
        halves = (rng.uniform(0.001, 0.1, blocks.shape[:2]) * rng.choice([-1, 1], blocks.shape[:2])).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(115, 130, blocks.shape[:2])
    if kind == "IQ1_M":  # its scale is spread over four words
        blocks[..., 49::2] = (blocks[..., 49::2] & 15) | 0x20
    if kind == "NVFP4":
        blocks[..., :4] = rng.integers(0, 0x7E, (*blocks.shape[:2], 4))
    return blocks.reshape(rows, -1)


def values_of(kind: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the gguf package has them, float32 [rows, cols]."""
    values: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    return values


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
_CENTERS = {Format.Q8: 128, Format.Q4_0: 8, Format.Q5_0: 16, Format.Q3_K: 4, Format.Q6_K: 32}
_OF_256 = (Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q5_K, Format.Q6_K)
_WITH_MINIMA = (Format.Q4, Format.Q5_1, Format.Q2_K, Format.Q4_K, Format.Q5_K)


def read_packed(packed: Packed) -> NDArray[np.float32]:
    """The values of packed weights, by the description in `native/formats.h` and nothing else."""
    format, bits = packed.format, packed.format.bits
    strips = np.ascontiguousarray(packed.data).view(np.uint8).reshape(len(packed.data), -1)
    if not format.is_quantized:
        rows = strips.reshape(len(strips), -1, 16, 4).swapaxes(1, 2).reshape(len(strips) * 16, -1)
        if format is Format.F32:
            values = np.ascontiguousarray(rows).view(np.float32)
        else:
            values = (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return values[: packed.rows, : packed.cols]
    blocks = -(-packed.cols // 32)
    per_header = 8 if format in _OF_256 else 1 if format in _WITH_MINIMA else 2
    out = np.zeros((len(strips), 16, blocks, 32), dtype=np.float32)
    at = 0
    for block in range(blocks):
        index = block % per_header
        if index == 0:
            header = strips[:, at : at + 64].copy().view(np.float16).reshape(-1, 2, 16).astype(np.float32)
            at += 64
            if format in _OF_256:
                factors = strips[:, at : at + 256].reshape(-1, 8, 2, 16)
                at += 256
        units = strips[:, at : at + 64 * bits].reshape(-1, bits, 16, 4)  # strip, unit, lane, byte
        at += 64 * bits
        q = _integers(units, bits)  # strip, lane, column
        if format in (Format.IQ4, Format.MXFP4):
            q = (IQ4 if format is Format.IQ4 else MXFP4)[q]
        scale, minimum = header[:, 0 if per_header != 2 else index], header[:, 1]
        scales, minima = (np.repeat(x[:, :, None], 32, axis=2) for x in (scale, minimum))
        if format in (Format.Q4_K, Format.Q5_K):
            scales, minima = (x * factors[:, index, i, :, None] for i, x in enumerate((scales, minima)))
        elif format in _OF_256:
            halves = np.repeat(factors[:, index].swapaxes(1, 2), 16, axis=2)  # strip, lane, column
            if format is Format.Q2_K:
                scales, minima = scales * (halves & 15), minima * (halves >> 4)
            else:
                scales = scales * halves.view(np.int8)
        values = scales * (q.astype(np.int32) - _CENTERS.get(format, 0))
        out[:, :, block] = values + minima if format in _WITH_MINIMA else values
    assert at == strips.shape[1]
    return out.reshape(len(strips) * 16, -1)[: packed.rows, : packed.cols]


def _integers(units: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return units.swapaxes(1, 2).reshape(len(units), 16, 32)
    q = np.zeros((len(units), 16, 8, 4), dtype=np.uint8)  # strip, lane, group, column of it
    first = shift = 0
    for width in (4, 2, 1):
        if bits & width:
            for group in range(8):
                unit = group % 4 if width == 4 else group // 4 if width == 2 else 0
                down = group // 4 * 4 if width == 4 else group % 4 * 2 if width == 2 else group
                q[:, :, group] |= (units[:, first + unit] >> down & ((1 << width) - 1)) << shift
            first, shift = first + width, shift + width
    return q.reshape(len(units), 16, 32)


# -- quantizing, readably ----------------------------------------------------------------------------------------------


def quantized_q8(weight_OI: Tensor) -> Tensor:
    """The values after symmetric int8, the largest magnitude of each block at 127."""
    blocks_OB32 = _blocks(weight_OI)
    scales_OB1 = (blocks_OB32.abs().amax(-1, keepdim=True) / 127).half().float()
    levels = (blocks_OB32 / torch.where(scales_OB1 == 0, 1.0, scales_OB1)).round().clamp(-127, 127)
    return (levels * scales_OB1).flatten(1)[:, : weight_OI.shape[1]]


def quantized_q4(weight_OI: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """The values after the search that `native/pack.inl` describes."""
    weights_B32 = _blocks(torch.ones(1, weight_OI.shape[1]) if importance_I is None else importance_I[None])[0]
    weights_B32 = torch.where(weights_B32.sum(-1, keepdim=True) > 0, weights_B32, 1.0)
    shares_B32 = weights_B32 / weights_B32.sum(-1, keepdim=True)
    x = _blocks(weight_OI)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)

    def levels_of(scale: Tensor, minimum: Tensor) -> Tensor:
        return ((x - minimum) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 15)

    best, least = x, torch.full_like(low, torch.inf)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        middle, reach = (low + high) / 2, (high - low) / 2 * shrink
        scale, minimum = (reach * 2 / 15).half().float(), (middle - reach).half().float()
        for _ in range(2):
            levels = levels_of(scale, minimum)
            mean_x, mean_level = ((shares_B32 * v).sum(-1, keepdim=True) for v in (x, levels))
            spread = levels - mean_level
            variance = (shares_B32 * spread.square()).sum(-1, keepdim=True).clamp_min(1e-12)
            scale = (shares_B32 * spread * (x - mean_x)).sum(-1, keepdim=True) / variance
            minimum = (mean_x - scale * mean_level).half().float()
            scale = scale.half().float()
        found = levels_of(scale, minimum) * scale + minimum
        error = (shares_B32 * (found - x).square()).sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.flatten(1)[:, : weight_OI.shape[1]]


def _blocks(weight_OI: Tensor) -> Tensor:
    """float32 [O, B, 32], zeros beyond the last column."""
    return F.pad(weight_OI.float(), (0, -weight_OI.shape[1] % 32)).reshape(len(weight_OI), -1, 32)


# -- checkpoints in memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArray:
    """As `StoredTensor`, of bytes in memory."""

    type: BlockType
    shape: tuple[int, ...]
    bytes: NDArray[np.uint8]
    """uint8 [rows, bytes of a row]."""

    def blocks(self, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        return self.bytes[first : None if count is None else first + count]


class ArrayCheckpoint:
    """Enough of a `Checkpoint` to be packed: float32 tensors, ones where none are given."""

    path = Path("memory")
    fingerprint = "0" * 64

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self._tensors = tensors

    def array(self, name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.tensor(name).numpy()
        return values

    def tensor(self, name: str) -> Tensor:
        return self._tensors.get(name, torch.ones(expected_tensors(self.config)[name])).float().contiguous()

    def stored(self, name: str) -> Any:
        values = self.array(name)
        return StoredArray(BLOCK_TYPES[0], values.shape, values.view(np.uint8).reshape(len(values), -1))

    def row_order(self, name: str) -> None:
        return None
