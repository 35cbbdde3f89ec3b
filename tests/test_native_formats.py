"""Every weight format of the native engine, on every instruction set of this machine: products, embeddings, bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.formats import EXACT, Format
from hopskip.backends.native.isa import ISAS, extension
from hopskip.backends.native.packing import Packed, Packer, empty_strips
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.stored import BLOCK_TYPES
from hopskip.prove.greedy import PLAIN
from hopskip.prove.recorder import run
from hopskip.sampling_params import SamplingParams
from hopskip.speculative import SpeculativeConfig

from .packing import HALVES_AT, random_blocks, read_packed
from .tiny import make_model, write_gguf

BLOCKS = [name for name, format in EXACT.items() if format.is_quantized]
RUNNABLE = [isa for isa in ISAS if extension.runs_here(isa)]
ROWS, COLS, MOST = 37, 768, 33


def packed_blocks(kind: str, blocks: NDArray[np.uint8]) -> Packed:
    out = empty_strips(EXACT[kind], ROWS, COLS)
    Packer().pack(blocks, kind, COLS, EXACT[kind], out)
    return Packed(EXACT[kind], ROWS, COLS, out.view(np.int32))


def head_engine(isa: str, packed: Packed) -> Any:
    """An engine without layers: its logits are the products with one matrix."""
    shape = extension.Shape(
        hidden_size=COLS, intermediate_size=64, num_heads=1, num_kv_heads=1, head_dim=64, vocab_size=ROWS,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    engine = extension.Engine(isa, 2, shape)
    matrix = extension.Matrix(int(packed.format), ROWS, COLS, packed.data)
    engine.set_embedding_and_head(matrix, matrix, np.ones(COLS, dtype=np.float32))
    return engine


def products(engine: Any, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty((len(rows), ROWS), dtype=np.float32)
    engine.logits(rows, out, None)
    return out


def activations() -> NDArray[np.float32]:
    """Rows of every size, with blocks that are tiny, huge, alike, of one sign, or zero."""
    x = np.random.default_rng(1).standard_normal((MOST, COLS)).astype(np.float32)
    x[1] *= 1000
    x[2, 32:64] = 0
    x[3, :32] *= 1e-4
    x[4] = 1
    x[5] = -1
    x[6] = np.where(np.arange(COLS) % 2, 1, -1)
    x[7] = 0
    return x


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_products(isa: str, kind: str, extreme: bool) -> None:
    """Within the rounding of activations to 8 bits; with integers as large as they get, where narrow sums would
    overflow."""
    blocks = random_blocks(kind, ROWS, COLS)
    if extreme:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        parts = blocks.reshape(ROWS, -1, size)
        kept = {at: parts[..., at : at + 2].copy() for at in HALVES_AT.get(kind, ())}
        parts[:] = 0xFF
        for at, halves in kept.items():
            parts[..., at : at + 2] = halves
        if kind == "MXFP4":
            parts[..., 0] = 120
    packed = packed_blocks(kind, blocks)
    weights = read_packed(packed).astype(np.float64)
    engine, x = head_engine(isa, packed), activations()
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    found, expected = products(engine, x), normed @ weights.T
    # A block's rounding is half a step of its largest element at most, or of the largest sum of neighbours (AVX2).
    steps = np.abs(normed.reshape(MOST, -1, 32)).max(axis=2) * 2 / 127
    parts = np.abs(weights.reshape(ROWS, -1, 32))
    off = np.abs(found - expected)
    sums = 1e-5 * np.abs(normed) @ np.abs(weights).T + 1e-6
    assert (off <= steps / 2 @ parts.sum(axis=2).T + sums).all()
    # where roundings are as good as random, they add up as such
    spread = np.sqrt(steps**2 / 12 @ (parts**2).sum(axis=2).T)
    assert (off <= 6 * spread + sums)[8:].all()
    ids = np.arange(ROWS, dtype=np.int32)
    rows = np.empty((ROWS, COLS), dtype=np.float32)
    engine.embed(ids, rows)
    np.testing.assert_array_equal(rows, weights.astype(np.float32))


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_have_the_same_bits_in_any_company(isa: str, kind: str) -> None:
    engine, x = head_engine(isa, packed_blocks(kind, random_blocks(kind, ROWS, COLS))), activations()
    together = products(engine, x)
    for count in (1, 2, 3, 5, 8, 12, 13, 16):
        for first in range(0, MOST - count, 7):
            np.testing.assert_array_equal(products(engine, x[first : first + count]), together[first : first + count])


@pytest.mark.parametrize("isa", RUNNABLE)
def test_matrices_of_several_formats_share_their_inputs(isa: str) -> None:
    """Some want sums of halves beside the others: who comes first must not matter."""
    x = activations()
    for kinds in (("Q8_0", "Q6_K"), ("Q6_K", "Q4_K"), ("Q4_0", "Q2_K")):
        for kind in kinds:
            packed = packed_blocks(kind, random_blocks(kind, ROWS, COLS))
            alone = products(head_engine(isa, packed), x)
            engine = head_engine(isa, packed_blocks(kinds[0], random_blocks(kinds[0], ROWS, COLS)))
            products(engine, x)
            other = extension.Matrix(int(packed.format), ROWS, COLS, packed.data)
            out = np.empty_like(alone)
            engine.logits(x, out, other)
            np.testing.assert_array_equal(out, alone)


KINDS = [block.name for block in BLOCK_TYPES.values() if block.num_values > 1]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""A model's shape, wide enough for blocks of 256."""
IDS = np.random.default_rng(0).integers(0, 320, 20).tolist()


