"""The arithmetic of `hopskip info`: against published figures, against bytes that are really loaded, against search."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch

from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.native.isa import obstacle
from hopskip.backends.tensor_cache import TensorCache
from hopskip.backends.torch.weights import load_weights
from hopskip.bench import expected
from hopskip.bench.expected import MAX_DRAFT_TOKENS, best_num_draft_tokens, model_costs
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.stored import BLOCK_TYPES, StoredTensor
from hopskip.draft import costs
from hopskip.draft.costs import expected_speedup, expected_tokens
from tests.models import tiny_config
from tests.tiny import make_model, write_checkpoint, write_gguf

_TYPES = {block.name: block for block in BLOCK_TYPES.values()}


def header_only(config: ModelConfig, stored: str = "BF16") -> Checkpoint:
    """A checkpoint whose file does not exist: reading a weight would fail."""
    tensors = {
        name: StoredTensor(Path("/nonexistent"), 0, _TYPES[stored], shape)
        for name, shape in expected_tensors(config).items()
    }
    return Checkpoint(Path("/nonexistent"), config, tensors, fingerprint="")


SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
    },
    "llama3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "llama3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(
    ("name", "head_in_layers"), [("llama2-7B", 0.65), ("llama3-8B", 2.4), ("llama3.2-1B", 4.3), ("SmolLM2-135M", 8.0)]
)
def test_head_of_known_models(name: str, head_in_layers: float) -> None:
    config = tiny_config(**SHAPES[name])
    found = model_costs(header_only(config), "torch", "auto")
    assert found.head_in_layers == pytest.approx(head_in_layers, abs=0.06)
    h, layers = found.head_in_layers, config.num_hidden_layers
    assert found.draft_step_cost(4) == pytest.approx((4 + h) / (layers + h))
    assert found.draft_step_cost(layers) == 1
    assert found.total_bytes == 2 * config.num_parameters


def test_kv_bytes() -> None:
    config = tiny_config(**SHAPES["llama3-8B"])  # known: 128 KiB a token in 16 bits
    assert model_costs(header_only(config), "torch", "bfloat16").kv_bytes_per_token == 128 * 1024
    assert model_costs(header_only(config), "torch", "float32").kv_bytes_per_token == 256 * 1024
    assert model_costs(header_only(config), "native", "q8").kv_bytes_per_token == 128 * 1024
    assert model_costs(header_only(config), "native", "q8", "int8").kv_bytes_per_token == 2 * 32 * 8 * (128 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_bytes_are_those_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, "qwen2", dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    weights = load_weights(checkpoint, dtype)
    layers = [
        sum(m.nbytes for m in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj))
        for layer in weights.layers
    ]
    found = model_costs(checkpoint, "torch", "auto")
    assert found.layer_bytes == tuple(layers)
    assert found.head_bytes == weights.lm_head.nbytes
    assert found.embedding_bytes == weights.embed_tokens.nbytes
    assert found.bytes_by_format == {str(dtype).removeprefix("torch."): found.total_bytes}


@pytest.mark.skipif(obstacle() is not None, reason="needs the native extension")
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "q8", "q4"])
@pytest.mark.parametrize("stored", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_native_bytes_are_those_loaded(tmp_path: Path, stored: str, precision: str) -> None:
    path = tmp_path / "model.gguf"
    kind = gguf.GGMLQuantizationType[stored]
    write_gguf(path, make_model("llama2-mha"), types=kind)
    checkpoint = open_checkpoint(path)
    backend = NativeBackend.load(checkpoint, precision=precision)
    found = model_costs(checkpoint, "native", precision)
    # the packing pads what is not a multiple of a strip, which the arithmetic leaves out
    assert found.bytes_per_pass == pytest.approx(backend.traits.bytes_per_pass, rel=0.05)
    cache = backend.new_cache(1, 256)
    assert found.kv_bytes_per_token == cache.nbytes / 256
    int8 = TensorCache(checkpoint.config, 1, 256, torch.int8)
    assert model_costs(checkpoint, "native", precision, "int8").kv_bytes_per_token == int8.nbytes / 256


def test_mixed_formats_count_layer_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    q8, f32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
    model = make_model("llama2-mha")
    mixed = {f"blk.0.{part}.weight": q8 for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
    write_gguf(path, model, types={**mixed, "output.weight": f32})
    found = model_costs(open_checkpoint(path), "native", "auto")
    attention = 4 * 64 * 64
    assert found.layer_bytes[1] - found.layer_bytes[0] == attention * 4 - attention * 34 // 32
    assert found.bytes_by_format["q8"] == attention * 34 // 32
    assert found.draft_step_cost(1) < (1 + found.head_in_layers) / (3 + found.head_in_layers)


@pytest.mark.parametrize("stored", ["Q4_K", "Q6_K", "Q5_0", "IQ4_XS", "IQ3_S", "Q4_0", "MXFP4"])
def test_types_of_blocks_take_their_own_size_or_8_bits(stored: str) -> None:
    """By arithmetic what the packed matrices take; the types without a format of their own are named."""
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
    found = model_costs(header_only(config, stored), "native", "auto")
    is_native = stored != "IQ3_S"
    assert found.widened == (() if is_native else (stored,))
    bits = {"Q4_K": 4.625, "Q6_K": 6.625, "Q5_0": 5.5, "IQ4_XS": 4.5, "IQ3_S": 8.5, "Q4_0": 4.5, "MXFP4": 4.5}[stored]
    layers = sum(rows * cols for rows, cols in (s for s in config.layer_tensors().values() if len(s) == 2))
    assert found.layer_bytes[0] == layers * bits / 8
    (name,) = found.bytes_by_format
    assert name == {"IQ4_XS": "iq4", "IQ3_S": "q8"}.get(stored, stored.lower())
    assert model_costs(header_only(config, stored), "native", "q8").widened == ()


def test_expected_tokens_is_the_mean_of_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    acceptance, k, rounds = 0.7, 4, 20_000
    accepted = torch.rand((rounds, k), generator=generator) < acceptance
    lengths = accepted.cumprod(dim=1).sum(dim=1) + 1
    assert expected_tokens(acceptance, k) == pytest.approx(float(lengths.float().mean()), abs=0.04)
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("step_cost", [0.05, 0.3, 0.6, 0.99])
def test_best_k_is_best(acceptance: float, step_cost: float) -> None:
    best = best_num_draft_tokens(acceptance, step_cost)
    speedup = expected_speedup(acceptance, best, step_cost)
    assert all(speedup >= expected_speedup(acceptance, k, step_cost) for k in range(MAX_DRAFT_TOKENS + 1))
    assert (best == 0) == (acceptance <= step_cost)  # the first draft token pays exactly where a > c
    assert speedup >= 1


@pytest.mark.parametrize("module", [expected, costs])
def test_examples_in_docstrings(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
