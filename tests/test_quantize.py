"""The formats of the native engine: how close they come, how they map from GGUF, and how they are packed."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from hopskip.backends.native.quantize import (
    Format,
    from_gguf_blocks,
    pack,
    quantize_q4,
    quantize_q8,
    rows_in_q8,
    select_rows,
)
from hopskip.errors import CheckpointError


def random_weight(rows: int = 37, cols: int = 96, seed: int = 0) -> Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * 0.05


def test_q8_is_within_half_a_step() -> None:
    weight = random_weight()
    q8 = quantize_q8(weight)
    step = q8.scales.float().repeat_interleave(32, dim=1)
    assert bool(((q8.dequantize() - weight).abs() <= step * 0.5 + weight.abs().max() * 2**-10).all())
    assert q8.values.abs().max() == 127


def test_q4_beats_rounding_within_the_blocks_range() -> None:
    weight = random_weight(512, 64)
    blocks = weight.reshape(512, -1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((blocks - low) / step).round() * step + low).reshape(weight.shape)
    found = quantize_q4(weight).dequantize()
    assert float((found - weight).square().mean()) < 0.9 * float((plain - weight).square().mean())


def test_q4_represents_sixteen_levels_exactly() -> None:
    levels = torch.arange(16).repeat(4, 2).float()[:, torch.randperm(32)] * 0.25 - 1.5
    assert torch.equal(quantize_q4(levels).dequantize(), levels)


@pytest.mark.parametrize("quantize", [quantize_q8, quantize_q4])
def test_blocks_of_zeros_and_constants_survive(quantize: object) -> None:
    weight = torch.zeros((2, 64))
    weight[1, 32:] = 0.5
    found = quantize(weight).dequantize()  # type: ignore[operator]
    assert torch.allclose(found, weight, atol=1e-3)
    assert torch.equal(found[0], weight[0])


@pytest.mark.parametrize("quantize", [quantize_q8, quantize_q4])
@pytest.mark.parametrize(("value", "match"), [(float("nan"), "not a number"), (1e30, "float16")])
def test_weights_that_no_scale_fits_are_refused(quantize: object, value: float, match: str) -> None:
    weight = random_weight()
    weight[3, 5] = value
    with pytest.raises(CheckpointError, match=match):
        quantize(weight)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_blocks_map_bit_for_bit(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quants.quantize(random_weight().numpy(), kind)
    mapped = from_gguf_blocks(name, torch.from_numpy(blocks))
    assert mapped is not None
    expected = gguf.quants.dequantize(blocks, kind).astype(np.float32)
    np.testing.assert_array_equal(mapped.dequantize().numpy(), expected)


def test_other_gguf_types_do_not_map() -> None:
    blocks = gguf.quants.quantize(random_weight().numpy(), gguf.GGMLQuantizationType.Q5_0)
    assert from_gguf_blocks("Q5_0", torch.from_numpy(blocks)) is None


def test_q4_0_whose_minimum_overflows_float16_does_not_map() -> None:
    block = torch.zeros((1, 18), dtype=torch.uint8)
    block[0, :2] = torch.tensor([10_000.0], dtype=torch.float16).view(torch.uint8)
    assert from_gguf_blocks("Q4_0", block) is None


def test_the_layout_of_strips() -> None:
    """Byte for byte, as `native/kernels.h` describes it: row 21 is lane 5 of strip 1."""
    weight = random_weight(40, 96)
    q8 = quantize_q8(weight)
    packed = pack(q8, 96)
    assert (packed.format, packed.rows, packed.cols) == (Format.Q8, 40, 96)
    assert packed.data.shape == (3, (2 * 64 + 3 * 512) // 4)  # 3 blocks: a head for two, a head for the last
    strip = packed.data[1].reshape(26, 16)
    heads = strip[[0, 17]].contiguous().view(torch.float16).reshape(4, 16)
    assert torch.equal(heads[:3, 5], q8.scales[21])
    assert not heads[3].any()
    units = torch.cat((strip[1:17], strip[18:]))
    assert torch.equal(units[:, 5].contiguous().view(torch.uint8).int() - 128, q8.values[21].int())

    q4 = quantize_q4(weight)
    blocks = pack(q4, 96).data[1].reshape(3, 5, 16)
    heads = blocks[:, 0].contiguous().view(torch.float16).reshape(3, 2, 16)
    assert torch.equal(heads[:, 0, 5], q4.scales[21])
    assert torch.equal(heads[:, 1, 5], q4.minima[21])
    assert torch.equal(blocks[:, 1:, 5].contiguous().view(torch.uint8), q4.nibbles[21])

    bf16 = pack(weight.bfloat16(), 96)
    units = bf16.data[1].reshape(48, 16)
    assert torch.equal(units[:, 5].contiguous().view(torch.bfloat16), weight[21].bfloat16())


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8", "q4"])
@pytest.mark.parametrize("cols", [96, 40])
def test_rows_selected_from_a_packed_matrix(kind: str, cols: int) -> None:
    weight = random_weight(50, cols)
    rows = torch.tensor([49, 0, 17, 17, 3])
    make = {"f32": lambda w: w, "bf16": lambda w: w.bfloat16(), "q8": quantize_q8, "q4": quantize_q4}[kind]
    selected = select_rows(pack(make(weight), cols), rows)
    expected = pack(make(weight[rows]), cols)
    assert selected.rows == 5
    assert torch.equal(selected.data, expected.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_rows_in_q8_are_the_rows_quantized(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor([39, 0, 17, 16])
    found = rows_in_q8(pack(weight, 70), rows)
    expected = pack(quantize_q8(weight[rows].float()), 70)
    assert (found.format, found.rows, found.cols) == (expected.format, expected.rows, expected.cols)
    assert torch.equal(found.data, expected.data)