def write_model(path: Path, kind: str) -> None:
    """The matrices of two layers' parts hold blocks of a type."""
    type_ = gguf.GGMLQuantizationType[kind]
    matrices = {"blk.0.attn_v": (256, 256), "blk.1.ffn_down": (256, 512)}
    blocks = {f"{name}.weight": random_blocks(kind, *size) for name, size in matrices.items()}
    write_gguf(path, make_model("llama2-mha", **WIDE), types=dict.fromkeys(blocks, type_), raw_blocks=blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_type(tmp_path: Path, kind: str) -> None:
    """In the format of its own, or else in 8 bits; drafted text equal to plain."""
    write_model(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    model = NativeBackend.load(checkpoint, threads=2)
    changed = {"0.self_attn.v_proj.weight", "1.mlp.down_proj.weight"}
    wanted = EXACT.get(kind, Format.Q8)
    formats = {name: matrix.format for name, matrix in model._weights.matrices.items()}
    prefix = "model.layers."
    assert {name.removeprefix(prefix) for name, format in formats.items() if format is wanted} == changed
    assert set(formats.values()) == {wanted, Format.F32}
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    early = SpeculativeConfig(draft="early-exit", exit_layer=1, num_draft_tokens=3)
    plain, drafted = (greedy_ids(model, IDS, config, params) for config in (PLAIN, early))
    assert plain == drafted


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_type_on_pytorch(tmp_path: Path, kind: str) -> None:
    """The states of both backends are close: PyTorch computes with the dequantized values."""
    torch = pytest.importorskip("torch")
    from hopskip.backends.torch.backend import TorchBackend
    from hopskip.backends.torch.weights import load_weights

    write_model(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    torch_model = TorchBackend(checkpoint.config, load_weights(checkpoint, torch.float32))
    found, expected = (hidden_of(model) for model in (NativeBackend.load(checkpoint, threads=2), torch_model))
    assert 1e-6 < (found - expected).std() / expected.std() < 0.05


def greedy_ids(backend: Any, ids: list[int], config: SpeculativeConfig, params: SamplingParams) -> list[int]:
    return run(backend, [ids], config, params, max_num_seqs=1)[0].token_ids


def hidden_of(backend: Any) -> NDArray[np.float32]:
    cache = backend.new_cache(1, 32)
    return np.asarray(backend.forward(IDS, Rows([Segment(0, 0, len(IDS))]), cache).hidden_ND)


def test_blocks_whose_scales_do_not_fit_are_packed_to_8_bits(tmp_path: Path) -> None:
    blocks = random_blocks("MXFP4", 256, 256)
    blocks[0, 0] = 100  # 2^-28: too small for float16
    name, kind = "blk.0.attn_v.weight", gguf.GGMLQuantizationType.MXFP4
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha", **WIDE), types={name: kind}, raw_blocks={name: blocks})
    model = NativeBackend.load(open_checkpoint(tmp_path / "m.gguf"))
    formats = {name: matrix.format for name, matrix in model._weights.matrices.items()}
    assert [name for name, f in formats.items() if f is Format.Q8] == ["model.layers.0.self_attn.v_proj.weight"]
    assert set(formats.values()) == {Format.Q8, Format.F32}
