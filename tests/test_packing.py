"""Packed weights: what they hold, how close they come, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hopskip.backends.native.formats import EXACT, Format, choose_format, matrix_bytes, strip_bytes
from hopskip.backends.native.packing import Packed, Packer, ScaleError, empty_strips
from hopskip.errors import CheckpointError

from .packing import quantized_q4, quantized_q8, random_blocks, read_packed, values_of

BLOCKS = [name for name in EXACT if name not in ("F32", "BF16")]


def pack_blocks(kind: str, blocks: np.ndarray, cols: int, order: np.ndarray | None = None) -> Packed:
    rows = len(blocks) if order is None else len(order)
    out = empty_strips(EXACT[kind], rows, cols)
    out[:] = 0x5A  # what was in memory before must not show
    Packer().pack(blocks, kind, cols, EXACT[kind], out, order)
    return Packed(EXACT[kind], rows, cols, out.view(np.int32))


def pack(weight: Tensor, format: Format, importance: Tensor | None = None) -> Packed:
    return Packer().pack_array(weight.float().numpy(), format, None if importance is None else importance.numpy())


def random_weight(rows: int = 37, cols: int = 96, seed: int = 0) -> Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_keep_their_values(kind: str) -> None:
    """Every bit of 37 rows (two strips and a part of one) of 768 columns."""
    blocks = random_blocks(kind, 37, 768)
    expected = values_of(kind, blocks)
    packed = pack_blocks(kind, blocks, 768)
    found = read_packed(packed)
    np.testing.assert_array_equal(packed.unpack(), found)
    if kind == "IQ4_XS":  # the product of two scales is rounded to float16
        assert (np.abs(found - expected) <= np.abs(expected) * 2**-11).all()
        assert not np.array_equal(found, expected)
    else:
        np.testing.assert_array_equal(found, expected)
    assert packed.data.nbytes == matrix_bytes(packed.format, 37, 768) == 3 * strip_bytes(packed.format, 768)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"])
def test_rows_of_any_number_of_blocks(kind: str) -> None:
    for cols in (32, 96, 320):
        blocks = random_blocks(kind, 5, cols)
        np.testing.assert_array_equal(pack_blocks(kind, blocks, cols).unpack(), values_of(kind, blocks))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_rows_in_another_order(kind: str) -> None:
    blocks = random_blocks(kind, 40, 256)
    order = np.random.default_rng(0).permutation(40).astype(np.int32)[:21]
    np.testing.assert_array_equal(pack_blocks(kind, blocks, 256, order).unpack(), values_of(kind, blocks)[order])


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_selected_from_a_packed_matrix(kind: str) -> None:
    blocks = random_blocks(kind, 50, 512)
    rows = np.array([49, 0, 17, 17, 3], dtype=np.int32)
    packed = pack_blocks(kind, blocks, 512)
    selected = packed.select_rows(rows)
    assert (selected.format, selected.rows, selected.cols) == (packed.format, 5, 512)
    np.testing.assert_array_equal(selected.data, pack_blocks(kind, blocks[rows], 512).data)
    np.testing.assert_array_equal(packed.unpack(rows), packed.unpack()[rows])


@pytest.mark.parametrize("format", [Format.F32, Format.BF16, Format.Q8, Format.Q4])
@pytest.mark.parametrize("cols", [96, 40])
def test_rows_selected_from_floats_and_what_is_made_of_them(format: Format, cols: int) -> None:
    weight = random_weight(50, cols)
    rows = np.array([49, 0, 17, 17, 3], dtype=np.int32)
    found, expected = pack(weight, format).select_rows(rows), pack(weight[rows], format)
    np.testing.assert_array_equal(found.unpack(), expected.unpack())
    assert found.data.shape == expected.data.shape


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("format", [Format.F32, Format.BF16])
def test_plain_values(stored: str, format: Format) -> None:
    """Rounded once, to nearest even, if at all."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    weight = (torch.randn(20, 70, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    weight[0, :6] = torch.tensor(
        [0.0, -0.0, 6e-8, 65504.0 if dtype == torch.float16 else 1e30, 1 + 2**-8, -(1 + 3 * 2**-8)]
    )
    out = empty_strips(format, 20, 70)
    Packer().pack(weight.contiguous().view(torch.uint8).reshape(20, -1).numpy(), stored, 70, format, out)
    found = read_packed(Packed(format, 20, 70, out.view(np.int32)))
    expected = weight.float() if format is Format.F32 else weight.bfloat16().float()
    np.testing.assert_array_equal(found, expected.numpy())


def test_q8_is_what_the_readable_version_makes() -> None:
    weight = random_weight(37, 100)
    found = torch.from_numpy(read_packed(pack(weight, Format.Q8)))
    expected = quantized_q8(weight)
    # the readable version divides where the packer multiplies: a tie may go the other way
    assert float((found != expected).float().mean()) < 0.002
    step = weight.abs().max() / 127
    assert float((found - weight).abs().max()) <= 0.51 * step


