"""GGUF files against the models they were written from, against the `gguf` package, and damaged ones."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import partial
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

from hopskip.backends.torch.weights import load_tensor, load_weights
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.checkpoint.gguf import GGUFFile, hf_name
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.stored import BLOCK_TYPES, dequantize, unpermuted
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
        assert torch.equal(load_tensor(checkpoint, name), parameter), name
    ids = torch.randint(VOCAB_SIZE, (120,), generator=torch.Generator().manual_seed(1))
    logits = logits_in_chunks(load(tmp_path / "m.gguf"), ids, [100, 5, 15])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=1e-4)
    assert checkpoint.config.eos_token_ids == (1,)
    assert (checkpoint.dtype, checkpoint.quantization) == ("float32", None)


def test_query_rows_are_really_stored_in_another_order(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model)
    stored = GGUFFile(tmp_path / "m.gguf").tensors["blk.0.attn_q.weight"]
    raw = torch.from_numpy(dequantize(stored.blocks(), stored.type))
    original = model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(raw, original)
    assert torch.equal(raw[unpermuted(len(raw), 4)], original)


@pytest.mark.parametrize(
    ("scaling", "metadata", "context"),
    [
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "factor": 8.0, "original_context_length": 64},
            512,
        ),
        ({"rope_type": "yarn", "factor": 2.0}, {"type": "yarn", "factor": 2.0}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, {"scale_linear": 4.0}, 4096),
        ({"rope_type": "default"}, {"type": "none"}, 1024),
    ],
    ids=["yarn", "yarn-of-context-length", "linear", "linear-as-once", "none"],
)
def test_rope_scaling_keys(scaling: dict[str, Any], metadata: dict[str, Any], context: int, tmp_path: Path) -> None:
    shape = make_model("llama2-mha").config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "rope_parameters": {"rope_theta": 10_000.0, **scaling}})).eval()
    keys = {f"llama.rope.{'' if k == 'scale_linear' else 'scaling.'}{k}": value for k, value in metadata.items()}
    write_gguf(tmp_path / "m.gguf", model, metadata=keys)
    ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(1))
    logits = logits_in_chunks(load(tmp_path / "m.gguf"), ids, [200])
    torch.testing.assert_close(logits, reference_logits(model, ids), rtol=0, atol=1e-4)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config.rope.rope_type == scaling["rope_type"]
    assert (config.context_length, config.max_position_embeddings) == (context, 1024)


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
    plain_dtypes = {Type.F32: "float32", Type.F16: "float16"}
    assert checkpoint.dtype == plain_dtypes.get(kind, "bfloat16")
    weights = load_weights(checkpoint, torch.float32)
    for name, parameter in model.named_parameters():
        values = load_tensor(checkpoint, name, torch.float32)
        assert (values - parameter).abs().max() <= ROUGH[kind] * parameter.abs().max(), name
        if is_plain or parameter.ndim == 1:
            continue
        stored = checkpoint.stored(name)
        assert (stored.type.name, stored.shape) == (kind.name, tuple(parameter.shape))
        assert load_tensor(checkpoint, name).dtype == torch.float32
        # some of the rows, in Hugging Face's order
        assert np.array_equal(checkpoint.rows(name, 3, 5), values[3:8].numpy())
    q_proj = load_tensor(checkpoint, "model.layers.1.self_attn.q_proj.weight", torch.float32)
    assert torch.equal(weights.layers[1].qkv_proj[:64], q_proj)


def test_quantized_rows_move_but_never_change(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", model, types=Type.Q8_0)
    stored = GGUFFile(tmp_path / "m.gguf").tensors["blk.0.attn_k.weight"].blocks()
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
                values = values[unpermuted(len(values), 4)]
            assert np.array_equal(load_tensor(checkpoint, name).numpy(), values)
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
        ({"general.architecture": "gemma"}, "'gemma'.*llama, mistral, qwen2, qwen3; nearest to it is qwen3, such as"),
        ({"general.architecture": "qwen3moe"}, "'qwen3moe'.*nearest to it is qwen3, such as Qwen/Qwen3-4B"),
        ({"general.architecture": "clip"}, "something beside one"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one part of 3.*name the parts NAME-00001-of-00003.gguf.*gguf-split"),
        ({"split.count": "3"}, "split.count is '3', not a number"),
        ({"general.type": "adapter"}, r"something beside one \('adapter'\)"),
        ({"general.type": "imatrix"}, r"something beside one \('imatrix'\)"),
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


def write_parts(folder: Path, model: PreTrainedModel, count: int, *, metadata_only_first: bool = False) -> list[Path]:
    """A model in several files, as llama-gguf-split writes them: metadata in the first, tensors one after the other."""
    write_gguf(folder / "whole.gguf", model, tokenizer=byte_level_tokenizer())
    reader = gguf.GGUFReader(folder / "whole.gguf")
    shares: list[list[gguf.ReaderTensor]] = [[] for _ in range(count)]
    for index, tensor in enumerate(reader.tensors):
        first = 1 if metadata_only_first else 0
        shares[first + index * (count - first) // len(reader.tensors)].append(tensor)
    paths = [folder / f"m-F32-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, (path, share) in enumerate(zip(paths, shares, strict=True)):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in share:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("metadata_only_first", [False, True])
def test_a_split_model_is_one(metadata_only_first: bool, model: PreTrainedModel, tmp_path: Path) -> None:
    """Whichever part is named: the tensors of all, and the tokenizer of the first, where the path then leads."""
    paths = write_parts(tmp_path, model, 3, metadata_only_first=metadata_only_first)
    whole = open_checkpoint(tmp_path / "whole.gguf")
    prints = set()
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == paths[0]
        assert checkpoint.config == whole.config
        assert {checkpoint.stored(name).path for name in checkpoint.names()} == set(paths[metadata_only_first:])
        for name, parameter in model.named_parameters():
            assert torch.equal(load_tensor(checkpoint, name), parameter), name
        prints.add(checkpoint.fingerprint)
    assert len(prints) == 1
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    assert tokenizer.encode("hello") == load_tokenizer(whole.path, whole.config).encode("hello")
    # each part counts, by what it holds
    last = bytearray(paths[2].read_bytes())
    last[GGUFFile(paths[2]).header_size] ^= 1
    paths[2].write_bytes(last)
    assert open_checkpoint(paths[0]).fingerprint not in prints


def set_split(path: Path, key: str, value: int) -> None:
    """Change a `split.*` value in place."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value
    reader.data.flush()


