"""The weight formats of the native engine: quantization, GGUF blocks, packing into the strips that kernels stream.

Shape letters: O output rows, I input columns (padded to whole blocks), B blocks of 32 columns, U 32-bit units of a row,
S strips of 16 rows.

All of this runs once per model, in plain PyTorch; `dequantize` is the reference that the kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hopskip.errors import CheckpointError

BLOCK = 32
"""Columns that share a scale."""
STRIP = 16
"""Output rows that are packed together."""
_ROWS_AT_ONCE = 4096  # of a search for scales: bounds its memory
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a q4 block's range, tried as starting points


class Format(IntEnum):
    """How the native engine stores a matrix. The numbers are those of `Format` in `native/kernels.h`."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3


@dataclass(frozen=True)
class Q8:
    """Weights `scale * value`, a scale per block of 32 columns."""

    values: Tensor
    """int8 [O, I]."""
    scales: Tensor
    """float16 [O, B]."""

    def dequantize(self) -> Tensor:
        """float32 [O, I]."""
        blocks_OB32 = self.values.reshape(len(self.values), -1, BLOCK).float()
        return (blocks_OB32 * self.scales.float()[..., None]).flatten(1)


@dataclass(frozen=True)
class Q4:
    """Weights `scale * nibble + minimum`, a scale and a minimum per block of 32 columns."""

    nibbles: Tensor
    """uint8 [O, B, 16]: byte j of a block holds column j in its low four bits and column j + 16 in its high ones."""
    scales: Tensor
    """float16 [O, B]."""
    minima: Tensor
    """float16 [O, B]."""

    def dequantize(self) -> Tensor:
        """float32 [O, I]."""
        columns_OB32 = torch.cat((self.nibbles & 15, self.nibbles >> 4), dim=-1).float()
        return (columns_OB32 * self.scales.float()[..., None] + self.minima.float()[..., None]).flatten(1)


def quantize_q8(weight_OI: Tensor) -> Q8:
    """Symmetric int8 with the largest magnitude of each block at 127: the quality of GGUF's Q8_0.

    Raises:
        CheckpointError: a weight is not finite, or too large for a float16 scale.
    """
    blocks_OB32 = _blocks(weight_OI)
    scales_OB = _to_half(blocks_OB32.abs().amax(-1) / 127)
    values = (blocks_OB32 / _divisor(scales_OB)).round().clamp(-127, 127)
    return Q8(values.to(torch.int8).flatten(1), scales_OB)


def quantize_q4(weight_OI: Tensor, importance_I: Tensor | None = None) -> Q4:
    """Asymmetric 4 bits; scale and minimum of each block minimise its squared error.

    From several ranges, each a shrunken [minimum, maximum] of the block: assign the nearest levels, fit scale and
    minimum to them by least squares, and so on once more. The best of all is kept.

    Args:
        importance_I: how much each column's errors weigh, float32, not negative; None weighs all alike.

    Raises:
        CheckpointError: a weight is not finite, or too large for a float16 scale.
    """
    if importance_I is None:
        importance_I = torch.ones(weight_OI.shape[1])
    importance_B32 = _blocks(importance_I[None])[0]
    parts = [_quantize_q4(rows, importance_B32) for rows in torch.split(weight_OI, _ROWS_AT_ONCE)]
    return Q4(
        torch.cat([part.nibbles for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.minima for part in parts]),
    )


def _quantize_q4(weight_OI: Tensor, importance_B32: Tensor) -> Q4:
    x = _blocks(weight_OI)
    # a block whose columns all count for nothing is fitted as any other
    weights_B32 = torch.where(importance_B32.sum(-1, keepdim=True) > 0, importance_B32, 1.0)
    low, high = x.amin(-1), x.amax(-1)
    best: tuple[Tensor, ...] | None = None
    for shrink in _SHRINKS:
        middle, reach = (low + high) / 2, (high - low) / 2 * shrink
        scale, minimum = _to_half(reach * 2 / 15), _to_half(middle - reach)
        for _ in range(2):
            levels = _levels(x, scale, minimum)
            scale, minimum = (_to_half(fit) for fit in _least_squares(x, levels, weights_B32))
        levels = _levels(x, scale, minimum)
        off = levels * scale.float()[..., None] + minimum.float()[..., None] - x
        found = ((weights_B32 * off.square()).sum(-1), scale, minimum, levels)
        if best is None:
            best = found
        else:
            is_better = found[0] < best[0]
            best = tuple(
                torch.where(is_better if new.ndim == 2 else is_better[..., None], new, old)
                for new, old in zip(found, best, strict=True)
            )
    assert best is not None
    _, scale, minimum, levels = best
    levels = levels.to(torch.uint8)
    return Q4(levels[..., :16] | levels[..., 16:] << 4, scale, minimum)