@pytest.mark.parametrize("weighted", [False, True])
def test_q4_is_as_good_as_the_readable_version(weighted: bool) -> None:
    weight = random_weight(256, 100)
    importance = torch.rand(100, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    counts = torch.ones(100) if importance is None else importance
    found = torch.from_numpy(read_packed(pack(weight, Format.Q4, importance)))
    expected = quantized_q4(weight, importance)
    errors = [float((counts * (q - weight).square()).mean()) for q in (found, expected, quantized_q4(weight))]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert float((found != expected).float().mean()) < 0.02
    if weighted:
        assert errors[0] < 0.9 * errors[2]


def test_q4_beats_rounding_within_the_blocks_range() -> None:
    weight = random_weight(512, 64)
    blocks = weight.reshape(512, -1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((blocks - low) / step).round() * step + low).reshape(weight.shape)
    found = torch.from_numpy(read_packed(pack(weight, Format.Q4)))
    assert float((found - weight).square().mean()) < 0.9 * float((plain - weight).square().mean())


def test_q4_represents_sixteen_levels_exactly() -> None:
    levels = torch.arange(16).repeat(4, 2).float()[:, torch.randperm(32)] * 0.25 - 1.5
    np.testing.assert_array_equal(read_packed(pack(levels, Format.Q4)), levels.numpy())


@pytest.mark.parametrize("format", [Format.Q8, Format.Q4])
def test_blocks_of_zeros_and_constants_survive(format: Format) -> None:
    weight = torch.zeros((2, 64))
    weight[1, 32:] = 0.5
    found = read_packed(pack(weight, format))
    np.testing.assert_allclose(found, weight.numpy(), atol=1e-3)
    assert not found[0].any()


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_packs_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(40, 320)
    expected = {format: pack(weight, format) for format in (Format.Q8, Format.Q4, Format.BF16)}
    monkeypatch.setenv("HOPSKIP_ISA", isa)
    for format, other in expected.items():
        found = pack(weight, format)
        # fused and separate roundings may choose different levels of nearly the same error
        assert float((found.data != other.data).mean()) < (0.05 if format is Format.Q4 else 0.001)
        errors = [float((torch.from_numpy(p.unpack()) - weight).square().mean()) for p in (found, other)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("format", [Format.F32, Format.BF16, Format.Q8, Format.Q4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(format: Format, value: float) -> None:
    weight = random_weight()
    weight[33, 95] = value
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        pack(weight, format)


@pytest.mark.parametrize("format", [Format.Q8, Format.Q4])
@pytest.mark.parametrize("value", [1e30, -1e8])
def test_weights_that_no_scale_fits_are_refused(format: Format, value: float) -> None:
    weight = random_weight()
    weight[33, 95] = value
    with pytest.raises(ScaleError, match="float16; use bfloat16"):
        pack(weight, format)


def test_values_of_float16_that_are_no_numbers_are_refused() -> None:
    for bits in (0x7C00, 0xFC00, 0x7E00):
        weight = np.zeros((3, 32), dtype=np.uint16)
        weight[2, 31] = bits
        with pytest.raises(CheckpointError, match="not a number"):
            Packer().pack(weight.view(np.uint8), "F16", 32, Format.BF16, empty_strips(Format.BF16, 3, 32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("bits", [0x7C00, 0x7E01, 0xFC00])
def test_blocks_with_scales_that_are_no_numbers_are_refused(kind: str, bits: int) -> None:
    from .packing import HALVES_AT

    for at in HALVES_AT[kind]:
        blocks = random_blocks(kind, 18, 256)
        blocks[17, at : at + 2] = np.array([bits], dtype=np.uint16).view(np.uint8)
        with pytest.raises(CheckpointError, match="not a number"):
            pack_blocks(kind, blocks, 256)


def test_scales_of_blocks_that_do_not_fit_float16_are_told_apart() -> None:
    """So that the matrix is packed to another format."""
    blocks = random_blocks("MXFP4", 18, 64)
    for exponent, fits in ((143, True), (144, False), (104, True), (103, False), (255, False)):
        blocks[17, 17] = exponent
        if fits:
            np.testing.assert_array_equal(pack_blocks("MXFP4", blocks, 64).unpack(), values_of("MXFP4", blocks))
        else:
            with pytest.raises(ScaleError, match="float16"):
                pack_blocks("MXFP4", blocks, 64)
    blocks = random_blocks("IQ4_XS", 18, 256)
    for half, fits in ((2.0, True), (30_000.0, False), (6e-8, True)):
        blocks[17, :2] = np.array([half], dtype=np.float16).view(np.uint8)
        if fits:
            pack_blocks("IQ4_XS", blocks, 256)
        else:
            with pytest.raises(ScaleError, match="float16"):
                pack_blocks("IQ4_XS", blocks, 256)


@pytest.mark.parametrize(
    ("stored", "precision", "edge", "matrix"),
    [
        ("Q4_K", "auto", "Q4_K", "Q4_K"),
        ("Q6_K", "auto", "Q6_K", "Q6_K"),
        ("IQ3_S", "auto", "Q8", "Q8"),
        ("F32", "auto", "F32", "F32"),
        ("F16", "auto", "BF16", "BF16"),
        ("BF16", "auto", "BF16", "BF16"),
        ("Q4_K", "q8", "Q8", "Q8"),
        ("Q4_K", "bfloat16", "BF16", "BF16"),
        ("Q8_0", "float32", "F32", "F32"),
        ("Q6_K", "q4", "Q6_K", "Q4"),
        ("Q8_0", "q4", "Q8", "Q4"),
        ("Q4_0", "q4", "Q4_0", "Q4_0"),
        ("Q3_K", "q4", "Q3_K", "Q3_K"),
        ("BF16", "q4", "Q8", "Q4"),
        ("IQ2_S", "q4", "Q8", "Q4"),
    ],
)
def test_what_a_precision_makes_of_a_stored_type(stored: str, precision: str, edge: str, matrix: str) -> None:
    assert choose_format(stored, "lm_head.weight", precision) is Format[edge]
    assert choose_format(stored, "model.embed_tokens.weight", precision) is Format[edge]
    assert choose_format(stored, "model.layers.0.mlp.up_proj.weight", precision) is Format[matrix]
