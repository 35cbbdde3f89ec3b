"""GGUF files against the models they were written from, against the `gguf` package, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hopskip.backends.torch.weights import load_weights
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.checkpoint.gguf import GGUFFile, hf_name
from hopskip.checkpoint.stored import BLOCK_TYPES, dequantize, unpermute_rows
from hopskip.errors import CheckpointError
from hopskip.text.tokenizer_files import load_tokenizer
from tests.packing import random_blocks
from tests.properties import examples
from tests.test_families import load, logits_in_chunks, reference_logits
from tests.tiny import FAMILIES, VOCAB_SIZE, byte_level_tokenizer, gguf_name, make_model, permute, write_gguf

WIDE_TYPES = [Type[block.name] for block in BLOCK_TYPES.values() if block.num_values > 1]
ROUGH = {
    Type.F32: 0.0,
    Type.F16: 1e-3,
    Type.BF16: 5e-3,
    Type.Q8_0: 1e-2,
    Type.Q4_0: 0.2,
    Type.Q4_1: 0.15,
}
"""Types that the `gguf` package can write, and the error each may make, relative to the largest weight."""


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama3-gqa")


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_block_types_are_those_of_ggml(number: int) -> None:
    block = BLOCK_TYPES[number]
    assert Type(number).name == block.name
    assert gguf.GGML_QUANT_SIZES[Type(number)] == (block.num_values, block.num_bytes)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names_are_those_of_llama_cpp(architecture: str) -> None:
    family = {"llama": "llama2-mha"}.get(architecture, architecture)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 3)
    for ours, _ in make_model(family).named_parameters():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        assert theirs == gguf_name(ours)
        assert hf_name(theirs) == ours
    assert hf_name("blk.x.attn_q.weight") is None
    assert hf_name("blk.0.attn_sinks.weight") is None


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama3-gqa", "llama-yarn", "llama-linear")])
def test_config_and_weights_of_every_family(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    window = getattr(model.config, "sliding_window", None)
    prefix = {"mistral": "llama"}.get(model.config.model_type, model.config.model_type)
    metadata = {f"{prefix}.attention.sliding_window": window} if window else None
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.tensor(name), parameter), name
    ids = torch.randint(VOCAB_SIZE, (120,), generator=torch.Generator().manual_seed(1))
    logits = logits_in_chunks(load(tmp_path / "m.gguf"), ids, [100, 5, 15])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=1e-4)
    assert checkpoint.config.eos_token_ids == (1,)
    assert (checkpoint.dtype, checkpoint.quantization) == (torch.float32, None)


def test_query_rows_are_really_stored_in_another_order(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model)
    stored = GGUFFile(tmp_path / "m.gguf").tensors["blk.0.attn_q.weight"]
    raw = dequantize(stored.blocks(), stored.type)
    original = model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(raw, original)
    assert torch.equal(unpermute_rows(raw, 4), original)


@pytest.mark.parametrize(
    ("scaling", "metadata"),
    [
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "factor": 8.0, "original_context_length": 64},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"scale_linear": 4.0}),
        ({"rope_type": "default"}, {"type": "none"}),
    ],
    ids=["yarn", "linear", "linear-as-once", "none"],
)
def test_rope_scaling_keys(scaling: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    shape = make_model("llama2-mha").config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "rope_parameters": {"rope_theta": 10_000.0, **scaling}})).eval()
    keys = {f"llama.rope.{'' if k == 'scale_linear' else 'scaling.'}{k}": value for k, value in metadata.items()}
    write_gguf(tmp_path / "m.gguf", model, metadata=keys)
    ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1))
    logits = logits_in_chunks(load(tmp_path / "m.gguf"), ids, [200])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=1e-4)
    assert open_checkpoint(tmp_path / "m.gguf").config.rope.rope_type == scaling["rope_type"]


def test_llama3_scaling_comes_as_a_tensor(model: PreTrainedModel, tmp_path: Path) -> None:
    inv_freq = model.model.rotary_emb.inv_freq
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    write_gguf(tmp_path / "m.gguf", model, extra_tensors={"rope_freqs.weight": (plain / inv_freq).numpy()})
    write_gguf(tmp_path / "without.gguf", model)
    ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(model, ids)
    torch.testing.assert_close(logits_in_chunks(load(tmp_path / "m.gguf"), ids, [200]), expected, rtol=0, atol=1e-4)
    assert (logits_in_chunks(load(tmp_path / "without.gguf"), ids, [200]) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", ROUGH, ids=lambda kind: kind.name)
def test_written_types(kind: Type, model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, types=kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    is_plain = kind in (Type.F32, Type.F16, Type.BF16)
    assert checkpoint.quantization == (None if is_plain else kind.name)
    plain_dtypes = {Type.F32: torch.float32, Type.F16: torch.float16}
    assert checkpoint.dtype == plain_dtypes.get(kind, torch.bfloat16)
    weights = load_weights(checkpoint, torch.float32)
    for name, parameter in model.named_parameters():
        values = checkpoint.tensor(name, torch.float32)
        assert (values - parameter).abs().max() <= ROUGH[kind] * parameter.abs().max(), name
        if is_plain or parameter.ndim == 1:
            continue
        stored = checkpoint.stored(name)
        assert (stored.type.name, stored.shape) == (kind.name, tuple(parameter.shape))
        assert checkpoint.tensor(name).dtype == torch.float32
        # some of the rows, in Hugging Face's order
        assert np.array_equal(checkpoint.rows(name, 3, 5), values[3:8].numpy())
    q_proj = checkpoint.tensor("model.layers.1.self_attn.q_proj.weight", torch.float32)
    assert torch.equal(weights.layers[1].qkv_proj[:64], q_proj)


def test_quantized_rows_move_but_never_change(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, types=Type.Q8_0)
    stored = GGUFFile(tmp_path / "m.gguf").tensors["blk.0.attn_k.weight"].blocks().numpy()
    order = open_checkpoint(tmp_path / "m.gguf").row_order("model.layers.0.self_attn.k_proj.weight")
    assert order is not None
    assert np.array_equal(permute(stored[order], 2), stored)
    assert not np.array_equal(stored[order], stored)


@pytest.mark.parametrize("kind", WIDE_TYPES, ids=lambda kind: kind.name)
def test_types_of_blocks(kind: Type, tmp_path: Path) -> None:
    """In a model wide enough for blocks of 256, all matrices of one type; read as the `gguf` package does."""
    shape = {**make_model("llama2-mha").config.to_dict(), "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    path = tmp_path / "m.gguf"
    writer_types = {}
    blocks: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rows = random_blocks(kind.name, *parameter.shape)
            blocks[gguf_name(name)] = rows
            writer_types[gguf_name(name)] = kind
    write_gguf(path, model, types=writer_types, raw_blocks=blocks)
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization == kind.name
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            values = gguf.dequantize(blocks[gguf_name(name)], kind)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = unpermute_rows(torch.from_numpy(values), 4).numpy()
            assert np.array_equal(checkpoint.tensor(name).numpy(), values)
            assert values.std() > 0


def test_mixed_types(model: PreTrainedModel, tmp_path: Path) -> None:
    """As in most files: another type for embedding and head than for the layers."""
    types = {gguf_name(name): Type.Q4_1 for name, p in model.named_parameters() if p.ndim == 2}
    types["token_embd.weight"] = Type.Q8_0
    write_gguf(tmp_path / "m.gguf", model, types=types)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.quantization == "Q4_1"
    assert checkpoint.stored("model.embed_tokens.weight").type.name == "Q8_0"


def test_unknown_type_lists_those_that_are_read(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, types=Type.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions, and two of them
    (tmp_path / "m.gguf").write_bytes(data[:at] + struct.pack("<I", 41) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.weight' has type Q1_0.*BF16, F16, F32, IQ1_M.*Q8_0"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma"}, "'gemma'.*llama, mistral, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one part of 3.*gguf-split"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of 16"),
        ({"llama.block_count": None}, r"lacks .*'llama\.block_count'"),
        ({"llama.block_count": 2}, r"unexpected: model\.layers\.2\."),
        ({"llama.block_count": 4}, r"missing: model\.layers\.3\."),
        ({"llama.embedding_length": 65}, r"misshapen: .*is \[64\] instead of \[65\]"),
        ({"llama.block_count": "three"}, "num_hidden_layers is 'three'"),
        ({"llama.attention.head_count": [4, 4, 4]}, "wrong type|num_attention_heads"),
        ({"llama.rope.freq_base": "many"}, "rope_theta"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"general.alignment": 24}, "general.alignment is 24"),
    ],
)
def test_wrong_metadata(metadata: dict[str, Any], named: str, model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "m.gguf")


def test_unexpected_tensors_are_named_as_in_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, extra_tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_checkpoint(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", model, extra_tensors={"mystery.weight": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"unexpected: mystery\.weight"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"GGUF", "GGUF"),
        (b"GGML" + bytes(100), "does not start"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "big-endian"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version 1"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "truncated|unpack|byte"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "architecture 'None'"),
    ],
)
def test_not_gguf(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write_gguf(path, make_model("llama3-gqa"), types=Type.Q8_0, tokenizer=byte_level_tokenizer())
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file(share: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    end = max(tensor.offset + tensor.num_bytes for tensor in GGUFFile(path).tensors.values())
    path.write_bytes(whole[: int(share * end)])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(path)


@settings(
    max_examples=examples(3),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_header(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """Whatever bytes stand in the header: it opens, or it is a CheckpointError, at once and with little memory."""
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    header_size = GGUFFile(path).header_size
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, header_size - 1))
        damaged[start] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
        load_tokenizer(path, checkpoint.config)
    except CheckpointError:
        return
    assert checkpoint.names() == expected_tensors(checkpoint.config).keys()