def _levels(x_OB32: Tensor, scale_OB: Tensor, minimum_OB: Tensor) -> Tensor:
    return ((x_OB32 - minimum_OB.float()[..., None]) / _divisor(scale_OB)).round().clamp(0, 15)


def _least_squares(x: Tensor, levels: Tensor, weights_B32: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that bring `scale * levels + minimum` closest to `x`, per block."""
    shares = weights_B32 / weights_B32.sum(-1, keepdim=True)
    mean_x, mean_level = (shares * x).sum(-1), (shares * levels).sum(-1)
    spread = levels - mean_level[..., None]
    variance = (shares * spread.square()).sum(-1)
    scale = (shares * spread * (x - mean_x[..., None])).sum(-1) / variance.clamp_min(1e-12)
    return scale, mean_x - scale * mean_level


def from_gguf_blocks(type_name: str, blocks: Tensor) -> Q8 | Q4 | None:
    """The blocks of a GGUF tensor, uint8 [O, bytes per row], in the engine's format; None if they do not map exactly.

    Q8_0, Q4_0 and Q4_1 map. A Q4_0 weight is `scale * (nibble - 8)`; its minimum, -8 * scale, is exact in float16
    unless it overflows, and then the blocks do not map.
    """
    if type_name not in ("Q8_0", "Q4_0", "Q4_1"):
        return None
    block_bytes = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[type_name]
    blocks = blocks.reshape(len(blocks), -1, block_bytes)
    scales_OB = _half_at(blocks, 0)
    if type_name == "Q8_0":
        return Q8(blocks[..., 2:].contiguous().view(torch.int8).flatten(1), scales_OB)
    minima_OB = scales_OB * -8 if type_name == "Q4_0" else _half_at(blocks, 2)
    if not bool(minima_OB.isfinite().all()):
        return None
    return Q4(blocks[..., -16:].contiguous(), scales_OB, minima_OB)


def _half_at(blocks: Tensor, offset: int) -> Tensor:
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1)


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernels read it."""

    format: Format
    rows: int
    cols: int
    data: Tensor
    """int32 [S, words of a strip], see `Matrix` in `native/kernels.h`."""


def pack(weight: Tensor | Q8 | Q4, cols: int) -> Packed:
    """Pack a matrix of `cols` columns (the padding of a quantized one not counted) into strips.

    A float tensor is packed in its own precision: float32, or bfloat16.
    """
    if isinstance(weight, Q8):
        return _packed(Format.Q8, weight.values.view(torch.uint8) ^ 128, cols, weight.scales)
    if isinstance(weight, Q4):
        return _packed(Format.Q4, weight.nibbles.flatten(1), cols, weight.scales, weight.minima)
    assert weight.dtype in (torch.float32, torch.bfloat16)
    format = Format.F32 if weight.dtype == torch.float32 else Format.BF16
    return _packed(format, F.pad(weight, (0, -weight.shape[1] % BLOCK)), cols)


def _packed(format: Format, rows: Tensor, cols: int, *scales: Tensor) -> Packed:
    """Every format is the same transposition: units of 32 bits, lane r of a unit being row r of the strip."""
    num_rows = rows.shape[0]

    def strips_of(x: Tensor) -> Tensor:
        """[O, n] -> [S, n, 16]"""
        padded = F.pad(x, (0, 0, 0, -num_rows % STRIP))
        return padded.reshape(-1, STRIP, x.shape[1]).transpose(1, 2)

    units = strips_of(rows.contiguous().view(torch.int32))
    if not scales:
        return Packed(format, num_rows, cols, units.flatten(1))
    num_headers = -(-len(scales) * scales[0].shape[1] // 2)
    halves = torch.stack([strips_of(scale.contiguous().view(torch.int16)) for scale in scales], dim=2).flatten(1, 2)
    headers = F.pad(halves, (0, 0, 0, 2 * num_headers - halves.shape[1])).flatten(1).contiguous().view(torch.int32)
    # after each header the units of its blocks; the last one may have one block less
    per_header = _units_of_header(format)
    units_padded = F.pad(units, (0, 0, 0, num_headers * per_header - units.shape[1]))
    grouped = units_padded.reshape(len(units), num_headers, per_header, STRIP)
    data = torch.cat([headers.reshape(len(units), num_headers, 1, STRIP), grouped], dim=2).flatten(1)
    return Packed(format, num_rows, cols, data[:, : (num_headers + units.shape[1]) * STRIP].contiguous())


def _units_of_header(format: Format) -> int:
    """Units that follow a header, see `Matrix` in `native/kernels.h`."""
    return 16 if format is Format.Q8 else 4


def select_rows(packed: Packed, rows: Tensor) -> Packed:
    """The packed matrix of some rows of a packed matrix, int64 [n], in that order."""
    strip, lane = rows // STRIP, rows % STRIP
    units = packed.data.reshape(len(packed.data), -1, STRIP)
    if packed.format in (Format.F32, Format.BF16):
        return _packed(packed.format, units[strip, :, lane], packed.cols)
    blocks = -(-packed.cols // BLOCK)
    num_scales, per_header = (1 if packed.format is Format.Q8 else 2), _units_of_header(packed.format)
    num_units = blocks * (8 if packed.format is Format.Q8 else 4)
    grouped = F.pad(units, (0, 0, 0, -units.shape[1] % (1 + per_header)))
    grouped = grouped.reshape(len(units), -1, 1 + per_header, STRIP)
    headers = grouped[:, :, 0].contiguous().view(torch.int16).reshape(len(units), -1, STRIP)[:, : blocks * num_scales]
    scales = headers.reshape(len(units), blocks, num_scales, STRIP)[strip, :, :, lane].view(torch.float16)
    own_units = grouped[:, :, 1:].flatten(1, 2)[:, :num_units][strip, :, lane]
    return _packed(packed.format, own_units, packed.cols, *scales.unbind(-1))


def rows_in_q8(packed: Packed, rows: Tensor) -> Packed:
    """As `select_rows`, but float weights are packed to q8."""
    chosen = select_rows(packed, rows)
    if packed.format not in (Format.F32, Format.BF16):
        return chosen
    units = chosen.data.reshape(len(chosen.data), -1, STRIP).transpose(1, 2).flatten(0, 1)[: len(rows)]
    dtype = torch.float32 if packed.format is Format.F32 else torch.bfloat16
    weight_OI = units.contiguous().view(dtype)[:, : packed.cols].float()
    return pack(quantize_q8(weight_OI), packed.cols)


def _blocks(weight_OI: Tensor) -> Tensor:
    """float32 [O, B, 32], zeros beyond the last column."""
    if not bool(weight_OI.isfinite().all()):
        raise CheckpointError("a weight is infinite or not a number; the checkpoint is damaged")
    return F.pad(weight_OI.float(), (0, -weight_OI.shape[1] % BLOCK)).reshape(len(weight_OI), -1, BLOCK)


def _to_half(scale: Tensor) -> Tensor:
    half = scale.half()
    if not bool(half.isfinite().all()):
        raise CheckpointError(f"a scale of {float(scale.abs().max()):.3g} does not fit float16; use bfloat16 weights")
    return half


def _divisor(scale_OB: Tensor) -> Tensor:
    """float32 [O, B, 1]; 1 for a block of zeros, whose scale is 0."""
    scale = scale_OB.float()[..., None]
    return torch.where(scale == 0, 1.0, scale)
