"""Weights of 8-bit floats with scales, as safetensors files hold them: dequantized when they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hopskip.checkpoint.quantization import Fp8Format, refuse_quantized_names
from hopskip.checkpoint.stored import FP8_TYPES, StoredTensor, dequantize
from hopskip.errors import CheckpointError

_EXPONENTS = ("F8_E8M0", "U8")

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""What follows a module's name: all of them multiply, also the one that is called an inverse."""
_UNUSED = re.compile(
    r".*\.(input_scale(_inv|_ub)?|activation_scale|output_scale|prob_output_scale|[qkv]_scale|kv_scale"
    r"|(input|output|weight|[qkv])_zero_point)"
)
"""Scales of activations and of cached keys and values, which are kept in full precision here."""


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A matrix of 8-bit floats, each block of which has a scale. A value is the product of the two, in float32."""

    scale: StoredTensor
    """Rows and columns of scales."""
    block: tuple[int, int]
    """Rows and columns of values that share one; at the end of the matrix fewer may remain."""

    def values(self, first: int = 0, count: int | None = None) -> NDArray[np.float32]:
        """See `StoredTensor.values`. Needs little more memory than the result."""
        codes = self.blocks(first, count)
        height, width = self.block
        scale_rows = np.arange(first, first + len(codes)) // height
        first_scale = first // height
        scales = _scale_values(self.scale, first_scale, int(scale_rows[-1]) - first_scale + 1)
        per_row = scales[scale_rows - first_scale]
        per_value = per_row if per_row.shape[1] == 1 else per_row.repeat(width, axis=1)[:, : self.shape[-1]]
        values: NDArray[np.float32] = _values_of_codes(self.type.name)[codes] * per_value
        return values


def with_scales(tensors: dict[str, StoredTensor], fp8: Fp8Format | None, place: Path) -> dict[str, StoredTensor]:
    """The weights of a checkpoint: each 8-bit one joined with its scale, and what is of no use here left out.

    Raises:
        CheckpointError: a scale is missing or does not fit, or a tensor is of a type that no weight has.
    """
    weights: dict[str, StoredTensor] = {}
    used = {name for name, tensor in tensors.items() if fp8 is not None and _is_unused(name, tensor, place)}
    for name, tensor in tensors.items():
        if name in used or tensor.type.name not in FP8_TYPES:
            continue
        module = name.removesuffix(".weight")
        found = next((scale for end in _SCALES if (scale := f"{module}.{end}") in tensors), None)
        if fp8 is None or found is None or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{place}: tensor {name!r} has dtype {tensor.type.name!r}, but "
                f"{'the config says nothing of FP8' if fp8 is None else 'there is no scale for it'}; "
                "download the model again"
            )
        weights[name] = _join(name, tensor, tensors[found], fp8.block, place)
        used.add(found)
    for name, tensor in tensors.items():
        if name in weights or name in used:
            continue
        if tensor.type.dtype is None:
            refuse_quantized_names(tensors, place)
            raise CheckpointError(
                f"{place}: tensor {name!r} has dtype {tensor.type.name!r}; hopskip reads F32, F16, BF16, and "
                f"{', '.join(FP8_TYPES)} with scales"
            )
        weights[name] = tensor
    return weights


def _join(
    name: str, weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None, place: Path
) -> ScaledTensor:
    """A weight with its scale: one for all, one for each row, or one for each block."""
    grid = (scale.num_values, 1) if len(scale.shape) == 1 else scale.shape
    size = _block_size(weight.shape, grid, block)
    if size is None:
        raise CheckpointError(
            f"{place}: the scales of {name!r} have shape {list(scale.shape)}, which does not fit its "
            f"{list(weight.shape)}; download the model again"
        )
    if scale.type.dtype is None and scale.type.name not in _EXPONENTS:
        raise CheckpointError(f"{place}: the scales of {name!r} have dtype {scale.type.name!r}; hopskip reads floats")
    return ScaledTensor(weight.path, weight.offset, weight.type, weight.shape, replace(scale, shape=grid), size)


def _block_size(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of values to each scale of a grid: what the config says if it fits, else equal shares."""
    if len(grid) != 2:
        return None
    if block is not None and grid == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        return block
    if shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


@cache
def _values_of_codes(name: str) -> NDArray[np.float32]:
    """What each of the 256 codes stands for (OCP 8-bit floating point specification, 1.0)."""
    codes = np.arange(256, dtype=np.uint16)
    if name == "F8_E5M2":  # the upper half of a float16
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, fraction = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32) / 8
    size = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    size[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 0x80, size, -size).astype(np.float32)


def _scale_values(scale: StoredTensor, first: int, count: int) -> NDArray[np.float32]:
    """Scales, float32 [count, columns]."""
    if scale.type.name in _EXPONENTS:  # a byte says the power of two
        return np.exp2(scale.blocks(first, count).astype(np.float32) - 127)
    return dequantize(scale.blocks(first, count), scale.type)


def _is_unused(name: str, tensor: StoredTensor, place: Path) -> bool:
    if not _UNUSED.fullmatch(name):
        return False
    if name.endswith(".weight_zero_point") and bool((tensor.blocks() & 0x7F).any()):
        raise CheckpointError(f"{place}: {name!r} is not zero, which hopskip does not read; use the original model")
    return True