def test_parts_that_do_not_belong_together(model: PreTrainedModel, tmp_path: Path) -> None:
    def broken(named: str, change: Callable[[list[Path]], object]) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        paths = write_parts(folder, model, 3)
        change(paths)
        for path in (path for path in paths if path.exists()):
            with pytest.raises(CheckpointError, match=named) as caught:
                open_checkpoint(path)
            assert "\n" not in str(caught.value)

    broken(r"one part of 3; beside it there is no m-F32-00002-of-00003\.gguf: download all", lambda p: p[1].unlink())
    broken(r"beside it there is no m-F32-00001-of-00003", lambda p: p[0].unlink())
    broken(r"00002-of-00003\.gguf is not part 2 of m-F32-00001", lambda p: shutil.copy(p[2], p[1]))
    broken(r"is not part 3 of", lambda p: set_split(p[2], "split.no", 1))
    broken(r"is not part 2 of", lambda p: set_split(p[1], "split.tensors.count", 7))
    broken(r"one part of \d, but its name|is not part 3 of", lambda p: set_split(p[2], "split.count", 4))
    broken(
        r"the parts have 29 tensors of 28",
        lambda p: list(map(partial(set_split, key="split.tensors.count", value=28), p)),
    )
    broken(r"cannot be read as GGUF", lambda p: p[1].write_bytes(p[1].read_bytes()[:-2000]))
    broken(r"00003-of-00003\.gguf is a Git LFS pointer", lambda p: p[2].write_bytes(POINTER))


def test_a_part_that_repeats_tensors(model: PreTrainedModel, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model, 2)
    (tmp_path / "whole.gguf").unlink()
    writer = gguf.GGUFWriter(paths[1], "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 29)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"repeats the tensor blk\.0\.attn_norm\.weight of another part"):
        open_checkpoint(paths[0])


def test_a_file_named_as_a_part_that_is_whole(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m-00001-of-00003.gguf", model)
    assert open_checkpoint(tmp_path / "m-00001-of-00003.gguf").path.name == "m-00001-of-00003.gguf"


def test_a_gguf_file_is_known_by_its_first_letters(model: PreTrainedModel, tmp_path: Path) -> None:
    """Ollama keeps models as blobs, whose names are hashes."""
    blob = tmp_path / "blobs" / ("sha256-" + "0123456789abcdef" * 4)
    blob.parent.mkdir()
    write_gguf(blob, model, tokenizer=byte_level_tokenizer())
    checkpoint = open_checkpoint(find_model(str(blob)))
    assert checkpoint.path == blob
    assert load_tokenizer(checkpoint.path, checkpoint.config).encode("hello")
    write_gguf(tmp_path / "m.bin", model)
    assert open_checkpoint(tmp_path / "m.bin").names() == checkpoint.names()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("m.gguf", POINTER, "m.gguf is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"),
        ("sha256-0a", POINTER, "is a Git LFS pointer"),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(60), "holds pickled weights.*safetensors or GGUF version"),
        ("m.pt", b"\x80\x02}q", "holds pickled weights"),
        ("m.bin", b"<!DOCTYPE html>", "is a web page.*/resolve/"),
        ("m.bin", b"FUGG" + bytes(20), "is a big-endian GGUF file"),
        ("ggml-model.bin", b"tjgg" + bytes(20), "is of the old GGML format"),
        ("model.safetensors", (900).to_bytes(8, "little") + b'{"a"', "one file of a checkpoint; give its folder"),
        ("config.json", b"{}", "one file of a checkpoint; give its folder"),
        ("m.bin", b"x", "neither a folder with safetensors files nor a GGUF file"),
        ("m.bin", b"", "neither a folder"),
        ("m.gguf-split-a", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "join the pieces first: cat"),
        ("m.gguf.part1of2", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "join the pieces first: cat"),
    ],
)
def test_files_that_are_none(name: str, content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_begins_elsewhere(model: PreTrainedModel, tmp_path: Path) -> None:
    """Offsets follow from the sizes, as in llama.cpp: one that was changed would give other weights."""
    write_gguf(tmp_path / "m.gguf", model)
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    reader.tensors[3].field.parts[-1][0] += 32
    reader.data.flush()
    with pytest.raises(CheckpointError, match=r"begins at byte \d+ instead of \d+"):
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
